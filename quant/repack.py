"""Bit rearrangements between the blocks of a GGUF file and the planes the kernels read, each with its inverse.

Where file and plane hold the same bytes in the same order no function is needed (`Plane` copies them); the
five `BitOrder`s below are the rest. All work on `B` blocks at once with whole-word operations: no table, no
loop over blocks, the same code on every device. Bytes within a word are in little-endian order. Masks follow every
right shift, because torch shifts int32 arithmetically.

Source of the file layouts: ggml's `block_q*` structs, read through gguf-py's `quants.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["K_SCALES", "LEGACY_FIFTH_BITS", "Q5_K_FIFTH_BITS", "Q6_K_LOW_BITS", "Q6_K_TOP_BITS", "BitOrder"]


@dataclass(frozen=True, slots=True)
class BitOrder:
    """unpack: uint8 [B, bytes of one block's field] -> the plane's items [B, ...]. pack: its exact inverse."""

    unpack: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy, always: what is rearranged in place must not be the file's or the plane's memory."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _words(field: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """uint8 [B, bytes], any strides and alignment -> `dtype` [B, words], a copy."""
    return _copy(field).view(dtype)


def _bytes(words: Tensor) -> Tensor:
    """Whole words [B, ...] -> uint8 [B, bytes]."""
    return words.contiguous().view(torch.uint8).flatten(1)


def _unpack_k_scales(field: Tensor) -> Tensor:
    """uint8 [B, 12] -> uint8 [B, 4, 4]: per unit (scale of low group, of high group, min of low, of high)."""
    # One byte per group: six low bits of scales 0-3 and mins 0-3; their two top bits and `nibbles` hold 4-7.
    scales, mins, nibbles = _words(field).unbind(1)
    codes = torch.stack(
        (
            scales & 0x3F3F3F3F,
            nibbles & 0x0F0F0F0F | scales >> 2 & 0x30303030,
            mins & 0x3F3F3F3F,
            nibbles >> 4 & 0x0F0F0F0F | mins >> 2 & 0x30303030,
        ),
        dim=1,
    )
    pairs = torch.unflatten(codes.view(torch.int16), 1, (2, 4))  # [B, scale or min, unit], two groups in each
    return pairs.transpose(1, 2).contiguous().view(torch.uint8)


def _pack_k_scales(codes: Tensor) -> Tensor:
    """uint8 [B, 4, 4] -> uint8 [B, 12]."""
    pairs = torch.unflatten(codes.view(torch.int16).flatten(1), 1, (4, 2)).transpose(1, 2).contiguous()
    scales, scales_4_7, mins, mins_4_7 = pairs.view(torch.int32).flatten(1).unbind(1)
    nibbles = scales_4_7 & 0x0F0F0F0F | (mins_4_7 & 0x0F0F0F0F) << 4
    scales = scales | (scales_4_7 & 0x30303030) << 2
    mins = mins | (mins_4_7 & 0x30303030) << 2
    return _bytes(torch.stack((scales, mins, nibbles), dim=1))


def _unpack_q5_k_fifth_bits(field: Tensor) -> Tensor:
    """uint8 [B, 32], bit g of byte b for weight 32g + b -> int32 [B, 8], one word per chunk."""
    words = _transpose_pairs(torch.unflatten(_words(field), 1, (2, 4)))  # [B, chunk of a unit, unit]
    # In each byte, bit 2r + n (n = 0 for low nibbles, 1 for high) goes to 4n + r.
    _swap_bits(words, 0x22222222, 1)
    _swap_bits(words, 0x0C0C0C0C, 2)
    return words.transpose(1, 2).flatten(1)


def _pack_q5_k_fifth_bits(chunks: Tensor) -> Tensor:
    """int32 [B, 8] -> uint8 [B, 32]."""
    words = _copy(torch.unflatten(chunks, 1, (4, 2)).transpose(1, 2))
    _swap_bits(words, 0x0C0C0C0C, 2)
    _swap_bits(words, 0x22222222, 1)
    return _bytes(_transpose_pairs(words))


def _unpack_legacy_fifth_bits(field: Tensor) -> Tensor:
    """uint8 [B, 4], bit j for weight j of the block -> int32 [B, 1]."""
    # Bit 4s+i goes to 8i+s (s = r for low nibbles, r+4 for high): a 8x4 transpose, one swap per line.
    words = _words(field)
    for mask, shift in _TRANSPOSE_SWAPS:
        _swap_bits(words, mask, shift)
    return words


def _pack_legacy_fifth_bits(chunks: Tensor) -> Tensor:
    """int32 [B, 1] -> uint8 [B, 4]."""
    words = _copy(chunks)
    for mask, shift in reversed(_TRANSPOSE_SWAPS):
        _swap_bits(words, mask, shift)
    return _bytes(words)


def _swap_bits(words: Tensor, mask: int, shift: int) -> None:
    """In place: exchanges the bits under `mask` with those `shift` above (Hacker's Delight, section 2-20)."""
    changed = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
    words ^= changed
    words ^= changed.bitwise_left_shift_(shift)


_TRANSPOSE_SWAPS = (
    # Each exchanges two of the five index bits of a bit position, so that (s, i) becomes (i, s).
    (0x22222222, 1),
    (0x0A0A0A0A, 3),
    (0x00CC00CC, 6),
    (0x0000F0F0, 12),
)


def _swap_q6_k_low_bits(field: Tensor) -> Tensor:
    """uint8 [B, 128] -> uint8 [B, 128]: in a byte, nibbles of weights w and w+64 <-> of w and w+32. Its own inverse."""
    words = _words(field, torch.int64)
    first, second = torch.unflatten(words, 1, (2, 2, 4)).unbind(2)  # 32 bytes of each half
    _swap_between(first, second, 4, 0x0F0F0F0F0F0F0F0F)
    return _bytes(words)


def _unpack_q6_k_top_bits(field: Tensor) -> Tensor:
    """uint8 [B, 64], bits 2g of byte b of a half for weight 32g + b -> int32 [B, 8, 2]."""
    words = _transpose_pairs(torch.unflatten(_words(field), 1, (2, 2, 4)))  # [B, half, chunk of a unit, group]
    chunks = words.view(torch.int64).transpose(2, 3)  # [B, half, unit, chunk of a unit], (low, high) in each
    return torch.unflatten(chunks.contiguous().view(torch.int32).flatten(1), 1, (8, 2))


def _pack_q6_k_top_bits(chunks: Tensor) -> Tensor:
    """int32 [B, 8, 2] -> uint8 [B, 64]."""
    halves = torch.unflatten(chunks.view(torch.int64).flatten(1), 1, (2, 2, 2))
    return _bytes(_transpose_pairs(_copy(halves.transpose(2, 3)).view(torch.int32)))


def _transpose_pairs(words: Tensor) -> Tensor:
    """int32 [..., 4], in place: in each byte, bit pair p of word w <-> bit pair w of word p. Its own inverse."""
    first, second, third, fourth = words.unbind(-1)
    _swap_between(first, third, 4, 0x0F0F0F0F)
    _swap_between(second, fourth, 4, 0x0F0F0F0F)
    _swap_between(first, second, 2, 0x33333333)
    _swap_between(third, fourth, 2, 0x33333333)
    return words


def _swap_between(first: Tensor, second: Tensor, shift: int, mask: int) -> None:
    """In place: exchanges the bits of `second` under `mask` with those of `first` that stand `shift` above."""
    changed = (first >> shift).bitwise_xor_(second).bitwise_and_(mask)
    second ^= changed
    first ^= changed.bitwise_left_shift_(shift)


K_SCALES = BitOrder(_unpack_k_scales, _pack_k_scales)
Q5_K_FIFTH_BITS = BitOrder(_unpack_q5_k_fifth_bits, _pack_q5_k_fifth_bits)
LEGACY_FIFTH_BITS = BitOrder(_unpack_legacy_fifth_bits, _pack_legacy_fifth_bits)
Q6_K_LOW_BITS = BitOrder(_swap_q6_k_low_bits, _swap_q6_k_low_bits)
Q6_K_TOP_BITS = BitOrder(_unpack_q6_k_top_bits, _pack_q6_k_top_bits)
