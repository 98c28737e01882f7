"""Exact float32 decode of blocks as they stand in a file, for types whose numbers need no table.

Every `blocks` is uint8 [..., row_bytes], whole rows of whole blocks, and decodes to float32 [..., K]. Layouts and the
order of operations are those of `gguf.quants.dequantize` (gguf-py), or of ggml for Q8_K and Q1_0, which gguf-py lacks,
so results are bit-identical. Products have at most 24 significant bits and are exact but for Q8_K's; only Q2_K
subtracts. The functions are plain torch without data-dependent control flow: they run on any device and trace under
`torch.export`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "mxfp4_dequantize",
    "nvfp4_dequantize",
    "q1_0_dequantize",
    "q2_k_dequantize",
    "q3_k_dequantize",
    "q8_k_dequantize",
    "scale_groups",
    "split_blocks",
    "tq1_0_dequantize",
    "tq2_0_dequantize",
    "unpack_fields",
    "words",
]


def q2_k_dequantize(blocks: Tensor) -> Tensor:
    """w = (d * sc) * q - (dmin * m), with 4-bit sc and m of each group of 16 weights, and 2-bit q."""
    block = split_blocks(blocks, 84)
    codes, dm = block[..., :16], words(block[..., 80:84], torch.float16).float()
    scale, offset = dm[..., :1] * (codes & 15).float(), dm[..., 1:] * (codes >> 4).float()
    q = torch.unflatten(unpack_fields(block[..., 16:80], run=32, bits=2), -1, (16, 16))
    return (scale[..., None] * q.float() - offset[..., None]).flatten(-3)


def q3_k_dequantize(blocks: Tensor) -> Tensor:
    """w = (d * (sc - 32)) * (q - 4), with 6-bit sc of each group of 16 weights, and 3-bit q."""
    block = split_blocks(blocks, 110)
    low = unpack_fields(block[..., 96:104], run=8, bits=4)
    top = unpack_fields(block[..., 104:108], run=4, bits=2)
    scale = words(block[..., 108:110], torch.float16).float() * ((low | top << 4).to(torch.int8) - 32).float()
    q = unpack_fields(block[..., 32:96], run=32, bits=2) | unpack_fields(block[..., :32], run=32, bits=1) << 2
    return scale_groups(scale, q.to(torch.int8) - 4)


def q8_k_dequantize(blocks: Tensor) -> Tensor:
    """w = d * q, with float32 d and 8-bit q. The sums of groups of q that follow serve dot products."""
    block = split_blocks(blocks, 292)
    return scale_groups(words(block[..., :4], torch.float32), block[..., 4:260].view(torch.int8))


def q1_0_dequantize(blocks: Tensor) -> Tensor:
    """w = d or -d, by a bit."""
    block = split_blocks(blocks, 18)
    q = 2 * unpack_fields(block[..., 2:18], run=1, bits=1).to(torch.int8) - 1
    return scale_groups(words(block[..., :2], torch.float16).float(), q)


def tq1_0_dequantize(blocks: Tensor) -> Tensor:
    """w = d * (q - 1), with q the base-3 digits of a byte read as a fraction: five of a byte, four of the last four."""
    block = split_blocks(blocks, 54)
    fields = ((block[..., :32], 5), (block[..., 32:48], 5), (block[..., 48:52], 4))
    fractions = torch.cat([_shift_base_3(field, digits) for field, digits in fields], dim=-1)
    q = (fractions.to(torch.int16) * 3 >> 8) - 1
    return scale_groups(words(block[..., 52:54], torch.float16).float(), q)


def tq2_0_dequantize(blocks: Tensor) -> Tensor:
    """w = d * (q - 1), with 2-bit q."""
    block = split_blocks(blocks, 66)
    q = unpack_fields(block[..., :64], run=32, bits=2).to(torch.int8) - 1
    return scale_groups(words(block[..., 64:66], torch.float16).float(), q)


def mxfp4_dequantize(blocks: Tensor) -> Tensor:
    """w = 2^(e - 128) * q, with the 8-bit exponent e of 32 weights, and q twice an E2M1 number."""
    block = split_blocks(blocks, 17)
    e = block[..., :1].to(torch.int32)
    # The powers of e = 0 and 1 are subnormal float32.
    scale = torch.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).view(torch.float32)
    return scale_groups(scale, _doubled_e2m1(unpack_fields(block[..., 1:17], run=16, bits=4)))


def nvfp4_dequantize(blocks: Tensor) -> Tensor:
    """w = (s / 2) * q, with an unsigned E4M3 s of each group of 16 weights, and q twice an E2M1 number.

    The scale of the whole tensor, which such files store apart, is not applied.
    """
    block = split_blocks(blocks, 36)
    s = block[..., :4].to(torch.int32)
    exponent, mantissa = s >> 3 & 15, s & 7
    normal = ((exponent + 119) << 23 | mantissa << 20).view(torch.float32)
    scale = torch.where(exponent == 0, mantissa.float() * 2**-10, normal)
    scale = torch.where(s == 0x7F, 0.0, scale)  # the code of NaN stands for zero
    return scale_groups(scale, _doubled_e2m1(unpack_fields(block[..., 4:36], run=8, bits=4)))


def split_blocks(blocks: Tensor, type_size: int) -> Tensor:
    """uint8 [..., row_bytes] -> [..., blocks in a row, type_size]."""
    return torch.unflatten(blocks, -1, (-1, type_size))


def words(field: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [..., bytes], of any alignment -> little-endian numbers of `dtype` [..., bytes / size]."""
    return field.clone(memory_format=torch.contiguous_format).view(dtype)


def unpack_fields(packed: Tensor, *, run: int, bits: int) -> Tensor:
    """uint8 [..., n] -> uint8 [..., n * 8 / bits]: of each `run` bytes all lowest fields, then all next fields, ..."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    runs = torch.unflatten(packed, -1, (-1, 1, run))
    return (runs >> shifts[:, None] & (1 << bits) - 1).flatten(-3)


def scale_groups(scale: Tensor, q: Tensor) -> Tensor:
    """scale: float32 [..., B, G]. q: any dtype [..., B, weights]. Returns float32 [..., B * weights]."""
    groups = torch.unflatten(q, -1, (scale.shape[-1], -1))
    return (scale[..., None] * groups.float()).flatten(-3)


def _doubled_e2m1(code: Tensor) -> Tensor:
    """4-bit codes -> int8, twice the value: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives; zero has no sign."""
    exponent, mantissa = (code >> 1 & 3).to(torch.int8), (code & 1).to(torch.int8)
    magnitude = (mantissa + 2 * exponent.clamp(max=1)) << (exponent - 1).clamp(min=0)
    return magnitude * (1 - 2 * (code >> 3).to(torch.int8))


def _shift_base_3(packed: Tensor, digits: int) -> Tensor:
    """uint8 [..., n] -> uint8 [..., digits * n]: all bytes, then all times 3, ...; what exceeds a byte is dropped."""
    return torch.cat([packed * 3**place for place in range(digits)], dim=-1)
