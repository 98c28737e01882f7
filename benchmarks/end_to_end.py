"""Times a model on one GPU: load, prefill, and decode against context. A table first, one JSON line last.

usage: python benchmarks/end_to_end.py FILE [--kv-cache turboquant] [--profile]
           [--contexts 512,2048,8192,32768] [--prompts 2048,8192] [--memory-prompt 126976]

Decode replays the captured step at each context, with caches full of random keys and values: its cost depends on the
position, not on the values. Times are medians, with weights far larger than the L2 cache in between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gemma4 import Gemma4, __version__
from gemma4.cache import KVCache
from gemma4.config import CacheKind
from gemma4.decode_loop import DecodeLoop
from gemma4.export.peaks import anonymous_bytes
from gemma4.generate import prefill
from gemma4.memory_plan import MemoryModel
from gemma4.sampling import SamplingParams

LONG_PROMPT = 16384  # tokens
GIB = 1 << 30


def note(line: str) -> None:
    """A figure at once, so that a run that is cut has said something."""
    print(line, file=sys.stderr, flush=True)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(timed(lambda: target.copy_(source), 10))


def timed(run: object, repeats: int, *, is_warm: bool = False) -> list[float]:
    """Seconds of each of `repeats` runs on the device, after one that is not counted unless `is_warm`."""
    assert callable(run)
    if not is_warm:
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def fill(cache: KVCache) -> None:
    """Puts random content into every tensor of a cache."""
    for layer in cache.own.values():
        for tensor in layer.tensors().values():
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.random_(0, 256)


def gpu_used() -> int:
    """Bytes of the whole GPU that are taken: by PyTorch's pool, and by CUDA for itself."""
    free, total = torch.cuda.mem_get_info()
    return total - free


@torch.inference_mode()
def tensors_of_a_prompt(model: Gemma4, ids: list[int]) -> int:
    """The most bytes that tensors take at a time: without the blocks that a generation reserves, which count, too.

    Compiles the kernels of a prompt.
    """
    cache = KVCache(model.config, model.max_seq_len, model.model.dtype, model.device, model.kv_cache)
    model.model.reserve_workspace(len(ids))  # for what cuBLAS keeps
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prefill(model.model, cache, ids)
    return torch.cuda.max_memory_allocated()


def measure_memory(model: Gemma4, prompt_tokens: int | None) -> dict[str, Any]:
    """Bytes that a generation in the whole context takes of the GPU, beside what was planned from the header.

    prompt_tokens: by default a few chunks; the keys and values are taken for all positions at once, so they show the
    peak. The pool does not shrink before the decode step is captured, so the whole GPU is looked at between the two.
    """
    memory_model = MemoryModel(model.config, model.plan, model.kv_cache, model.model.dtype.itemsize)
    plan = memory_model.at(model.max_seq_len)
    tokens = min(prompt_tokens or 3 * plan.chunk + 5, plan.context - 16)
    prompt = torch.randint(0, model.config.vocab_size, (tokens,)).tolist()
    tensors = tensors_of_a_prompt(model, prompt[: plan.chunk + 5])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    first = model.generate_ids(prompt, 1, eog_ids=frozenset())
    prompt_s = time.perf_counter() - begin
    prompt_pool, prompt_gpu = torch.cuda.memory_reserved(), gpu_used()
    segments = sorted(segment["total_size"] for segment in torch.cuda.memory_snapshot())
    answer = model.generate_ids(prompt + first, 8, eog_ids=frozenset())
    decode_pool, decode_gpu = torch.cuda.memory_reserved(), gpu_used()
    # A second prompt finds the captured step on the GPU.
    more = prompt[: plan.context - tokens - 16]
    model.generate_ids(prompt + first + answer + more[: plan.chunk], 1, eog_ids=frozenset())
    next_pool, next_gpu = torch.cuda.memory_reserved(), gpu_used()
    memory: dict[str, Any] = {
        "context": plan.context,
        "prompt_tokens": tokens,
        "prompt_tokens_per_s": tokens / prompt_s,
        "planned_allocated_bytes": plan.allocated_bytes,
        "peak_allocated_bytes": tensors,
        "planned_total_bytes": plan.total_bytes,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "prompt_reserved_bytes": prompt_pool,
        "prompt_gpu_bytes": prompt_gpu,
        "decode_reserved_bytes": decode_pool,
        "decode_gpu_bytes": decode_gpu,
        "next_prompt_reserved_bytes": next_pool,
        "next_prompt_gpu_bytes": next_gpu,
        "gpu_used_bytes": max(prompt_gpu, decode_gpu, next_gpu),
        "prompt_segments": segments,
    }
    model.forget()
    torch.cuda.empty_cache()
    return memory


