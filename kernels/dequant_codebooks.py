"""Exact float32 decode of blocks as they stand in a file, for types whose numbers index a table of the format.

Every `blocks` is uint8 [..., row_bytes], whole rows of whole blocks, and decodes to float32 [..., K]. `codebook` is
int8 [entries, weights of one entry], on the device of `blocks`. Layouts and arithmetic are those of
`gguf.quants.dequantize` (gguf-py); every product has at most 24 significant bits, so results are bit-identical. The
functions are plain torch without data-dependent control flow: they run on any device and trace under `torch.export`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4.kernels.dequant_blocks import scale_groups, split_blocks, unpack_fields, words

__all__ = [
    "iq1_m_dequantize",
    "iq1_s_dequantize",
    "iq2_s_dequantize",
    "iq2_xs_dequantize",
    "iq2_xxs_dequantize",
    "iq3_s_dequantize",
    "iq3_xxs_dequantize",
    "iq4_nl_dequantize",
    "iq4_xs_dequantize",
]

_DELTA = 0.125
"""What IQ1 types add to or subtract from the entries of their codebook."""


def iq4_nl_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * codebook[q], with 4-bit q. codebook: [16, 1]."""
    block = split_blocks(blocks, 18)
    q = _look_up(codebook, unpack_fields(block[..., 2:18], run=16, bits=4))
    return scale_groups(_float16(block[..., :2]), q)


def iq4_xs_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = (d * (sc - 32)) * codebook[q], with 6-bit sc of each group of 32 weights, and 4-bit q. codebook: [16, 1]."""
    block = split_blocks(blocks, 136)
    low, top = unpack_fields(block[..., 4:8], run=1, bits=4), unpack_fields(block[..., 2:4], run=1, bits=2)
    scale = _float16(block[..., :2]) * ((low | top << 4).to(torch.int8) - 32).float()
    return scale_groups(scale, _look_up(codebook, unpack_fields(block[..., 8:136], run=16, bits=4)))


def iq3_xxs_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (sc + 0.5) / 2 * codebook[q] * sign, with sc of each group of 32 weights. codebook: [256, 4]."""
    block = split_blocks(blocks, 98)
    codes, signs = _scales_and_signs(words(block[..., 66:98], torch.int32)[..., None])
    scale = _float16(block[..., :2]) * (codes.flatten(-2).float() + 0.5) * 0.5
    return scale_groups(scale, _look_up(codebook, block[..., 2:66]) * signs.flatten(-2))


def iq3_s_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (2 * sc + 1) * codebook[q] * sign, with 9-bit q, and sc of each group of 32. codebook: [512, 4]."""
    block = split_blocks(blocks, 110)
    scale = _float16(block[..., :2]) * (2 * unpack_fields(block[..., 106:110], run=1, bits=4) + 1).float()
    q = _join(block[..., 2:66], unpack_fields(block[..., 66:74], run=1, bits=1))
    return scale_groups(scale, _look_up(codebook, q) * _signs(block[..., 74:106]))


def iq2_xxs_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (sc + 0.5) / 4 * codebook[q] * sign, with sc of each group of 32 weights. codebook: [256, 8]."""
    block = split_blocks(blocks, 66)
    groups = torch.unflatten(block[..., 2:66], -1, (8, 8))
    codes, signs = _scales_and_signs(words(groups[..., 4:8], torch.int32))
    scale = _float16(block[..., :2]) * (codes.flatten(-2).float() + 0.5) * 0.25
    return scale_groups(scale, (_look_up(codebook, groups[..., :4]) * signs).flatten(-2))


