"""Plots speed and memory of the 31B in Q4_K_M against context, for every cache, beside llama.cpp and the floor.

usage: python -m benchmarks.plot_context FOLDER [RESULT.json ...]

FOLDER/memory_context.svg is planned from a header; results of end_to_end.py add what was measured, and give
FOLDER/decode_context.svg.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.headers import read_header
from gemma4.config import CacheKind, LayerKind
from gemma4.memory_plan import MemoryModel

# llama.cpp (ggml 0.25.3, sm_90, flash attention), the same recipe on the same kind of card, by type of its cache.
LLAMA_CPP = {"F16": {512: 75.7, 2048: 74.6, 8192: 73.4, 32768: 69.5, 126976: 57.2}, "q8_0": {126976: 40.2}}
# Peaks that ExecuTorch's authors give for 128K, in GiB; with its 4-bit cache the lowest of several.
EXECUTORCH = {"bfloat16 cache": 31.9e9 / 2**30, "4-bit cache": 23.3}
CONTEXTS = (512, 2048, 8192, 32768, 65536, 131072, 262144)
COLORS = {CacheKind.LOSSLESS: "C0", CacheKind.TURBOQUANT: "C2", CacheKind.TURBOQUANT_4BIT: "C4"}
GIB = 1 << 30


def floor_speed(model: MemoryModel, bandwidth: float, context: int) -> float:
    """Tokens per second if weights, keys and values moved once at `bandwidth` bytes per second, and nothing else did.

    A rough floor: the embedding table counts once, as the output head.
    """
    plan, window = model.at(context), model.config.sliding_window
    read = {LayerKind.SLIDING: min(context, window), LayerKind.FULL: context}
    return bandwidth / (plan.weight_bytes + sum(group.nbytes / group.positions * read[group.kind] for group in plan.kv))


def context_axis(axes: Axes, contexts: tuple[int, ...], **labels: Any) -> None:
    axes.set(xscale="log", xlabel="context (tokens)", ylim=(0, None), **labels)
    apart = [c for c, following in pairwise((*contexts, 2 * contexts[-1])) if following > 1.2 * c]
    axes.set_xticks(apart, [f"{c // 1024}K" if c >= 1024 else str(c) for c in apart])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_memory(axes: Axes, models: dict[CacheKind, MemoryModel], results: list[dict[str, Any]]) -> None:
    weights = next(iter(models.values())).at(1).weight_bytes
    axes.axhline(weights / GIB, linestyle=":", color="gray", label="weights")
    for kind, model in models.items():
        totals = [model.at(context).total_bytes / GIB for context in CONTEXTS]
        axes.plot(CONTEXTS, totals, "-", color=COLORS[kind], label=f"{kind} cache, planned")
    for result in results:
        kind, memory = CacheKind(result.get("kv_cache", "lossless")), result.get("memory")
        if memory:
            used = memory["gpu_used_bytes"] / GIB
            axes.plot(memory["context"], used, "o", color=COLORS[kind], label=f"{kind} cache, measured")
    for (name, peak), color in zip(EXECUTORCH.items(), ("C1", "C3"), strict=True):
        axes.plot(131072, peak, "s", color=color, label=f"ExecuTorch, {name}")
    context_axis(axes, CONTEXTS, ylabel="GPU memory (GiB)", title="Gemma 4 31B Q4_K_M: all that a process takes")


def plot_decode(axes: Axes, models: dict[CacheKind, MemoryModel], results: list[dict[str, Any]]) -> None:
    seen: set[int] = set()
    for result in results:
        kind = CacheKind(result.get("kv_cache", "lossless"))
        speeds = {int(context): speed for context, speed in result["decode_tokens_per_s"].items()}
        contexts = tuple(sorted(speeds))
        seen |= set(contexts)
        floor = [floor_speed(models[kind], result["copy_bytes_per_s"], context) for context in contexts]
        axes.plot(contexts, floor, "--", color=COLORS[kind], alpha=0.6, label=f"{kind}: every byte at copy bandwidth")
        axes.plot(contexts, [speeds[c] for c in contexts], "o-", color=COLORS[kind], label=f"gemma4-gguf, {kind} cache")
    for name, color in (("F16", "C1"), ("q8_0", "C3")):
        speeds = {context: speed for context, speed in LLAMA_CPP[name].items() if context <= max(seen)}
        if speeds:
            axes.plot(list(speeds), list(speeds.values()), "s-", color=color, label=f"llama.cpp, {name} cache")
    title = f"Gemma 4 31B Q4_K_M, batch 1, {results[0]['device']}"
    context_axis(axes, tuple(sorted(seen)), ylabel="decode (tokens/s)", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path, nargs="*")
    args = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "gemma4"
    results = [json.loads(path.read_text()) for path in args.results]
    header = read_header("31B", "Q4_K_M")
    models = {kind: MemoryModel(*header, kind) for kind in CacheKind}
    plots = {"memory": plot_memory} | ({"decode": plot_decode} if results else {})
    for name, plot in plots.items():
        figure, axes = plt.subplots(figsize=(7, 4))
        plot(axes, models, results)
        axes.title.set_fontsize(10)
        figure.tight_layout()
        figure.savefig(args.folder / f"{name}_context.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