def note_memory(memory: dict[str, Any]) -> None:
    """The figures in GiB, and how the pool is made up."""
    note(f"prompt of {memory['prompt_tokens']}: {memory['prompt_tokens_per_s']:.0f} tokens/s with its first token")
    sizes = {key: f"{value / GIB:.3f}" for key, value in memory.items() if key.endswith("_bytes")}
    note("GiB: " + ", ".join(f"{key.removesuffix('_bytes')} {size}" for key, size in sizes.items()))
    beside = [memory[f"{when}_gpu_bytes"] - memory[f"{when}_reserved_bytes"] for when in ("prompt", "decode")]
    note("CUDA itself, during the prompt and while decoding: {:.3f}, {:.3f} GiB".format(*(x / GIB for x in beside)))
    note("pool during the prompt, MiB: " + " ".join(f"{size >> 20}" for size in memory["prompt_segments"]))


@torch.inference_mode()
def time_decode(model: Gemma4, contexts: list[int], params: SamplingParams, steps: int) -> dict[int, float]:
    """Seconds per token at each context."""
    cache = KVCache(model.config, max(contexts) + 4 * steps + 16, model.model.dtype, model.device, model.kv_cache)
    fill(cache)
    loop = DecodeLoop(model.model, cache, params)
    seconds = {}
    for context in contexts:
        loop.start(torch.randn(1, model.config.vocab_size, device=model.device), context, seed=0)
        loop.advance()
        seconds[context] = statistics.median(timed(loop.advance, steps))
        note(f"decode @{context}: {1 / seconds[context]:.1f} tokens/s")
    return seconds


@torch.inference_mode()
def time_prefill(model: Gemma4, prompts: list[int]) -> dict[int, float]:
    """Seconds for a whole prompt of each length; a prompt of many chunks runs once."""
    seconds = {}
    for length in prompts:
        ids = torch.randint(0, model.config.vocab_size, (length,)).tolist()
        cache = KVCache(model.config, length, model.model.dtype, model.device, model.kv_cache)
        model.model.reserve_workspace(length)
        is_long = length > LONG_PROMPT
        runs = timed(lambda c=cache, i=ids: prefill(model.model, c, i), 1 if is_long else 3, is_warm=is_long)
        seconds[length] = statistics.median(runs)
        note(f"prefill {length}: {length / seconds[length]:.0f} tokens/s")
        del cache
    return seconds


