"""Exports a GGUF as `.pt2`, loads it again, and compares with eager: memory, time, logits, tokens, decode speed.

usage: python benchmarks/export.py FILE OUT [--max-seq-len 131072] [--kv-cache lossless] [--tokens 256]

Each part runs in a process of its own, so that peaks are its own; only for speed both models are on the GPU at once and
take turns. A table comes last, after it one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 300
GIVEN_TOKENS = 32
REPEATS = 9


def logits_file(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"logits-{name}.pt"


def prompt(vocab_size: int) -> list[int]:
    return [(i * 7919 + 11) % vocab_size for i in range(PROMPT_TOKENS)]


def export(file: Path, out: Path, max_seq_len: int, kv_cache: str, tokens: int) -> dict[str, Any]:
    from gemma4.export.aoti import export_aoti

    begin = time.perf_counter()
    show = lambda name: print(f"  {name}", file=sys.stderr, flush=True)  # noqa: E731
    report = export_aoti(file, out, max_seq_len=max_seq_len, kv_cache=kv_cache, on_phase=show)
    return {
        "wall_s": time.perf_counter() - begin,
        "seconds": dict(report.seconds),
        "artifact_bytes": sum(report.sizes.values()),
        "peak_host_anonymous_bytes": report.peak_host_bytes,
        "peak_device_bytes": report.peak_device_bytes,
    }


def run_exported(file: Path, out: Path, max_seq_len: int, kv_cache: str, tokens: int) -> dict[str, Any]:
    start = time.perf_counter()
    from gemma4.export.runtime import ExportedGemma4

    model = ExportedGemma4.load(out, file)
    loaded = time.perf_counter()
    # Another beginning than the prompt's: where a generation continues one before, chunks are cut elsewhere.
    next(iter(model.stream_ids(prompt(model.config.vocab_size)[-8:], 1, temperature=0.0)))
    first = time.perf_counter()
    compiler = [name for name in ("triton", "torch._inductor", "torch._dynamo") if name in sys.modules]
    return measure(model, model._model, model._cache, tokens) | {
        "load_s": loaded - start,
        "first_token_s": first - start,
        "compiler": compiler,
    }


def run_eager(file: Path, out: Path, max_seq_len: int, kv_cache: str, tokens: int) -> dict[str, Any]:
    from gemma4 import Gemma4
    from gemma4.cache import KVCache
    from gemma4.config import CacheKind

    model = Gemma4.from_gguf(file, max_seq_len=max_seq_len, kv_cache=kv_cache)
    cache = KVCache(model.config, max_seq_len, model.model.dtype, model.model.norm.weight.device, CacheKind(kv_cache))
    return measure(model, model.model, cache, tokens)


def run_speed(file: Path, out: Path, max_seq_len: int, kv_cache: str, tokens: int) -> dict[str, Any]:
    from gemma4 import Gemma4
    from gemma4.export.runtime import ExportedGemma4

    exported = ExportedGemma4.load(out, file)
    eager = Gemma4.from_gguf(file, max_seq_len=max_seq_len, kv_cache=kv_cache)
    ids = prompt(eager.config.vocab_size)
    for model in (exported, eager):
        model.generate_ids(ids, tokens)  # compiles and captures
    pairs = [tuple(decode_ms(model, ids, tokens) for model in (exported, eager)) for _ in range(REPEATS)]
    of_exported, of_eager = (list(times) for times in zip(*pairs, strict=True))
    return {
        "exported_ms_per_token": statistics.median(of_exported),
        "eager_ms_per_token": statistics.median(of_eager),
        "exported_over_eager": statistics.median(a / b for a, b in pairs),
        "exported_ms": of_exported,
        "eager_ms": of_eager,
    }


def decode_ms(model: Any, ids: list[int], tokens: int) -> float:
    """Milliseconds a token of one greedy generation, from its first token to its last."""
    options: dict[str, Any] = {"temperature": 0.0, "eog_ids": frozenset()}
    arrived = [time.perf_counter() for _ in model.stream_ids(ids, tokens, **options)]
    return 1000 * (arrived[-1] - arrived[0]) / (tokens - 1)


def measure(model: Any, forward: Any, cache: Any, tokens: int) -> dict[str, Any]:
    """Greedy ids, and logits: after a prompt, then after each of some given tokens."""
    import torch

    from gemma4.generate import prefill

    ids = prompt(model.config.vocab_size)
    new_ids = model.generate_ids(ids, tokens)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    with torch.inference_mode():
        rows = [prefill(forward, cache, ids)]
        device = rows[0].device
        for position, token in enumerate(ids[:GIVEN_TOKENS], start=len(ids)):
            rows.append(
                forward(torch.tensor([token], device=device), torch.tensor([position], device=device), cache, 1)
            )
        torch.save(torch.cat(rows).float().cpu(), logits_file(type(model).__name__))
    return {"ids": new_ids, "peak_device_bytes": peak}


PARTS = {"export": export, "exported": run_exported, "eager": run_eager, "speed": run_speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-seq-len", type=int, default=131072)
    parser.add_argument("--kv-cache", default="lossless")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.file, args.out, args.max_seq_len, args.kv_cache, args.tokens)))
        return
    results: dict[str, Any] = {}
    for part in PARTS:
        begin = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(f"{part}: {time.perf_counter() - begin:.1f} s, exit {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode:
            break
        results[part] = json.loads(done.stdout.splitlines()[-1])
        known = {name: value for name, value in results[part].items() if name != "ids"}
        print(f"  {json.dumps(known)}", file=sys.stderr, flush=True)
    if {"exported", "eager"} <= results.keys():
        compare(results)
    for part, figures in results.items():
        for name, value in figures.items():
            print(f"{part:9} {name:28} {value}")
    print(json.dumps(results))


def compare(results: dict[str, Any]) -> None:
    import torch

    ours, theirs = (torch.load(logits_file(name)) for name in ("ExportedGemma4", "Gemma4"))
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double())
    a, b = results["exported"].pop("ids"), results["eager"].pop("ids")
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    results["compare"] = {
        "cosine_after_prompt": cosine[0].item(),
        "least_cosine": cosine.min().item(),
        "largest_difference": (ours - theirs).abs().max().item(),
        "equal_greedy_tokens": f"{same} of {len(a)}",
    }


if __name__ == "__main__":
    main()
