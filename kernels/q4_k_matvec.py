"""Q4_K matvec: y[m, n] = sum_k x[m, k] * W[n, k] with W = (d * sc) * q - (dmin * mn), read packed.

x comes as int8 planes from `gemma4::quantize_activations`; W [N, K] as the planes qs, codes and dm of
`gemma4.quant.formats`: 4.625 bits a weight. K is a multiple of 256 and M at most 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from gemma4.kernels.packed_matvec import packed_matvec, packed_matvec_fake
from gemma4.kernels.packed_tile import (
    add_group,
    float_byte,
    float_half,
    load_piece,
    load_word,
    multiply_rows,
    store_rows,
    tile_row,
    tile_start,
)


@triton.jit
def q4_k_fetch(planes, row, unit, K: tl.constexpr):
    """The packed words of one unit of 64 weights of each row."""
    qs_ptr, codes_ptr, dm_ptr = planes
    return (
        load_piece(qs_ptr, row, unit * 2, K // 2),
        load_piece(qs_ptr, row, unit * 2 + 1, K // 2),
        load_word(codes_ptr, row, unit, K // 64),
        load_word(dm_ptr, row, unit >> 2, K // 256),
    )


@triton.jit
def q4_k_add(
    sums,
    words,
    unit,
    live,
    xq_ptr,
    xs_ptr,
    xsum_ptr,
    K: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Sums with one unit of each row added."""
    w0, w1, code, dm = words
    d, dmin = float_half(dm, 0), -float_half(dm, 1)
    for high in tl.static_range(2):
        # High nibbles stay where they are, sixteen times their value: the scale undoes it exactly.
        nibble = 0x0F0F0F0F if high == 0 else -0x0F0F0F10
        scale = (d if high == 0 else d * 0.0625) * float_byte(code, high)
        offset = dmin * float_byte(code, 2 + high)
        sums = add_group(
            sums, w0 & nibble, w1 & nibble, scale, offset, unit * 2 + high, live, xq_ptr, xs_ptr, xsum_ptr,
            K, M, PLANES, False, True, EVEN,
        )  # fmt: skip
    return sums


@triton.jit
def q4_k_matvec_kernel(
    y_ptr,  # [M, N]
    xq_ptr,  # int8 planes, of `activation_shape`
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    qs_ptr,  # [N, K//2] uint8
    codes_ptr,  # [N, K//64, 4] uint8
    dm_ptr,  # [N, K//256, 2] float16
    N,
    K: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    KL: tl.constexpr,
    RL: tl.constexpr,
    KW: tl.constexpr,
    R: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN_N: tl.constexpr,
    PDL: tl.constexpr,
):
    start = tile_start(RL, R)
    qs_ptr += start * (K // 2)
    codes_ptr += start * (K // 16)
    dm_ptr += start * (K // 128)
    row = tile_row(start, N, RL, R, EVEN_N)
    sums = multiply_rows(
        q4_k_fetch, q4_k_add, (qs_ptr, codes_ptr, dm_ptr), row, xq_ptr, xs_ptr, xsum_ptr,
        K // 64, K, M, PLANES, KL, RL, KW, R, EARLY, PDL,
    )  # fmt: skip
    store_rows(y_ptr, sums, start, N, M, RL, R)


@triton_op("gemma4::q4_k_matvec", mutates_args={})
def q4_k_matvec(
    xq: Tensor,
    xs: Tensor,
    xsum: Tensor,
    qs: Tensor,
    codes: Tensor,
    dm: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """xq, xs, xsum: activations [M, K], M <= 8; planes of a Q4_K weight [N, K]. Returns [M, N]."""
    return packed_matvec(q4_k_matvec_kernel, "q4_k", (xq, xs, xsum), (qs, codes, dm), out_dtype)


@q4_k_matvec.register_fake
def _(
    xq: Tensor,
    xs: Tensor,
    xsum: Tensor,
    qs: Tensor,
    codes: Tensor,
    dm: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return packed_matvec_fake("q4_k", (xq, xs, xsum), (qs, codes, dm), out_dtype)
