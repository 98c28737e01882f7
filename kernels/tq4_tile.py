"""Tiles of TurboQuant codes inside a kernel: 4 or 6 bit codes in, float16 levels out, ready for a tensor core.

A level is u * ((u^2 + p)^2 + q), u = (2 * code + 1 - n) / n with n = 2^bits (`gemma4.kernels.turboquant`, which has the
layout; the gain is in the scale of the vector). Two codes at a time: their bits are put into the mantissas of a pair of
float16 of exponent 2^10, one multiply-add makes u of that exactly, three more instructions make the level. p and q come
as pairs of float16, bits in an int. Inline PTX does not run in Triton's interpreter, which takes the portable branch.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from gemma4.kernels.dp4a import INTERPRETED
from gemma4.kernels.turboquant import codebook


def curve_bits(dim: int, bits: int) -> tuple[int, int]:
    """p and q of a codebook, each as the bits of two equal float16."""
    book = codebook(dim, bits)
    return _half2(book.p), _half2(book.q)


def _half2(value: float) -> int:
    """The bits of two equal float16. No tensors, which would stand for unknown values while an operator is traced."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    return int(bits) * 0x10001


def _moved(source: str, left: int) -> str:
    """Leaves `source`, moved left (right where negative), in `s`."""
    return f"{'shl' if left > 0 else 'shr'}.b32 s, {source}, {abs(left)}; " if left else f"mov.b32 s, {source}; "


def _level(out: int, code: str, left: int, fine_left: int, place: int, bits: int) -> str:
    """PTX of one pair: nibbles of `code` and, with 6 bits, two bits of `f`, both moved, to bit `place` of each half."""
    coarse = 0xF << (place + bits - 4)
    text = _moved(code, left) + f"lop3.b32 t, s, {hex(coarse * 0x10001)}, 0x64006400, 0xEA; "
    if bits == 6:
        text += _moved("f", fine_left) + f"lop3.b32 t, s, {hex((3 << place) * 0x10001)}, t, 0xEA; "
    n = 2**bits
    factor = 2 / (n << place)
    text += f"mov.b32 a, {_half2(factor)}; mov.b32 b, {_half2((1 - n) / n - 1024 * factor)}; "
    text += "fma.rn.f16x2 u, t, a, b; fma.rn.f16x2 w, u, u, p; fma.rn.f16x2 w, w, w, q; "
    return text + f"mul.rn.f16x2 ${out}, u, w; "


def _body(bits: int) -> str:
    """PTX of the levels in four bytes of the first nibbles ($8), of the second ($9) and of the rest ($10)."""
    four = (("c", 4, 0, 4), ("d", 4, 0, 4), ("c", 0, 0, 4), ("d", 0, 0, 4))
    six = (("c", 4, 2, 2), ("d", 6, 0, 4), ("c", 0, 0, 2), ("d", 0, -4, 2))
    text = ""
    for pair, spread in enumerate(("0x4140", "0x4342")):  # bytes 0 and 1, then 2 and 3, each in half a register
        text += f"prmt.b32 c, $8, 0, {spread}; prmt.b32 d, $9, 0, {spread}; "
        if bits == 6:
            text += f"prmt.b32 f, $10, 0, {spread}; "
        for quarter, (code, left, fine_left, place) in enumerate(four if bits == 4 else six):
            text += _level(2 * quarter + pair, code, left, fine_left, place, bits)
    return text + "}"


_HEAD = tl.constexpr("{ .reg .b32 a, b, c, d, f, p, q, s, t, u, w; ")
_BODY_4 = tl.constexpr(_body(4))
_BODY_6 = tl.constexpr(_body(6))


@triton.jit
def _half(bits: tl.constexpr):
    """float16 [1] of the low 16 bits."""
    return tl.full((1,), bits & 0xFFFF, tl.int32).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def level(code, BITS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """float16 levels of int codes, in plain arithmetic."""
    n: tl.constexpr = 2**BITS
    u = ((2 * code + 1 - n).to(tl.float32) / n).to(tl.float16)
    w = u * u + _half(P)
    return u * (w * w + _half(Q))


@triton.jit
def load_quarters(rows, mask, D: tl.constexpr):
    """Quarters of float16 vectors [D] at the pointers `rows` [N, 1] or [1, N]: [N, D / 4] or [D / 4, N] each."""
    offs = tl.arange(0, D // 4)
    at = rows + (offs[:, None] if rows.shape[0] == 1 else offs[None, :])
    x0 = tl.load(at, mask=mask, other=0.0)
    x1 = tl.load(at + D // 4, mask=mask, other=0.0)
    x2 = tl.load(at + D // 2, mask=mask, other=0.0)
    x3 = tl.load(at + 3 * D // 4, mask=mask, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def load_levels(
    ptr,  # uint8, row 0 of the codes
    rows,  # [N] int64
    mask,  # [N]
    D: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    """Quarters 0 to 3, float16 [N, D / 4] each, of the vectors in `rows`; of masked ones, some level."""
    WIDTH: tl.constexpr = D // 4
    at = ptr + rows[:, None] * (D * BITS // 8) + tl.arange(0, WIDTH)[None, :]
    a = tl.load(at, mask=mask[:, None], other=0)
    b = tl.load(at + WIDTH, mask=mask[:, None], other=0)
    fine = a
    if BITS == 6:
        fine = tl.load(at + 2 * WIDTH, mask=mask[:, None], other=0)
    if INTERPRETED:
        a = a.to(tl.int32)
        b = b.to(tl.int32)
        codes = (a & 15, b & 15, a >> 4, b >> 4)
        if BITS == 6:
            fine = fine.to(tl.int32)
            codes = (
                codes[0] * 4 + (fine & 3),
                codes[1] * 4 + (fine >> 4 & 3),
                codes[2] * 4 + (fine >> 2 & 3),
                codes[3] * 4 + (fine >> 6),
            )
        x0 = level(codes[0], BITS, P, Q)
        x1 = level(codes[1], BITS, P, Q)
        x2 = level(codes[2], BITS, P, Q)
        x3 = level(codes[3], BITS, P, Q)
    else:
        # Called impure, or the compiler would decode a tile again for each use in another layout.
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            _HEAD + f"mov.b32 p, {P}; mov.b32 q, {Q}; " + (_BODY_4 if BITS == 4 else _BODY_6),
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [a, b, fine],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=False,
            pack=4,
        )
    return x0, x1, x2, x3