@torch.inference_mode()
def profile(model: Gemma4, context: int) -> None:
    """Prints where the time of one decode step and of one prefill chunk goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cache = KVCache(model.config, max(context + 64, 4096), model.model.dtype, model.device, model.kv_cache)
    loop = DecodeLoop(model.model, cache, SamplingParams(temperature=0))
    loop.start(torch.randn(1, model.config.vocab_size, device=model.device), context, seed=0)
    loop.advance()
    with record(activities=[ProfilerActivity.CUDA]) as decoding:
        for _ in range(4):
            loop.advance()
        torch.cuda.synchronize()
    ids = torch.randint(0, model.config.vocab_size, (2048,)).tolist()
    prefill(model.model, cache, ids)
    with record(activities=[ProfilerActivity.CUDA]) as filling:
        prefill(model.model, cache, ids)
        torch.cuda.synchronize()
    for name, trace, runs in (("decode step", decoding, 4), ("prefill 2048", filling, 1)):
        rows = sorted(trace.key_averages(), key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows) / runs
        print(f"\n{name}: {total:.0f} us in kernels")
        for row in rows[:22]:
            us = row.self_device_time_total / runs
            print(f"  {us:9.1f} us  {row.count / runs:6.1f} x {us * runs / row.count:8.2f} us  {row.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--contexts", default="512,2048,8192,32768")
    parser.add_argument("--prompts", default="2048,8192")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--kv-cache", default=CacheKind.LOSSLESS, choices=list(CacheKind))
    parser.add_argument("--memory-prompt", type=int, help="tokens of the prompt whose memory is measured")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",") if c]
    prompts = [int(p) for p in args.prompts.split(",") if p]

    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    note(f"CUDA alone: {(gpu_used() - torch.cuda.memory_reserved()) / GIB:.3f} GiB")
    begin = time.perf_counter()
    length = max(contexts + prompts) + 256
    model = Gemma4.from_gguf(args.file, device="cuda", max_seq_len=length, kv_cache=args.kv_cache)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - begin
    note(f"loaded in {load_s:.2f} s")
    host_bytes = anonymous_bytes() or 0
    packed = sum(p.nbytes for p in model.model.parameters())
    memory = measure_memory(model, args.memory_prompt)
    note_memory(memory)
    note(f"memory measured after {time.perf_counter() - begin:.0f} s")
    decode = time_decode(model, contexts, SamplingParams(temperature=0), args.steps)
    sampled = time_decode(model, contexts[:1], SamplingParams(), args.steps)
    filled = time_prefill(model, prompts)
    if args.profile:
        profile(model, 512)

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{model.config.name}: {packed / 1e9:.2f} GB packed, loaded in {load_s:.2f} s,", end=" ")
    print(f"{host_bytes / 1e9:.2f} GB of anonymous host memory then\n")
    print("what               tokens/s   ms/token  weights / copy bandwidth")
    for context, s in decode.items():
        print(f"decode  @{context:<8} {1 / s:10.1f} {1e3 * s:10.3f} {packed / s / bandwidth:12.0%}")
    for context, s in sampled.items():
        print(f"sampled @{context:<8} {1 / s:10.1f} {1e3 * s:10.3f}  (top-k 64, top-p 0.95)")
    for length, s in filled.items():
        print(f"prefill {length:<9} {length / s:10.0f} {1e3 * s / length:10.3f}")
    print(f"\n{'memory at context ' + format(memory['context'], ','):<31} planned GB  measured GB")
    for label, planned, measured in (
        ("tensors", "planned_allocated_bytes", "peak_allocated_bytes"),
        ("all of the GPU during a prompt", "planned_total_bytes", "prompt_gpu_bytes"),
        ("all of the GPU while decoding", "planned_total_bytes", "decode_gpu_bytes"),
        ("and during a prompt after that", "planned_total_bytes", "next_prompt_gpu_bytes"),
    ):
        share = memory[planned] / memory[measured] - 1
        print(f"{label:<31} {memory[planned] / 1e9:10.2f} {memory[measured] / 1e9:12.2f} {share:+8.1%}")
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "gemma4": __version__,
        "file": args.file.name,
        "copy_bytes_per_s": bandwidth,
        "weight_bytes": packed,
        "load_s": load_s,
        "host_anonymous_bytes": host_bytes,
        "decode_tokens_per_s": {c: 1 / s for c, s in decode.items()},
        "sampled_tokens_per_s": {c: 1 / s for c, s in sampled.items()},
        "prefill_tokens_per_s": {n: n / s for n, s in filled.items()},
        "kv_cache": model.kv_cache,
        "memory": memory,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
