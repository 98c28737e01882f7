"""Time the attention ops at the shapes of Gemma 4 31B on one GPU: python -m benchmarks.attention

Sliding layers: 32 query and 16 KV heads of 256, window 1024, ring of 2048. Full layers: 32 and 4 heads of 512. All
bfloat16. Each time is the median over CUDA graph replays. Decode rotates over caches of more than 300 MB together, so
that none is found in L2. Every attention is compared with the torch reference first: a wrong result ends the run.
The last line of the output is one JSON document with every figure; units are in the names.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gemma4.kernels.decode_attention import (
    decode_attention,
    decode_attention_reference,
    masked_attention,
    slot_positions,
)
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache

Q_HEADS = 32
CHUNK = 2048
DECODE_CONTEXTS = (512, 2048, 8192, 32768, 126976)
PREFILL_CONTEXTS = (0, 6144, 30720)
ROTATED_BYTES = 300_000_000
TOLERANCE = 8e-3


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    kv_heads: int
    head_dim: int
    window: int

    def cache(self, length: int) -> tuple[Tensor, Tensor]:
        shape = (1, self.kv_heads, 2 * self.window if self.window else length, self.head_dim)
        return random(*shape), random(*shape)

    def seen(self, position: int) -> int:
        """Keys that the token at `position` attends to."""
        return min(position + 1, self.window) if self.window else position + 1


LAYERS = (Layer("sliding", 16, 256, 1024), Layer("full", 4, 512, 0))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def positions(first: int, tokens: int) -> Tensor:
    return torch.arange(first, first + tokens, device="cuda")


def check(out: Tensor, expected: Tensor, what: str) -> None:
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    if not error < TOLERANCE:
        raise SystemExit(f"{what}: relative error {error:.2e}, expected less than {TOLERANCE:.0e}")


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, all calls replayed in turn as one CUDA graph."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(12):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[2:])


def time_decode(layer: Layer, context: int) -> dict[str, float]:
    keys = layer.seen(context - 1)
    nbytes = 2 * 2 * keys * layer.kv_heads * layer.head_dim
    q, input_pos = random(1, Q_HEADS, 1, layer.head_dim), positions(context - 1, 1)
    caches = [layer.cache(context) for _ in range(math.ceil(ROTATED_BYTES / nbytes) + 1)]
    scale = layer.head_dim**-0.5
    out = decode_attention(q, *caches[0], input_pos, scale, layer.window)
    check(out, decode_attention_reference(q, *caches[0], input_pos, scale, layer.window), f"decode {layer.name}")
    us = microseconds([partial(decode_attention, q, k, v, input_pos, scale, layer.window) for k, v in caches])
    return {"us": us, "kv_bytes": nbytes, "tb_per_s": nbytes / us / 1e6}


def time_prefill(layer: Layer, context: int) -> dict[str, float]:
    q, k, v = (random(1, heads, CHUNK, layer.head_dim) for heads in (Q_HEADS, layer.kv_heads, layer.kv_heads))
    caches, input_pos, scale = layer.cache(context + CHUNK), positions(context, CHUNK), layer.head_dim**-0.5
    call = partial(prefill_attention, q, k, v, *caches, input_pos, scale, layer.window)
    last = slice(CHUNK - 64, CHUNK)  # rows that see the whole chunk; the reference for all would not fit
    key_pos = torch.cat((slot_positions(input_pos[0] - 1, caches[0].shape[2]), input_pos))
    keys, values = (torch.cat((cache, new), 2) for cache, new in zip(caches, (k, v), strict=True))
    expected = masked_attention(q[:, :, last], keys, values, input_pos[last], key_pos, scale, layer.window)
    check(call()[:, :, last], expected, f"prefill {layer.name}")
    us = microseconds([call])
    flop = 4 * Q_HEADS * layer.head_dim * sum(layer.seen(context + t) for t in range(CHUNK))
    return {"us": us, "tflop": flop / 1e12, "tflop_per_s": flop / us / 1e6}


def time_rope(layer: Layer, tokens: int) -> dict[str, float]:
    dim = layer.head_dim
    qkv, input_pos = random(tokens, (Q_HEADS + 2 * layer.kv_heads) * dim), positions(1000, tokens)
    q, k, v = qkv.split([Q_HEADS * dim, layer.kv_heads * dim, layer.kv_heads * dim], 1)
    weight, inv_freq = torch.rand(dim, device="cuda"), torch.rand(dim // 2, device="cuda")
    caches = layer.cache(2048)
    if tokens == 1:
        call = partial(qk_norm_rope_cache, q, k, v, weight, weight, *caches, inv_freq, input_pos, eps=1e-6, v_norm=True)
    else:
        call = partial(qk_norm_rope, q, k, v, weight, weight, inv_freq, input_pos, eps=1e-6, v_norm=True)
    us = microseconds([call] * 8)
    return {"us": us, "moved_bytes": 2 * qkv.nbytes, "tb_per_s": 2 * qkv.nbytes / us / 1e6}


def main() -> None:
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}
    for layer in LAYERS:
        for tokens in (1, CHUNK):
            results[f"rope-{layer.name}-T{tokens}"] = time_rope(layer, tokens)
        for context in DECODE_CONTEXTS:
            results[f"decode-{layer.name}-{context}"] = time_decode(layer, context)
        for context in PREFILL_CONTEXTS:
            results[f"prefill-{layer.name}-{context}"] = time_prefill(layer, context)
    for name, figures in results.items():
        print(f"{name:24}", *(f"{unit} {value:.4g}" for unit, value in figures.items()), sep="  ")
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
