"""Q5_0 matvec: y[m, n] = sum_k x[m, k] * W[n, k] with W = d * (q - 16), read packed.

x comes as int8 planes from `gemma4::quantize_activations`; W [N, K] as the planes qs, qh and d of
`gemma4.quant.formats`: 5.5 bits a weight. K is a multiple of 32 and M at most 8.
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
    fifth_bits,
    load_half,
    load_piece,
    load_word,
    multiply_rows,
    nibbles,
    store_rows,
    tile_row,
    tile_start,
)


@triton.jit
def q5_0_fetch(planes, row, unit, K: tl.constexpr):
    """The packed words of one unit of 32 weights of each row."""
    qs_ptr, qh_ptr, d_ptr = planes
    return (
        load_piece(qs_ptr, row, unit, K // 2),
        load_word(qh_ptr, row, unit, K // 32),
        load_half(d_ptr, row, unit, K // 32),
    )


@triton.jit
def q5_0_add(
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
    w, qh, d = words
    q0 = nibbles(w, 0) | fifth_bits(qh, 0)
    q1 = nibbles(w, 1) | fifth_bits(qh, 1)
    return add_group(
        sums, q0, q1, d, d * -16.0, unit, live, xq_ptr, xs_ptr, xsum_ptr,
        K, M, PLANES, False, True, EVEN,
    )  # fmt: skip


@triton.jit
def q5_0_matvec_kernel(
    y_ptr,  # [M, N]
    xq_ptr,  # int8 planes, of `activation_shape`
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    qs_ptr,  # [N, K//2] uint8
    qh_ptr,  # [N, K//32] int32
    d_ptr,  # [N, K//32] float16
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
    qh_ptr += start * (K // 32)
    d_ptr += start * (K // 32)
    row = tile_row(start, N, RL, R, EVEN_N)
    sums = multiply_rows(
        q5_0_fetch, q5_0_add, (qs_ptr, qh_ptr, d_ptr), row, xq_ptr, xs_ptr, xsum_ptr,
        K // 32, K, M, PLANES, KL, RL, KW, R, EARLY, PDL,
    )  # fmt: skip
    store_rows(y_ptr, sums, start, N, M, RL, R)


@triton_op("gemma4::q5_0_matvec", mutates_args={})
def q5_0_matvec(
    xq: Tensor,
    xs: Tensor,
    xsum: Tensor,
    qs: Tensor,
    qh: Tensor,
    d: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """xq, xs, xsum: activations [M, K], M <= 8; planes of a Q5_0 weight [N, K]. Returns [M, N]."""
    return packed_matvec(q5_0_matvec_kernel, "q5_0", (xq, xs, xsum), (qs, qh, d), out_dtype)


@q5_0_matvec.register_fake
def _(
    xq: Tensor,
    xs: Tensor,
    xsum: Tensor,
    qs: Tensor,
    qh: Tensor,
    d: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return packed_matvec_fake("q5_0", (xq, xs, xsum), (qs, qh, d), out_dtype)
