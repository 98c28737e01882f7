"""Time the attention ops at the shapes of Gemma 4 31B on one GPU: python -m benchmarks.attention

Sliding layers: 32 query and 16 KV heads of 256, window 1024, ring of 1088. Full layers: 32 and 4 heads of 512, keys and
values as two tensors, or tied as rows of one, which is what the model uses. All bfloat16. Each time is the median over
CUDA graph replays. Decode rotates over caches of more than 300 MB together, so that none is found in L2; it is timed
with heads as its result, and with the int8 activations that a decode step wants. Every attention is compared with the
torch reference first: a wrong result ends the run. The last line of the output is one JSON document with every figure;
units are in the names.

With --sweep it times instead decode over tied rows with other tiles than the chosen one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from gemma4.kernels.activations import dequantize_activations
from gemma4.kernels.decode_attention import (
    DecodeConfig,
    decode_attention,
    decode_attention_quantize,
    decode_attention_reference,
    device_limits,
    masked_attention,
    slot_positions,
    split_count,
)
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache
from gemma4.kernels.split_merge import head_rows, merge_heads
from gemma4.kernels.tied_decode_attention import (
    tied_decode_attention,
    tied_decode_attention_quantize,
    tied_decode_attention_reference,
    tied_split_launch,
)
from gemma4.kernels.tied_prefill_attention import tied_prefill_attention
from gemma4.kernels.tied_rope_cache import (
    keys_and_values,
    natural_order,
    tied_norm_rope,
    tied_norm_rope_cache,
)
from gemma4.ring import ring_length

Q_HEADS = 32
CHUNK = 2048
DECODE_CONTEXTS = (512, 2048, 8192, 32768, 126976)
PREFILL_CONTEXTS = (0, 6144, 30720)
ROTATED_BYTES = 300_000_000
TOLERANCE = 8e-3


class Layer(Protocol):
    """One kind of layer with its ops. Its cache is a tuple of tensors."""

    @property
    def name(self) -> str: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def projected(self) -> int:
        """Numbers of a head and position that its cache is made from."""

    @property
    def columns(self) -> int:
        """Numbers of a head and position that its cache holds."""

    def cache(self, length: int) -> tuple[Tensor, ...]: ...
    def decode(self, q: Tensor, *cache_pos: Tensor) -> Tensor: ...
    def decode_quantize(self, q: Tensor, *cache_pos: Tensor) -> tuple[Tensor, ...]: ...
    def decode_reference(self, q: Tensor, *cache_pos: Tensor) -> Tensor: ...
    def prefill(self, q: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...], input_pos: Tensor) -> Tensor: ...
    def masked(self, q: Tensor, kv: tuple[Tensor, ...], input_pos: Tensor, key_pos: Tensor) -> Tensor: ...
    def rope(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Callable[[], object]: ...


@dataclass(frozen=True, slots=True)
class TwoTensors:
    """Keys and values apart."""

    name: str
    kv_heads: int
    head_dim: int
    window: int

    @property
    def projected(self) -> int:
        return 2 * self.head_dim

    @property
    def columns(self) -> int:
        return 2 * self.head_dim

    @property
    def how(self) -> tuple[float, int]:
        return self.head_dim**-0.5, self.window

    def cache(self, length: int) -> tuple[Tensor, ...]:
        shape = (1, self.kv_heads, length, self.head_dim)
        return random(*shape), random(*shape)

    def decode(self, q: Tensor, *cache_pos: Tensor) -> Tensor:
        out: Tensor = decode_attention(q, *cache_pos, *self.how)
        return out

    def decode_quantize(self, q: Tensor, *cache_pos: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = decode_attention_quantize(q, *cache_pos, *self.how)
        return out

    def decode_reference(self, q: Tensor, *cache_pos: Tensor) -> Tensor:
        k, v, input_pos = cache_pos
        return decode_attention_reference(q, k, v, input_pos, *self.how)

    def prefill(self, q: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...], input_pos: Tensor) -> Tensor:
        out: Tensor = prefill_attention(q, *new, *old, input_pos, *self.how)
        return out

    def masked(self, q: Tensor, kv: tuple[Tensor, ...], input_pos: Tensor, key_pos: Tensor) -> Tensor:
        k, v = kv
        return masked_attention(q, k, v, input_pos, key_pos, *self.how)

    def rope(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Callable[[], object]:
        weight, inv_freq = norm_and_frequencies(self.head_dim)
        args, rest = (q, k, v, weight, weight), (inv_freq, input_pos, 1e-6, True)
        if len(q) == 1:
            return partial(qk_norm_rope_cache, *args, *self.cache(2048), *rest)
        return partial(qk_norm_rope, *args, *rest)


@dataclass(frozen=True, slots=True)
class TiedRows:
    """Keys and values as rows of one tensor, a quarter of whose dimensions turn."""

    name: str
    kv_heads: int
    head_dim: int
    window: int = 0

    @property
    def rotated(self) -> int:
        return self.head_dim // 4

    @property
    def projected(self) -> int:
        return self.head_dim

    @property
    def columns(self) -> int:
        return self.head_dim + self.rotated

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def cache(self, length: int) -> tuple[Tensor, ...]:
        return (random(1, self.kv_heads, length, self.columns),)

    def decode(self, q: Tensor, *cache_pos: Tensor) -> Tensor:
        out: Tensor = tied_decode_attention(q, *cache_pos, self.scale)
        return out

    def decode_quantize(self, q: Tensor, *cache_pos: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = tied_decode_attention_quantize(q, *cache_pos, self.scale)
        return out

    def decode_reference(self, q: Tensor, *cache_pos: Tensor) -> Tensor:
        kv, input_pos = cache_pos
        return tied_decode_attention_reference(q, kv, input_pos, self.scale)

    def prefill(self, q: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...], input_pos: Tensor) -> Tensor:
        out: Tensor = tied_prefill_attention(q, *new, *old, input_pos, self.scale)
        return out

    def masked(self, q: Tensor, kv: tuple[Tensor, ...], input_pos: Tensor, key_pos: Tensor) -> Tensor:
        k, v = keys_and_values(kv[0], self.rotated)
        return natural_order(masked_attention(q, k, v, input_pos, key_pos, self.scale, 0), self.rotated)

    def rope(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Callable[[], object]:
        weight, inv_freq = norm_and_frequencies(self.head_dim)
        args, rest = (q, k, weight, weight), (inv_freq, input_pos, 1e-6)
        if len(q) == 1:
            return partial(tied_norm_rope_cache, *args, *self.cache(2048), *rest)
        return partial(tied_norm_rope, *args, *rest, self.rotated)


LAYERS: tuple[Layer, ...] = (
    TwoTensors("sliding", 16, 256, 1024),
    TwoTensors("full", 4, 512, 0),
    TiedRows("tied", 4, 512),
)


def seen(layer: Layer, position: int) -> int:
    """Keys that the token at `position` attends to."""
    return min(position + 1, layer.window) if layer.window else position + 1


def slots(layer: Layer, length: int) -> int:
    return ring_length(layer.window, 131072) if layer.window else length


def norm_and_frequencies(head_dim: int) -> tuple[Tensor, Tensor]:
    return torch.rand(head_dim, device="cuda"), torch.rand(head_dim // 2, device="cuda")


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
    nbytes = 2 * seen(layer, context - 1) * layer.kv_heads * layer.columns
    q, input_pos = random(1, Q_HEADS, 1, layer.head_dim), positions(context - 1, 1)
    caches = [layer.cache(slots(layer, context)) for _ in range(math.ceil(ROTATED_BYTES / nbytes) + 1)]
    expected = layer.decode_reference(q, *caches[0], input_pos)
    check(layer.decode(q, *caches[0], input_pos), expected, f"decode {layer.name}")
    rows = dequantize_activations(*layer.decode_quantize(q, *caches[0], input_pos)[:2])
    check(rows, head_rows(expected), f"decode and quantize {layer.name}")
    us = microseconds([partial(layer.decode, q, *cache, input_pos) for cache in caches])
    quantize_us = microseconds([partial(layer.decode_quantize, q, *cache, input_pos) for cache in caches])
    return {"us": us, "quantize_us": quantize_us, "kv_bytes": nbytes, "tb_per_s": nbytes / us / 1e6}


def time_prefill(layer: Layer, context: int) -> dict[str, float]:
    q, new = random(1, Q_HEADS, CHUNK, layer.head_dim), layer.cache(CHUNK)
    old, input_pos = layer.cache(slots(layer, context + CHUNK)), positions(context, CHUNK)
    call = partial(layer.prefill, q, new, old, input_pos)
    last = slice(CHUNK - 64, CHUNK)  # rows that see the whole chunk; the reference for all would not fit
    key_pos = torch.cat((slot_positions(input_pos[0] - 1, old[0].shape[2]), input_pos))
    both = tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
    expected = layer.masked(q[:, :, last], both, input_pos[last], key_pos)
    check(call()[:, :, last], expected, f"prefill {layer.name}")
    us = microseconds([call])
    flop = 4 * Q_HEADS * layer.head_dim * sum(seen(layer, context + t) for t in range(CHUNK))
    return {"us": us, "tflop": flop / 1e12, "tflop_per_s": flop / us / 1e6}


def time_rope(layer: Layer, tokens: int) -> dict[str, float]:
    sizes = [heads * layer.head_dim for heads in (Q_HEADS, layer.kv_heads, layer.kv_heads)]
    q, k, v = random(tokens, sum(sizes)).split(sizes, 1)
    us = microseconds([layer.rope(q, k, v, positions(1000, tokens))] * 8)
    moved = 2 * (2 * q.numel() + tokens * layer.kv_heads * (layer.projected + layer.columns))
    return {"us": us, "moved_bytes": moved, "tb_per_s": moved / us / 1e6}


def tied_decode_with(
    q: Tensor, kv: Tensor, input_pos: Tensor, scale: float, config: DecodeConfig, splits: int
) -> Tensor:
    return merge_heads(tied_split_launch(q, kv, input_pos, scale, config, splits), q)


def sweep() -> dict[str, dict[str, float]]:
    """Decode over tied rows with every configuration that runs on this device."""
    layer, results = TiedRows("tied", 4, 512), {}
    multiprocessors, shared_limit = device_limits(torch.device("cuda"))
    for context, tokens in product((512, 2048, 32768, 126976), (1, 4, 8)):
        q, input_pos = random(1, Q_HEADS, tokens, layer.head_dim), positions(context - tokens, tokens)
        nbytes = 2 * context * layer.kv_heads * layer.columns
        caches = [layer.cache(context)[0] for _ in range(math.ceil(ROTATED_BYTES / nbytes) + 1)]
        expected = layer.decode_reference(q, caches[0], input_pos)
        rows = Q_HEADS // layer.kv_heads * tokens
        for block_n, num_warps, num_stages in product((16, 32, 64), (4, 8), (2, 3, 4)):
            config = DecodeConfig(16 if rows <= 16 else 32, block_n, num_warps, num_stages, programs_per_sm=1)
            if config.shared_bytes(layer.head_dim, layer.columns, 2) > shared_limit:
                continue
            splits = split_count(config, layer.kv_heads, rows, context, multiprocessors)
            how = (input_pos, layer.scale, config, splits)
            name = f"tied-{context}-T{tokens}-R{config.block_r}-N{block_n}-W{num_warps}-S{num_stages}"
            check(tied_decode_with(q, caches[0], *how), expected, name)
            us = microseconds([partial(tied_decode_with, q, kv, *how) for kv in caches])
            results[name] = {"us": us, "tb_per_s": nbytes / us / 1e6}
    return results


def run() -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for layer in LAYERS:
        for tokens in (1, CHUNK):
            results[f"rope-{layer.name}-T{tokens}"] = time_rope(layer, tokens)
        for context in DECODE_CONTEXTS:
            results[f"decode-{layer.name}-{context}"] = time_decode(layer, context)
        for context in PREFILL_CONTEXTS:
            results[f"prefill-{layer.name}-{context}"] = time_prefill(layer, context)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tiles for decode over tied rows")
    torch.manual_seed(0)
    results = sweep() if parser.parse_args().sweep else run()
    for name, figures in results.items():
        print(f"{name:24}", *(f"{unit} {value:.4g}" for unit, value in figures.items()), sep="  ")
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
