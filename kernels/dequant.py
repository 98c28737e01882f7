"""Exact float32 decode of packed weights, from planes: one function per GGML type.

Every plane is [N, ...] row-major; the planes of a type and their nibble orders are documented on the
containers in `gemma4.quant.formats`. A leading dimension N may be any number of dimensions, so rows
gathered by token ids [B, T] decode to [B, T, K]. `K` is the number of weights in a row.

Each function multiplies and adds in the order of `gguf.quants.dequantize` (gguf-py), so its result is
bit-identical: float16 scales are widened exactly, subnormal and negative ones included. A product has at most
23 significant bits and is exact; only the last subtraction or addition rounds, so a compiler that fuses it with
the product changes nothing. The functions are plain torch without data-dependent control flow: they run on any
device and trace under `torch.export`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "dense_dequantize",
    "q4_0_dequantize",
    "q4_1_dequantize",
    "q4_k_dequantize",
    "q5_0_dequantize",
    "q5_1_dequantize",
    "q5_k_dequantize",
    "q6_k_dequantize",
    "q8_0_dequantize",
]

K_QUANT_GROUP = 32
"""Bytes of a K-quant unit of 64 weights: low nibbles are its first 32 weights, high nibbles its last 32."""
LEGACY_GROUP = 16
"""Bytes of a legacy chunk of 32 weights: low nibbles are its first 16 weights, high nibbles its last 16."""


def q4_k_dequantize(qs: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """w = (d * sc) * q - (dmin * m).

    qs: uint8 [N, K/2]. codes: uint8 [N, K/64, 4]. dm: float16 [N, K/256, 2]. Returns float32 [N, K].
    """
    return _scale_and_min(_nibbles(qs, K_QUANT_GROUP), codes, dm)


def q5_k_dequantize(qs: Tensor, qh: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """w = (d * sc) * q - (dmin * m).

    qs: uint8 [N, K/2]. qh: int32 [N, K/32]. codes: uint8 [N, K/64, 4]. dm: float16 [N, K/256, 2].
    Returns float32 [N, K].
    """
    return _scale_and_min(_nibbles(qs, K_QUANT_GROUP) | _fifth_bits(qh, K_QUANT_GROUP), codes, dm)


def q6_k_dequantize(qs: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """w = (d * sc) * (q - 32).

    qs: uint8 [N, K/2]. qh: int32 [N, K/32, 2]. scales: int8 [N, K/16]. d: float16 [N, K/256].
    Returns float32 [N, K].
    """
    field = torch.arange(4, dtype=torch.int32, device=qh.device)
    shifts = (8 * field + 2 * field[:, None]).flatten()
    top = (qh[..., None] >> shifts) & 3  # [N, K/32, 2, 16]
    top = torch.unflatten(top, -3, (-1, 2)).transpose(-3, -2).flatten(-2)  # [N, K/64, 2, 32]
    q = (_nibbles(qs, K_QUANT_GROUP) | top << 4) - 32
    scale = d.float()[..., None] * _split(scales, 16).float()  # [N, K/256, 16]
    return (scale.flatten(-2)[..., None] * _split(q.flatten(-3), 16).float()).flatten(-2)


def q8_0_dequantize(qs: Tensor, d: Tensor) -> Tensor:
    """w = q * d. qs: int8 [N, K]. d: float16 [N, K/32]. Returns float32 [N, K]."""
    return (_split(qs, 32).float() * d.float()[..., None]).flatten(-2)


def q5_0_dequantize(qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    """w = d * (q - 16).

    qs: uint8 [N, K/2]. qh: int32 [N, K/32]. d: float16 [N, K/32]. Returns float32 [N, K].
    """
    q = (_nibbles(qs, LEGACY_GROUP) | _fifth_bits(qh, LEGACY_GROUP)) - 16
    return (d.float()[..., None, None] * q.float()).flatten(-3)


def q5_1_dequantize(qs: Tensor, qh: Tensor, dm: Tensor) -> Tensor:
    """w = d * q + m.

    qs: uint8 [N, K/2]. qh: int32 [N, K/32]. dm: float16 [N, K/32, 2]. Returns float32 [N, K].
    """
    return _scale_and_offset(_nibbles(qs, LEGACY_GROUP) | _fifth_bits(qh, LEGACY_GROUP), dm)


def q4_0_dequantize(qs: Tensor, d: Tensor) -> Tensor:
    """w = d * (q - 8). qs: uint8 [N, K/2]. d: float16 [N, K/32]. Returns float32 [N, K]."""
    q = _nibbles(qs, LEGACY_GROUP).to(torch.int8) - 8
    return (d.float()[..., None, None] * q.float()).flatten(-3)


def q4_1_dequantize(qs: Tensor, dm: Tensor) -> Tensor:
    """w = d * q + m. qs: uint8 [N, K/2]. dm: float16 [N, K/32, 2]. Returns float32 [N, K]."""
    return _scale_and_offset(_nibbles(qs, LEGACY_GROUP), dm)


def dense_dequantize(weight: Tensor) -> Tensor:
    """weight: float32, float16 or bfloat16 [N, K]. Returns float32 [N, K], never an alias of `weight`."""
    return weight.to(torch.float32, copy=True)


def _split(tensor: Tensor, size: int) -> Tensor:
    """[..., X] -> [..., X / size, size]."""
    return torch.unflatten(tensor, -1, (-1, size))


def _nibbles(qs: Tensor, group: int) -> Tensor:
    """uint8 [N, K/2] -> uint8 [N, K/(2*group), 2, group], in the order of the weights."""
    packed = _split(qs, group)
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _fifth_bits(qh: Tensor, group: int) -> Tensor:
    """int32 [N, K/32] -> int32 [N, K/(2*group), 2, group], each 0 or 16, in the order of the weights."""
    field = torch.arange(4, dtype=torch.int32, device=qh.device)
    shifts = (8 * field + field[:, None]).flatten()  # of byte 4r+i: 8i+r
    words = qh[..., None]
    low = _split(((words >> shifts) & 1).flatten(-2), group)
    high = _split(((words >> (shifts + 4)) & 1).flatten(-2), group)
    return torch.stack((low, high), dim=-2) << 4


def _scale_and_min(q: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """q: [N, K/64, 2, 32]. codes: uint8 [N, K/64, 4]. dm: float16 [N, K/256, 2]. Returns float32 [N, K]."""
    # Unit codes as [N, K/256, 4, 2, 2], the last two dimensions (scale, min) and (low group, high group).
    units = torch.unflatten(_split(codes, 2), -3, (-1, 4)).float()
    factors = (dm.float()[..., None, :, None] * units).flatten(-4, -3)
    scale, offset = factors[..., 0, :, None], factors[..., 1, :, None]
    return (scale * q.float() - offset).flatten(-3)


def _scale_and_offset(q: Tensor, dm: Tensor) -> Tensor:
    """q: [N, K/32, 2, 16]. dm: float16 [N, K/32, 2]. Returns float32 [N, K]."""
    scale, offset = dm.float()[..., None, None].unbind(-3)
    return (scale * q.float() + offset).flatten(-3)
