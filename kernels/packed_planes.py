"""The planes of each packed weight format, as data: names, dtypes, shapes and the exact float32 decode.

A weight [N, K] is stored as a few contiguous tensors ("planes"), each with N first. Every packed op takes
its planes in the order listed here. The bit layouts are documented on the containers in
`gemma4.quant.formats`; `gemma4.kernels.dequant` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gemma4.kernels import dequant


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor [N, K // weights, *trailing] of a packed weight."""

    name: str
    dtype: torch.dtype
    weights: int
    trailing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """A packed format: K is a multiple of `block`; `dequantize(*planes)` gives float32 [N, K] exactly."""

    name: str
    block: int
    planes: tuple[Plane, ...]
    dequantize: Callable[..., Tensor]

    @property
    def unit(self) -> int:
        """Weights that a thread of a matvec takes at a time."""
        return 64 if self.block == 256 else 32

    @property
    def unit_bytes(self) -> int:
        """Bytes of the planes that hold a unit, or part of it."""
        return sum(
            max(1, self.unit // plane.weights) * plane.dtype.itemsize * prod(plane.trailing) for plane in self.planes
        )


_NIBBLES = Plane("qs", torch.uint8, 2)
_FIFTH_BITS = Plane("qh", torch.int32, 32)
_CODES = Plane("codes", torch.uint8, 64, (4,))
_SUPERBLOCK_PAIR = Plane("dm", torch.float16, 256, (2,))
_SCALE = Plane("d", torch.float16, 32)
_SCALE_PAIR = Plane("dm", torch.float16, 32, (2,))

PACKED_FORMATS: dict[str, PackedFormat] = {
    f.name: f
    for f in (
        PackedFormat("q4_k", 256, (_NIBBLES, _CODES, _SUPERBLOCK_PAIR), dequant.q4_k_dequantize),
        PackedFormat("q5_k", 256, (_NIBBLES, _FIFTH_BITS, _CODES, _SUPERBLOCK_PAIR), dequant.q5_k_dequantize),
        PackedFormat(
            "q6_k",
            256,
            (
                _NIBBLES,
                Plane("qh", torch.int32, 32, (2,)),
                Plane("scales", torch.int8, 16),
                Plane("d", torch.float16, 256),
            ),
            dequant.q6_k_dequantize,
        ),
        PackedFormat("q8_0", 32, (Plane("qs", torch.int8, 1), _SCALE), dequant.q8_0_dequantize),
        PackedFormat("q5_0", 32, (_NIBBLES, _FIFTH_BITS, _SCALE), dequant.q5_0_dequantize),
        PackedFormat("q5_1", 32, (_NIBBLES, _FIFTH_BITS, _SCALE_PAIR), dequant.q5_1_dequantize),
        PackedFormat("q4_0", 32, (_NIBBLES, _SCALE), dequant.q4_0_dequantize),
        PackedFormat("q4_1", 32, (_NIBBLES, _SCALE_PAIR), dequant.q4_1_dequantize),
    )
}


def check_planes(fmt: PackedFormat, planes: Sequence[Tensor]) -> tuple[int, int]:
    """Return (N, K) of a packed weight. Raises ValueError naming the plane that is not as `fmt` says."""
    first = planes[0]
    if first.dim() != 2:
        raise ValueError(f"{fmt.name}: {fmt.planes[0].name} must be [N, K/...], got {list(first.shape)}")
    n, k = first.shape[0], first.shape[1] * fmt.planes[0].weights
    if k == 0 or k % fmt.block != 0:
        raise ValueError(f"{fmt.name}: K must be a positive multiple of {fmt.block}, got {k}")
    for spec, plane in zip(fmt.planes, planes, strict=True):
        expected = (n, k // spec.weights, *spec.trailing)
        if tuple(plane.shape) != expected:
            raise ValueError(f"{fmt.name}: {spec.name} must have shape {list(expected)}, got {list(plane.shape)}")
        if plane.dtype != spec.dtype:
            raise ValueError(f"{fmt.name}: {spec.name} must be {spec.dtype}, got {plane.dtype}")
        if not plane.is_contiguous():
            raise ValueError(f"{fmt.name}: {spec.name} must be contiguous, got strides {plane.stride()}")
        if plane.device != first.device:
            raise ValueError(f"{fmt.name}: {spec.name} is on {plane.device}, qs on {first.device}")
    return n, k
