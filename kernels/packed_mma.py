"""Packed matmul for a few rows of x on tensor cores: y[m, n] = sum_k x[m, k] * W[n, k], W read packed.

The matvec kernels repeat all arithmetic for each row of x; here one int8 matrix instruction serves up to eight rows
of x, so that time depends less on M. One kernel serves all formats. Three constants tell them apart:

    BITS     bits of an integer weight q: 4, or 5 or 6 in nibbles and a plane of further bits, or 8
    SUPER    whether scales are integer codes times float16 factors of a block of 256 (the K-quants)
    OFFSET   whether w = scale * q + offset; otherwise w = scale * (q - 2^(BITS-1)), or scale * q with 8 bits

A program multiplies 8 * R rows of W with one of SPLIT parts of K, which its KW warps share out by spans of 128; a
second kernel adds up the parts. The sum over K of one output depends on SPLIT and KW, which follow from K alone, never
on N, M, R or on the other rows of W and x in the launch. Sums inside a group of 32 are exact integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.dependent_launch import await_inputs, dependent_launch_options
from gemma4.kernels.dp4a import signed_byte
from gemma4.kernels.packed_mma_tile import (
    MAGIC_BITS,
    activation_operand,
    column_factor,
    fetch_scales,
    fetch_words,
    halves,
    integers,
    joined_planes,
    load_run,
    row_factor,
    weight_operand,
)
from gemma4.kernels.packed_planes import PACKED_FORMATS
from gemma4.kernels.packed_tile import float_byte, float_half

FORMAT_CONSTANTS: dict[str, dict[str, int | bool]] = {
    "q4_k": {"BITS": 4, "SUPER": True, "OFFSET": True},
    "q5_k": {"BITS": 5, "SUPER": True, "OFFSET": True},
    "q6_k": {"BITS": 6, "SUPER": True, "OFFSET": False},
    "q8_0": {"BITS": 8, "SUPER": False, "OFFSET": False},
    "q5_0": {"BITS": 5, "SUPER": False, "OFFSET": False},
    "q5_1": {"BITS": 5, "SUPER": False, "OFFSET": True},
    "q4_0": {"BITS": 4, "SUPER": False, "OFFSET": False},
    "q4_1": {"BITS": 4, "SUPER": False, "OFFSET": True},
}
PARTS_BLOCK = 1024
"""Outputs of one program that adds up parts."""


@triton.jit
def add_span(
    sums,  # (scaled products, scaled sums of x): [T, G, KW, R, C] float32
    words,  # of `fetch_words`
    scales,  # of `fetch_scales`
    span,  # [T, G, KW, 1] int32
    t,
    m,  # [T, G, KW, C] rows of x of a thread's sums
    column,  # [T, G, KW, tiles] rows of xq [PLANES * M] a thread loads
    xq_ptr,
    xs_ptr,
    xsum_ptr,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    BITS: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Sums with the products of one span of 128 added. A K-quant's factors d and dmin are left to the caller."""
    total, offsets = sums
    KW: tl.constexpr = total.shape[2]
    R: tl.constexpr = total.shape[3]
    C: tl.constexpr = total.shape[4]
    SHIFT: tl.constexpr = 0 if OFFSET or BITS == 8 else 8 - BITS
    UNSHIFT: tl.constexpr = 1.0 / (1 << SHIFT)
    IN_ORDER: tl.constexpr = SUPER or BITS == 8  # otherwise a nibble byte holds weights of one group, 16 apart
    ALIGNED: tl.constexpr = K % 128 == 0
    UNITS: tl.constexpr = (K + 63) // 64
    if ALIGNED:
        span = tl.minimum(span, K // 128 - 1)
    unit = span * 2 + (t >> 1)
    if not ALIGNED:
        unit = tl.minimum(unit, UNITS - 1)
    magic = tl.full((KW, R * 8, column.shape[3] * 8), MAGIC_BITS, tl.int32)
    xs = load_run(xs_ptr, m * (K // 32), span * 4, None, K // 32, 4, ALIGNED)
    if OFFSET:
        xsum = load_run(xsum_ptr, m * (K // 16), span * 8, None, K // 16, 8, ALIGNED)
    four = tl.arange(0, 4)[None, None, None, None, :]
    q, x = (), ()
    for n in tl.static_range(2):
        first, last = halves(integers(words, n, BITS, SHIFT))
        q = q + (weight_operand(first), weight_operand(last))  # type: ignore[assignment]  # noqa: RUF005
        sixteenth = n * 2 + (t & 1) if IN_ORDER else (t & 1) * 2 + n
        at = (((column * 4 + sixteenth) * UNITS + unit) * 4)[:, :, :, :, None]
        x = x + halves(tl.load(xq_ptr.to(tl.pointer_type(tl.int32)) + at + four))
    for i in tl.static_range(4):
        s = column_factor(xs[i])
        if SUPER and not OFFSET:
            for half in tl.static_range(2):
                chosen = -(t == (i // 2) * 2 + half).to(tl.int32)
                dot = magic
                for p in tl.static_range(2):
                    dot = tl.dot(
                        q[i % 2 * 2 + p], activation_operand(x[i % 2 * 2 + p], chosen), acc=dot, out_dtype=tl.int32
                    )
                scale = signed_byte(scales[i // 2], 2 * (i % 2) + half).to(tl.float32)
                total += row_factor(scale) * (joined_planes(dot, R, C, PLANES) * s)
        else:
            dot = magic
            if IN_ORDER:
                chosen = -(t >> 1 == i // 2).to(tl.int32)
                for p in tl.static_range(2):
                    dot = tl.dot(
                        q[i % 2 * 2 + p], activation_operand(x[i % 2 * 2 + p], chosen), acc=dot, out_dtype=tl.int32
                    )
            else:
                chosen = -(t == i).to(tl.int32)
                for p in tl.static_range(4):
                    dot = tl.dot(q[p], activation_operand(x[p], chosen), acc=dot, out_dtype=tl.int32)
            product = joined_planes(dot, R, C, PLANES) * s
            if SUPER:
                code = scales[i // 2]
                total += row_factor(float_byte(code, i % 2)) * product
                offsets += row_factor(float_byte(code, 2 + i % 2)) * column_factor(xsum[2 * i] + xsum[2 * i + 1])
            elif OFFSET:
                dm = scales[i]
                total += row_factor(float_half(dm, 0)) * product
                total += row_factor(float_half(dm, 1)) * column_factor(xsum[2 * i] + xsum[2 * i + 1])
            else:
                total += row_factor(scales[i].to(tl.float32) * UNSHIFT) * product
    return (total, offsets)


@triton.jit
def packed_mma_kernel(
    y_ptr,  # [SPLIT, M, N]
    xq_ptr,  # [PLANES, M, 4, ceil(K/64), 16] int8
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    qs_ptr,  # [N, K//2] uint8, with 8 bits [N, K] int8
    qh_ptr,  # [N, K//32] int32 with 5 bits, [N, K//32, 2] int32 with 6
    scales_ptr,  # SUPER: [N, K//64, 4] bytes
    d_ptr,  # [N, K//256] float16 if SUPER, otherwise [N, K//32]; two of each if OFFSET
    M,
    N,
    K: tl.constexpr,
    C: tl.constexpr,
    PLANES: tl.constexpr,
    BITS: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    KW: tl.constexpr,
    R: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES: tl.constexpr = C * PLANES // 2
    STEPS: tl.constexpr = (K + 128 * KW * SPLIT - 1) // (128 * KW * SPLIT)
    start = tl.program_id(0).to(tl.int64) * (8 * R)
    # The masks change no value: they hide from Triton that lanes are contiguous, which would change layouts.
    tile = tl.zeros((4, 8, KW, 1), tl.int32)
    t = (tl.arange(0, 4) & 3)[:, None, None, None] + tile
    g = (tl.arange(0, 8) & 7)[None, :, None, None] + tile
    warp = (tl.arange(0, KW) & (KW - 1))[None, None, :, None] + tile
    row = tl.minimum(start + (tl.arange(0, R) & (R - 1))[None, None, None, :] * 8 + g, N - 1)
    m = tl.minimum(t * C + tl.arange(0, C)[None, None, None, :], M - 1)
    if C * PLANES == 4:
        column = tl.arange(0, 2)[None, None, None, :] * M + tl.minimum(g, M - 1)
    else:
        column = (g % PLANES) * M + tl.minimum(g // PLANES, M - 1) + tl.zeros((4, 8, KW, TILES), tl.int32)
    acc = tl.zeros((4, 8, KW, R, C), tl.float32)
    none = tl.zeros((4, 8, KW, R, C), tl.float32)
    span = tl.program_id(1) * (STEPS * KW) + warp
    words = fetch_words(qs_ptr, qh_ptr, row, t, span, K, BITS)
    scales = fetch_scales(scales_ptr, d_ptr, row, span, K, SUPER, OFFSET)
    await_inputs(PDL)
    for _ in tl.range(0, STEPS, num_stages=1):
        # The next span's weights are on their way while this one's are multiplied.
        words_now, scales_now = words, scales
        words = fetch_words(qs_ptr, qh_ptr, row, t, span + KW, K, BITS)
        scales = fetch_scales(scales_ptr, d_ptr, row, span + KW, K, SUPER, OFFSET)
        sums = add_span(
            (none, none) if SUPER else (acc, none), words_now, scales_now, span, t, m, column,
            xq_ptr, xs_ptr, xsum_ptr, K, PLANES, BITS, SUPER, OFFSET,
        )  # fmt: skip
        if SUPER and OFFSET:
            acc += (
                row_factor(float_half(scales_now[2], 0)) * sums[0] - row_factor(float_half(scales_now[2], 1)) * sums[1]
            )
        elif SUPER:
            acc += row_factor(scales_now[2].to(tl.float32) * (1.0 / (1 << (8 - BITS)))) * sums[0]
        else:
            acc = sums[0]
        span += KW
    y = tl.sum(acc, axis=2)
    row = start + tl.arange(0, R)[None, None, :, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    m = tl.arange(0, 4)[:, None, None, None] * C + tl.arange(0, C)[None, None, None, :]
    at = (tl.program_id(1) * M + m).to(tl.int64) * N + row
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < N) & (m < M))


@triton.jit
def sum_parts_kernel(
    y_ptr,  # [M * N]
    parts_ptr,  # [SPLIT, M * N] float32
    COUNT,  # M * N
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * COUNT + at, mask=at < COUNT, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < COUNT)


def mma_tile(k: int, n: int) -> dict[str, int]:
    """SPLIT parts of K, KW warps along K and R eights of rows of W a program, for a weight [n, k].

    SPLIT and KW fix the order of the sum over K: they depend on K alone. Long rows are split so that few of them fill a
    GPU evenly. Rows of W share the loads of x: where there are programs enough, they take 32 rows instead of 16.
    """
    split = 1 if k < 8192 else triton.cdiv(k, 2048)
    return {"SPLIT": split, "KW": 2, "R": 4 if n * split >= 16384 else 2}


def launch_packed_mma(
    name: str,
    activations: tuple[Tensor, Tensor, Tensor],
    planes: tuple[Tensor, ...],
    out_dtype: torch.dtype,
    **options: int,
) -> Tensor:
    """[M, N] for checked arguments; on CPU tensors only where Triton interprets. `options` override the chosen tile."""
    xq, xs, xsum = activations
    (m, groups), n = xs.shape, planes[0].shape[0]
    tile = mma_tile(groups * 32, n) | options
    by_name = {spec.name: plane for spec, plane in zip(PACKED_FORMATS[name].planes, planes, strict=True)}
    pdl = dependent_launch_options(xs.device)
    y = xs.new_empty((m, n), dtype=out_dtype)
    split = tile["SPLIT"]
    parts = y if split == 1 else xs.new_empty((split, m, n))
    # A format without one of the planes passes qs in its place, unread.
    wrap_triton(packed_mma_kernel)[(triton.cdiv(n, 8 * tile["R"]), split)](
        y_ptr=parts,
        xq_ptr=xq,
        xs_ptr=xs,
        xsum_ptr=xsum,
        qs_ptr=by_name["qs"],
        qh_ptr=by_name.get("qh", by_name["qs"]),
        scales_ptr=by_name.get("codes", by_name.get("scales", by_name["qs"])),
        d_ptr=by_name["d"] if "d" in by_name else by_name["dm"],
        M=m,
        N=n,
        K=groups * 32,
        C=1 if m <= 4 and xq.shape[0] == 2 else 2,
        PLANES=xq.shape[0],
        **FORMAT_CONSTANTS[name],
        **tile,
        num_warps=tile["KW"],
        **pdl,
    )
    if split > 1:
        wrap_triton(sum_parts_kernel)[(triton.cdiv(m * n, PARTS_BLOCK),)](
            y_ptr=y,
            parts_ptr=parts,
            COUNT=m * n,
            SPLIT=split,
            BLOCK=PARTS_BLOCK,
            num_warps=4,
            **pdl,
        )
    return y
