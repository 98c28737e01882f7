"""Packed matmul for a few rows of x on tensor cores: y[m, n] = sum_k x[m, k] * W[n, k], W read packed.

The matvec kernels repeat all arithmetic for each row of x; here one int8 matrix instruction serves up to eight rows
of x, so that time depends less on M. One kernel serves all formats. Three constants tell them apart:

    BITS     bits of an integer weight q: 4, or 5 or 6 in nibbles and a plane of further bits, or 8
    SUPER    whether scales are integer codes times float16 factors of a block of 256 (the K-quants)
    OFFSET   whether w = scale * q + offset; otherwise w = scale * (q - 2^(BITS-1)), or scale * q with 8 bits

A program multiplies 8 * R rows of W with one of SPLIT parts of K, which its KW warps share out by steps: a block of 256
of a K-quant, otherwise a span of 128. A second kernel adds up the parts. The sum over K of one output depends on SPLIT
and KW, which follow from K alone, never on N, M, R or on the other rows of W and x in the launch. Sums inside a group
of 32 are exact integers.
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
    column_factor,
    fetch_activations,
    fetch_scales,
    fetch_words,
    half_masks,
    integers,
    joined_planes,
    load_run,
    row_factor,
    scaled_sums,
    weight_operand,
    zero_after_loads,
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
    total,  # scaled products: [T, G, KW, R, C] float32
    weights,  # two of `fetch_words`
    scales,  # two words of codes of a K-quant, otherwise those of `fetch_scales`
    span,  # [T, G, KW, 1] int32
    lanes,
    x_ptrs,
    ahead: tl.constexpr,  # spans from `span` to this one
    M: tl.constexpr,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    BITS: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """total with the products of one span of 128 added. A K-quant's factors and offsets are left to the caller."""
    t, _, m, masks = lanes
    x_ptr, xs_ptr, xsum_ptr = x_ptrs
    KW: tl.constexpr = total.shape[2]
    R: tl.constexpr = total.shape[3]
    C: tl.constexpr = total.shape[4]
    SHIFT: tl.constexpr = 0 if OFFSET or BITS == 8 else 8 - BITS
    UNSHIFT: tl.constexpr = 1.0 / (1 << SHIFT)
    IN_ORDER: tl.constexpr = SUPER or BITS == 8  # otherwise a nibble byte holds weights of one group, 16 apart
    ALIGNED: tl.constexpr = K % 128 == 0
    TILES: tl.constexpr = C * PLANES // 2
    PLANE: tl.constexpr = (K + 63) // 64 * 16 * M if C * PLANES == 4 else 0
    magic = tl.full((KW, R * 8, TILES * 8), MAGIC_BITS, tl.int32)
    xs = load_run(xs_ptr, m * (K // 32), span * 4, K // 32, 4, ALIGNED, ahead * 4)
    if OFFSET and not SUPER:
        xsum = load_run(xsum_ptr, m * (K // 16), span * 8, K // 16, 8, ALIGNED, ahead * 8)
    for u in tl.static_range(2):
        unit = span * 2
        if not ALIGNED:
            # The second unit of a span may be past the end of K, where x is read again and counts for nothing.
            unit = tl.minimum(unit, (K + 63) // 64 - 1 - u)
        x = fetch_activations(x_ptr + unit * (M * 16), t, ahead * 2 + u, M, IN_ORDER, PLANE)
        first, second = integers(weights[u], 0, BITS, SHIFT), integers(weights[u], 1, BITS, SHIFT)
        q = (first, second)
        for n in tl.static_range(2):
            s = column_factor(xs[u * 2 + n])
            if SUPER and not OFFSET:
                for half in tl.static_range(2):
                    dot = tl.dot(weight_operand(q[n] & masks[half]), x[n], acc=magic, out_dtype=tl.int32)
                    scale = signed_byte(scales[u], 2 * n + half).to(tl.float32)
                    total += row_factor(scale) * (joined_planes(dot, R, C, PLANES) * s)
            else:
                if IN_ORDER:
                    dot = tl.dot(weight_operand(q[n]), x[n], acc=magic, out_dtype=tl.int32)
                else:
                    dot = tl.dot(weight_operand(first & masks[n]), x[0], acc=magic, out_dtype=tl.int32)
                    dot = tl.dot(weight_operand(second & masks[n]), x[1], acc=dot, out_dtype=tl.int32)
                product = joined_planes(dot, R, C, PLANES) * s
                if SUPER:
                    total += row_factor(float_byte(scales[u], n)) * product
                elif OFFSET:
                    dm = scales[u * 2 + n]
                    total += row_factor(float_half(dm, 0)) * product
                    total += row_factor(float_half(dm, 1)) * column_factor(
                        xsum[u * 4 + n * 2] + xsum[u * 4 + n * 2 + 1]
                    )
                else:
                    total += row_factor(scales[u * 2 + n].to(tl.float32) * UNSHIFT) * product
    return total


@triton.jit
def fetch_step(planes, row, t, span, K: tl.constexpr, BITS: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr):
    """(weights of units, scales) of one step; those of the last step past the end of K."""
    qs_ptr, qh_ptr, scales_ptr, d_ptr = planes
    SPANS: tl.constexpr = 2 if SUPER else 1
    span = tl.minimum(span, (K + 128 * SPANS - 1) // (128 * SPANS) * SPANS - SPANS)
    units = ()
    for ahead in tl.static_range(2 * SPANS):
        units = units + (fetch_words(qs_ptr, qh_ptr, row, t, span * 2, ahead, K, BITS),)  # type: ignore[assignment]  # noqa: RUF005
    return (units, fetch_scales(scales_ptr, d_ptr, row, span, K, SUPER, OFFSET))


@triton.jit
def add_step(
    acc,  # [T, G, KW, R, C] float32
    fetched,  # of `fetch_step`
    span,  # [T, G, KW, 1] int32
    lanes,  # (t, g, rows of x of a thread's sums: [T, G, KW, C], `half_masks`)
    x_ptrs,  # [T, G, KW, 1] to the words a thread takes of unit 0; to scales; to sums
    M: tl.constexpr,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    BITS: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """acc with the products of one step: two spans of a K-quant, otherwise one."""
    units, scales = fetched
    SPANS: tl.constexpr = 2 if SUPER else 1
    live = span < K // 128 if K % 128 == 0 else span < K // 128 + 1
    span = tl.minimum(span, (K + 128 * SPANS - 1) // (128 * SPANS) * SPANS - SPANS)
    total = tl.zeros(acc.shape, tl.float32)
    for i in tl.static_range(SPANS):
        weights = (units[2 * i], units[2 * i + 1])
        some = (scales[2 * i], scales[2 * i + 1]) if SUPER else scales
        total = add_span(total, weights, some, span, lanes, x_ptrs, i, M, K, PLANES, BITS, SUPER, OFFSET)
    if SUPER:
        factor = tl.where(live, scales[4], 0)
        if OFFSET:
            offsets = scaled_sums(scales, x_ptrs[2], span >> 1, lanes[0], lanes[1], M, K, acc.shape[3], acc.shape[4])
            acc += row_factor(float_half(factor, 0)) * total - row_factor(float_half(factor, 1)) * offsets
        else:
            acc += row_factor(factor.to(tl.float32) * (1.0 / (1 << (8 - BITS)))) * total
    else:
        acc += tl.where(live[:, :, :, :, None], total, 0.0)
    return acc


@triton.jit
def packed_mma_kernel(
    y_ptr,  # [SPLIT, M, N]
    xq_ptr,  # [PLANES, ceil(K/64), M, 4, 16] int8
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    qs_ptr,  # [N, K//2] uint8, with 8 bits [N, K] int8
    qh_ptr,  # [N, K//32] int32 with 5 bits, [N, K//32, 2] int32 with 6
    scales_ptr,  # SUPER: [N, K//64, 4] bytes
    d_ptr,  # [N, K//256] float16 if SUPER, otherwise [N, K//32]; two of each if OFFSET
    M: tl.constexpr,
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
    SPANS: tl.constexpr = 2 if SUPER else 1  # of a warp in a step
    STEPS: tl.constexpr = (K + 128 * SPANS * KW * SPLIT - 1) // (128 * SPANS * KW * SPLIT)
    PLANE: tl.constexpr = (K + 63) // 64 * 16  # words of a row of x in one plane
    start = tl.program_id(0).to(tl.int64) * (8 * R)
    # The masks change no value: they hide from Triton that lanes are contiguous, which would change layouts.
    tile = tl.zeros((4, 8, KW, 1), tl.int32)
    t = (tl.arange(0, 4) & 3)[:, None, None, None] + tile
    g = (tl.arange(0, 8) & 7)[None, :, None, None] + tile
    warp = (tl.arange(0, KW) & (KW - 1))[None, None, :, None] + tile
    row = tl.minimum(start + (tl.arange(0, R) & (R - 1))[None, None, None, :] * 8 + g, N - 1)
    m = t * C + tl.arange(0, C)[None, None, None, :]
    if M < 4 * C:
        m = tl.minimum(m, M - 1)
    x_ptr = xq_ptr.to(tl.pointer_type(tl.int32)) + t * 4
    if C * PLANES == 4:
        x_ptr += tl.minimum(g, M - 1) * 16
    else:
        x_ptr += g % PLANES * (PLANE * M) + tl.minimum(g // PLANES, M - 1) * 16
    lanes = (t, g, m, half_masks(t))
    x_ptrs = (x_ptr, xs_ptr, xsum_ptr)
    acc = tl.zeros((4, 8, KW, R, C), tl.float32)
    planes = (qs_ptr, qh_ptr, scales_ptr, d_ptr)
    span = (tl.program_id(1) * (STEPS * KW) + warp) * SPANS
    now = fetch_step(planes, row, t, span, K, BITS, SUPER, OFFSET)
    await_inputs(PDL)
    # The next step's weights are on their way while this one's are multiplied. Two steps a turn save moving them.
    for turn in tl.range(0, STEPS // 2, num_stages=1):
        for _ in tl.static_range(2):
            later = fetch_step(planes, row, t, span + KW * SPANS, K, BITS, SUPER, OFFSET)
            acc = add_step(acc, now, span + zero_after_loads(turn), lanes, x_ptrs, M, K, PLANES, BITS, SUPER, OFFSET)
            now = later
            span += KW * SPANS
    if STEPS % 2 == 1:
        acc = add_step(acc, now, span, lanes, x_ptrs, M, K, PLANES, BITS, SUPER, OFFSET)
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


def mma_tile(k: int) -> dict[str, int]:
    """SPLIT parts of K, KW warps along K and R eights of rows of W a program, for a weight [n, k].

    SPLIT and KW fix the order of the sum over K: they depend on K alone. Long rows are split so that few of them fill a
    GPU evenly. Two eights of rows are the sixteen of an instruction.
    """
    return {"SPLIT": 1 if k < 8192 else triton.cdiv(k, 2048), "KW": 1, "R": 2}


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
    tile = mma_tile(groups * 32) | options
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
