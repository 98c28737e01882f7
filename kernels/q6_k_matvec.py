"""Q6_K matvec: y[m, n] = sum_k x[m, k] * W[n, k] with W = (d * sc) * (q - 32), read packed.

x comes as int8 planes from `gemma4::quantize_activations`; W [N, K] as the planes qs, qh, scales and d of
`gemma4.quant.formats`: 6.5625 bits a weight. K is a multiple of 256 and M at most 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from gemma4.kernels.dp4a import signed_byte
from gemma4.kernels.packed_matvec import packed_matvec, packed_matvec_fake
from gemma4.kernels.packed_tile import (
    add_group_of_halves,
    load_half,
    load_piece,
    load_word,
    load_word_pair,
    multiply_rows,
    nibbles,
    store_rows,
    tile_row,
    tile_start,
    top_bits,
)


@triton.jit
def q6_k_fetch(planes, row, unit, K: tl.constexpr):
    """The packed words of one unit of 64 weights of each row."""
    qs_ptr, qh_ptr, scales_ptr, d_ptr = planes
    return (
        load_piece(qs_ptr, row, unit * 2, K // 2),
        load_piece(qs_ptr, row, unit * 2 + 1, K // 2),
        load_word_pair(qh_ptr, row, unit * 2, K // 32),
        load_word_pair(qh_ptr, row, unit * 2 + 1, K // 32),
        load_word(scales_ptr, row, unit, K // 64),
        load_half(d_ptr, row, unit >> 2, K // 256),
    )


@triton.jit
def q6_k_add(
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
    w0, w1, qh0, qh1, code, d = words
    for high in tl.static_range(2):
        q0 = nibbles(w0, high) | top_bits((qh0 >> (32 * high)).to(tl.int32))
        q1 = nibbles(w1, high) | top_bits((qh1 >> (32 * high)).to(tl.int32))
        scale0 = d * signed_byte(code, 2 * high).to(tl.float32)
        scale1 = d * signed_byte(code, 2 * high + 1).to(tl.float32)
        sums = add_group_of_halves(
            sums, q0, q1, scale0, scale1, 32.0, unit * 2 + high, live, xq_ptr, xs_ptr, xsum_ptr,
            K, M, PLANES, EVEN,
        )  # fmt: skip
    return sums


@triton.jit
def q6_k_matvec_kernel(
    y_ptr,  # [M, N]
    xq_ptr,  # int8 planes, of `activation_shape`
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    qs_ptr,  # [N, K//2] uint8
    qh_ptr,  # [N, K//32, 2] int32
    scales_ptr,  # [N, K//16] int8
    d_ptr,  # [N, K//256] float16
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
    qh_ptr += start * (K // 16)
    scales_ptr += start * (K // 16)
    d_ptr += start * (K // 256)
    row = tile_row(start, N, RL, R, EVEN_N)
    sums = multiply_rows(
        q6_k_fetch, q6_k_add, (qs_ptr, qh_ptr, scales_ptr, d_ptr), row, xq_ptr, xs_ptr, xsum_ptr,
        K // 64, K, M, PLANES, KL, RL, KW, R, EARLY, PDL,
    )  # fmt: skip
    store_rows(y_ptr, sums, start, N, M, RL, R)


@triton_op("gemma4::q6_k_matvec", mutates_args={})
def q6_k_matvec(
    xq: Tensor,
    xs: Tensor,
    xsum: Tensor,
    qs: Tensor,
    qh: Tensor,
    scales: Tensor,
    d: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """xq, xs, xsum: activations [M, K], M <= 8; planes of a Q6_K weight [N, K]. Returns [M, N]."""
    return packed_matvec(q6_k_matvec_kernel, "q6_k", (xq, xs, xsum), (qs, qh, scales, d), out_dtype)


@q6_k_matvec.register_fake
def _(
    xq: Tensor,
    xs: Tensor,
    xsum: Tensor,
    qs: Tensor,
    qh: Tensor,
    scales: Tensor,
    d: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return packed_matvec_fake("q6_k", (xq, xs, xsum), (qs, qh, scales, d), out_dtype)
