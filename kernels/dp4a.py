"""Four-way byte dot products for Triton kernels: `dp4a` on a GPU, plain integer arithmetic in the interpreter.

`dp4a` multiplies the four bytes of two 32-bit words pairwise and adds the products to an int32. The first
word holds weights, unsigned or signed; the second always holds signed activations. Every NVIDIA GPU since
compute capability 6.1 has it.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""Whether kernels run in Triton's interpreter, which cannot execute inline PTX."""


@triton.jit
def signed_byte(word, i: tl.constexpr):
    """Byte i of each int32 word, sign-extended."""
    return (word << (24 - 8 * i)) >> 24


@triton.jit
def dot4_unsigned(w, x, acc):
    """acc + sum over the four bytes of u8(w) * s8(x). All int32 of one shape."""
    if INTERPRETED:
        for i in tl.static_range(4):
            acc += ((w >> (8 * i)) & 0xFF) * signed_byte(x, i)
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def dot4_signed(w, x, acc):
    """acc + sum over the four bytes of s8(w) * s8(x). All int32 of one shape."""
    if INTERPRETED:
        for i in tl.static_range(4):
            acc += signed_byte(w, i) * signed_byte(x, i)
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc
