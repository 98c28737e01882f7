"""Check and time TurboQuant attention on one GPU: python -m benchmarks.turboquant [--every-config]

Layers: a full layer of Gemma 4 31B (32 query and 4 KV heads of 512, values serve as keys in all but 128 dimensions),
one of E2B (8 and 1 heads of 512, two tensors) and one of Gemma 3 270M (4 and 1 of 256). First, outputs over
NaN-poisoned memory are compared with the torch reference: a wrong one ends the run. Then medians of CUDA graph replays;
decode rotates over caches of more than 300 MB together, so that none is found in L2. bytes: codes and scales read.
--every-config times each configuration at one context instead. The last lines are a short table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention import microseconds, positions
from gemma4.kernels import prefill_attention, tq4_decode, tq4_prefill
from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_rotation import launch_rotate_queries
from gemma4.kernels.tq4_sdpa import tq4_sdpa, tq4_sdpa_reference
from gemma4.kernels.tq4_write import tq4_write
from gemma4.kernels.turboquant import BITS

CHUNK = 2048
DECODE_CONTEXTS = (512, 2048, 8192, 32768, 126976)
PREFILL_CONTEXTS = (0, 6144, 30720, 124928)
ROTATED_BYTES = 300_000_000
TOLERANCE = 8e-3


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    turned: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def k_weight(self) -> Tensor | None:
        return torch.ones(self.head_dim, device="cuda") if self.turned < self.head_dim else None

    def cache(self, length: int, bits: int) -> TQ4Cache:
        """Random codes, scales near one, and a first key: what any cache looks like."""
        shape = (1, self.kv_heads, length)
        codes = (
            torch.randint(256, (*shape, dim * bits // 8), dtype=torch.uint8, device="cuda")
            for dim in (self.turned, self.head_dim)
        )
        scales = (torch.rand(shape, device="cuda") + 0.5 for _ in range(2))
        k_codes, v_codes = codes
        k_scale, v_scale = scales
        width = self.turned * (self.turned < self.head_dim) + self.head_dim
        return TQ4Cache(k_codes, k_scale, v_codes, v_scale, torch.randn(1, self.kv_heads, width, device="cuda"))

    def queries(self, tokens: int) -> Tensor:
        return torch.randn(1, self.q_heads, tokens, self.head_dim, device="cuda", dtype=torch.bfloat16)

    def nbytes(self, keys: int, bits: int) -> int:
        return keys * self.kv_heads * ((self.turned + self.head_dim) * bits // 8 + 8)

    def flop(self, context: int, tokens: int) -> int:
        keys = sum(context + t + 1 for t in range(tokens))
        return 4 * self.q_heads * keys * self.head_dim


LAYERS = (Layer("31B", 32, 4, 512, 128), Layer("E2B", 8, 1, 512, 512), Layer("270M", 4, 1, 256, 256))


def check(out: Tensor, expected: Tensor, what: str) -> None:
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    print(f"{what:40} relative error {error:.1e}", flush=True)
    if not error < TOLERANCE:
        raise SystemExit(f"{what}: expected less than {TOLERANCE:.0e}")


def check_layer(layer: Layer, bits: int) -> None:
    length = 3000
    cache = layer.cache(length, bits)
    torch.use_deterministic_algorithms(True)  # uninitialized memory is NaN
    for first, tokens in ((0, 1), (63, 1), (64, 1), (2900, 1), (2000, 2), (2000, 8), (0, 9), (1000, 300), (0, 700)):
        q, input_pos = layer.queries(tokens), positions(first, tokens)
        poisoned = tuple(x.clone() for x in cache)
        for scales in poisoned[1:4:2]:
            scales[:, :, first + tokens :] = torch.nan
        args = (layer.k_weight, input_pos, layer.scale)
        out = tq4_sdpa(q, *poisoned, *args)
        check(out, tq4_sdpa_reference(q, cache, *args), f"{layer.name} {bits} bits, {tokens} tokens after {first}")
        if not torch.equal(out, tq4_sdpa(q, *poisoned, *args)):
            raise SystemExit("two runs differ")
    torch.use_deterministic_algorithms(False)
    k, v = (torch.randn(1, layer.kv_heads, 700, layer.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    new = tuple(torch.zeros_like(x) for x in cache)
    on_host = tuple(torch.zeros_like(x, device="cpu") for x in cache)
    tq4_write(k, v, *new, positions(0, 700))
    tq4_write(k.cpu(), v.cpu(), *on_host, positions(0, 700).cpu())
    for found, right in zip(new, on_host, strict=True):
        if found.dtype == torch.uint8:
            wrong = float((found.cpu() != right).float().mean())
            if wrong > 1e-3:
                raise SystemExit(f"tq4_write: {wrong:.1%} of the codes differ")
        else:
            check(found.cpu(), right, f"{layer.name} {bits} bits, numbers of tq4_write")


def decode_us(layer: Layer, context: int, bits: int, call: Callable[..., object] = tq4_sdpa) -> float:
    nbytes = layer.nbytes(context, bits)
    q, input_pos = layer.queries(1), positions(context - 1, 1)
    caches = [layer.cache(context, bits) for _ in range(min(200, math.ceil(ROTATED_BYTES / nbytes) + 1))]
    weight = layer.k_weight
    return microseconds([partial(call, q, *cache, weight, input_pos, layer.scale) for cache in caches])


def prefill_us(layer: Layer, context: int, bits: int, call: Callable[..., object] = tq4_sdpa) -> float:
    cache, q, input_pos = layer.cache(context + CHUNK, bits), layer.queries(CHUNK), positions(context, CHUNK)
    return microseconds([partial(call, q, *cache, layer.k_weight, input_pos, layer.scale)])


def write_us(layer: Layer, tokens: int, bits: int) -> float:
    cache = layer.cache(4096, bits)
    k, v = (torch.randn(1, layer.kv_heads, tokens, layer.head_dim, device="cuda").bfloat16() for _ in range(2))
    return microseconds([partial(tq4_write, k, v, *cache, positions(1000, tokens))] * 8)


def every_config(layer: Layer, bits: int) -> None:
    """Each configuration that the device runs, decode at 32768 and prefill after 30720."""
    context = 32768
    for block_n in (32, 64, 128):
        for num_warps in (4, 8):
            for num_stages in (1, 2, 3):
                for programs in (1, 2):
                    config = tq4_decode.TQ4DecodeConfig(
                        8 if layer.q_heads // layer.kv_heads <= 8 else 16, block_n, num_warps, num_stages, programs
                    )
                    call = partial(_decode_with, layer, config)
                    report(f"decode {config}", partial(decode_us, layer, context, bits, call))
    for prefill_config in prefill_attention.CONFIGS:
        for keys in (4096, 8192, 16384):
            call = partial(_prefill_with, layer, prefill_config, keys)
            report(f"prefill {prefill_config}, slices of {keys}", partial(prefill_us, layer, 30720, bits, call))


def report(what: str, time: Callable[[], float]) -> None:
    try:
        print(f"{time():10.1f} us  {what}", flush=True)
    except (RuntimeError, ValueError) as error:  # a configuration that does not fit this device
        print(f"{'-':>10}     {what}: {str(error).splitlines()[0][:80]}", flush=True)


def _decode_with(layer: Layer, config: tq4_decode.TQ4DecodeConfig, q: Tensor, *rest: Tensor | float | None) -> None:
    *tensors, weight, input_pos, scale = rest
    cache = TQ4Cache(*tensors)
    rows = layer.q_heads // layer.kv_heads
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = tq4_decode.split_count(config, layer.kv_heads, rows, cache.room, multiprocessors)
    queries = launch_rotate_queries(q, weight, layer.turned)
    tq4_decode.tq4_decode_launch(queries, cache, input_pos, scale, torch.empty_like(q), config, splits)


def _prefill_with(
    layer: Layer, config: prefill_attention.PrefillConfig, keys: int, q: Tensor, *rest: Tensor | float | None
) -> None:
    shape = tq4_prefill.slice_shape(q, layer.kv_heads)._replace(keys=keys)
    tq4_prefill.tq4_prefill_launch(q, TQ4Cache(*rest[:5]), *rest[5:], config, shape)


def main() -> None:
    torch.manual_seed(0)
    if "--every-config" in sys.argv:
        every_config(LAYERS[0], 6)
        return
    for layer in LAYERS:
        for bits in BITS:
            check_layer(layer, bits)
    table: list[str] = []
    for layer in LAYERS:
        for bits in BITS:
            for context in DECODE_CONTEXTS:
                us = decode_us(layer, context, bits)
                rate = layer.nbytes(context, bits) / us / 1e6
                table.append(f"{layer.name:5} {bits} bits  decode  @{context:<7} {us:9.1f} us  {rate:6.3f} TB/s")
                print(table[-1], flush=True)
            for context in PREFILL_CONTEXTS if layer.name == "31B" else PREFILL_CONTEXTS[:2]:
                us = prefill_us(layer, context, bits)
                rate = layer.flop(context, CHUNK) / us / 1e6
                table.append(f"{layer.name:5} {bits} bits  prefill @{context:<7} {us:9.1f} us  {rate:6.1f} TFLOP/s")
                print(table[-1], flush=True)
            for tokens in (1, CHUNK):
                us = write_us(layer, tokens, bits)
                table.append(f"{layer.name:5} {bits} bits  write   T={tokens:<6} {us:9.1f} us")
    print(torch.cuda.get_device_name(), torch.__version__, *table, sep="\n")


if __name__ == "__main__":
    main()