def iq2_xs_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (sc + 0.5) / 4 * codebook[q] * sign, with 9-bit q, and sc of each group of 16. codebook: [512, 8]."""
    block = split_blocks(blocks, 74)
    scale = _float16(block[..., :2]) * (unpack_fields(block[..., 66:74], run=1, bits=4).float() + 0.5) * 0.25
    q = words(block[..., 2:66], torch.int16).to(torch.int32)
    return scale_groups(scale, _look_up(codebook, q & 511) * _even_signs(q >> 9 & 127))


def iq2_s_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (sc + 0.5) / 4 * codebook[q] * sign, with 10-bit q, and sc of each group of 16. codebook: [1024, 8]."""
    block = split_blocks(blocks, 82)
    scale = _float16(block[..., :2]) * (unpack_fields(block[..., 74:82], run=1, bits=4).float() + 0.5) * 0.25
    q = _join(block[..., 2:34], unpack_fields(block[..., 66:74], run=1, bits=2))
    return scale_groups(scale, _look_up(codebook, q) * _signs(block[..., 34:66]))


def iq1_s_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (2 * sc + 1) * (codebook[q] +- 0.125), with sc and the sign of each group of 32. codebook: [2048, 8]."""
    block = split_blocks(blocks, 50)
    qh = words(block[..., 34:50], torch.int16).to(torch.int32)
    scale = _float16(block[..., :2]) * (2 * (qh >> 12 & 7) + 1).float()
    delta = torch.where(qh < 0, -_DELTA, _DELTA)
    q = torch.unflatten(_look_up(codebook, _join(block[..., 2:34], _three_bits(qh))), -1, (8, 32))
    return scale_groups(scale, (q + delta[..., None]).flatten(-2))


def iq1_m_dequantize(blocks: Tensor, codebook: Tensor) -> Tensor:
    """w = d * (2 * sc + 1) * (codebook[q] +- 0.125), with sc of each group of 16, signs of 8. codebook: [2048, 8]."""
    block = split_blocks(blocks, 56)
    packed = words(block[..., 48:56], torch.int16).to(torch.int32)
    # The bits of d are the top four of each of the four words of scales.
    quarters = (packed >> 12 & 15) << torch.arange(0, 16, 4, dtype=torch.int32, device=blocks.device)
    d = quarters.sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    scale = d * (2 * _three_bits(packed) + 1).float()
    qh = unpack_fields(block[..., 32:48], run=1, bits=4)
    delta = torch.where(qh > 7, -_DELTA, _DELTA)
    q = torch.unflatten(_look_up(codebook, _join(block[..., :32], qh & 7)), -1, (32, 8))
    return scale_groups(scale, (q + delta[..., None]).flatten(-2))


def _float16(field: Tensor) -> Tensor:
    """uint8 [..., 2] -> float32 [..., 1]."""
    return words(field, torch.float16).float()


def _look_up(codebook: Tensor, q: Tensor) -> Tensor:
    """codebook: int8 [entries, size]. q: integers [..., n]. Returns int8 [..., n * size]."""
    entries = torch.index_select(codebook, 0, q.to(torch.int32).flatten())
    return entries.view(*q.shape, codebook.shape[1]).flatten(-2)


def _join(low: Tensor, high: Tensor) -> Tensor:
    """The low eight bits, and those above, of indices: two [..., n] -> int32 [..., n]."""
    return low.to(torch.int32) | high.to(torch.int32) << 8


def _three_bits(packed: Tensor) -> Tensor:
    """int32 [..., n] -> int32 [..., 4 * n]: the four lowest fields of three bits, lowest first."""
    shifts = torch.arange(0, 12, 3, dtype=torch.int32, device=packed.device)
    return (packed[..., None] >> shifts & 7).flatten(-2)


def _scales_and_signs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [..., 1] -> the top four bits [..., 1], and int8 [..., 32], the signs that the 28 bits below stand for."""
    shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=packed.device)
    return packed >> 28 & 15, _even_signs(packed >> shifts & 127)


def _even_signs(seven: Tensor) -> Tensor:
    """int32 [..., n], seven signs in each -> int8 [..., 8 * n]: the eighth makes the number of negatives even."""
    parity = seven ^ seven >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    return _signs((seven | parity << 7).to(torch.uint8))


def _signs(packed: Tensor) -> Tensor:
    """uint8 [..., n], a bit set for each negative -> int8 [..., 8 * n], 1 or -1."""
    return 1 - 2 * unpack_fields(packed, run=1, bits=1).to(torch.int8)
