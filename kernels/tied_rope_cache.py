"""Keys and values of one projection as one row a token: the value, and of the key only what RoPE turned.

Where a layer has no value projection (Gemma 4's full layers), a head x of the projection gives

    v = rms(x),  k = rope(v * k_weight),  rms(x) = x * rsqrt(mean(x^2) + eps)

and proportional RoPE turns only the pairs (i, i + D/2), i < R/2. The other D - R dimensions of k are v * k_weight:
their part of q . k is (q * k_weight) . v. So a row of D + R numbers serves as key and value:

    row   = [k of the R turned dimensions | v of these | v of the others]
    query = [q of the R turned dimensions | q * k_weight of the others]
    q . k = query . [row[:R] | row[2R:]],   v = row[R:], in tied order

Tied order: dimensions 0 .. R/2-1, D/2 .. D/2+R/2-1, then the others, ascending. Each number is rounded to the cache's
dtype once, as often as a number of a separate key and value is; nothing else is lost.

q [T, Hq * D] and k [T, Hkv * D] are rows of the projections, strided where they are slices of one fused output. The
arithmetic is that of `gemma4.kernels.rope_cache`. One tensor for key and value is the idea of multi-head latent
attention (DeepSeek-V2, arXiv 2405.04434).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.dependent_launch import await_inputs, dependent_launch_options
from gemma4.kernels.rope_cache import PREFILL_HEADS, TWO_PI, check_projections, rms_norm, rotate

__all__ = ["keys_and_values", "natural_order", "tied_norm_rope", "tied_norm_rope_cache", "tied_order", "tied_queries"]

# ---------------------------------------------------------------------------------------------------- reference


def tied_order(x: Tensor, rotated: int) -> Tensor:
    """x [..., D] with its dimensions in tied order."""
    half, pairs = x.shape[-1] // 2, rotated // 2
    parts = (x[..., :pairs], x[..., half : half + pairs], x[..., pairs:half], x[..., half + pairs :])
    return torch.cat(parts, -1)


def natural_order(x: Tensor, rotated: int) -> Tensor:
    """x [..., D], in tied order, with its dimensions in their own order."""
    half, pairs = x.shape[-1] // 2, rotated // 2
    parts = (x[..., :pairs], x[..., rotated : half + pairs], x[..., pairs:rotated], x[..., half + pairs :])
    return torch.cat(parts, -1)


def keys_and_values(rows: Tensor, rotated: int) -> tuple[Tensor, Tensor]:
    """Rows [..., D + R] as keys and values [..., D], both in tied order."""
    return torch.cat((rows[..., :rotated], rows[..., 2 * rotated :]), -1), rows[..., rotated:]


def tied_queries(q: Tensor, k_weight: Tensor, rotated: int) -> Tensor:
    """Queries for tied rows from queries [..., D] that are normalised and turned for separate keys.

    k_weight: float32 [D], of the norm of the keys.
    """
    q, k_weight = tied_order(q, rotated), tied_order(k_weight, rotated)
    others = q[..., rotated:] * k_weight[rotated:]
    return torch.cat((q[..., :rotated], others.to(q.dtype)), -1)


def tied_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    rotated: int,
) -> tuple[Tensor, Tensor]:
    """The definition of `tied_norm_rope`, in torch."""
    q_heads, k_heads = (x.view(x.shape[0], -1, q_weight.shape[0]).transpose(0, 1) for x in (q, k))
    turned_q, turned_k, others, values = (
        tied_order(x, rotated)
        for x in (
            rotate(rms_norm(q_heads, q_weight, eps), input_pos, inv_freq),
            rotate(rms_norm(k_heads, k_weight, eps), input_pos, inv_freq),
            rms_norm(q_heads, q_weight * k_weight, eps),
            rms_norm(k_heads, None, eps),
        )
    )
    queries = torch.cat((turned_q[..., :rotated], others[..., rotated:]), -1)
    return queries[None], torch.cat((turned_k[..., :rotated], values), -1)[None]


# ------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def natural_column(place, D: tl.constexpr, R: tl.constexpr):
    """The dimensions that stand at consecutive places of tied order, from a multiple of R / 2 on."""
    RUN: tl.constexpr = R // 2
    turned = tl.where(place < RUN, place, place - RUN + D // 2)
    column = tl.where(place < R, turned, tl.where(place < D // 2 + RUN, place - RUN, place))
    return tl.max_contiguous(tl.multiple_of(column, RUN), RUN)  # for wide stores


@triton.jit
def _tied_norm_rope_kernel(
    q_ptr,  # [T, Hq * D], row stride stride_qt
    k_ptr,  # [T, Hkv * D], row stride stride_kt
    q_weight_ptr,  # [D] float32
    k_weight_ptr,  # [D] float32
    inv_freq_ptr,  # [D / 2] float32
    input_pos_ptr,  # [T] int64
    q_out_ptr,  # [Hq, T, D]
    rows_ptr,  # [Hkv, T, D + R], or the cache [Hkv, L, D + R]
    stride_qt,
    stride_kt,
    stride_rh,
    stride_rt,
    tokens,
    cache_len,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTO_CACHE: tl.constexpr,
    HEADS: tl.constexpr,  # heads of one program, of Q_HEADS + KV_HEADS
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    await_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(input_pos_ptr + token)
    row = position % cache_len if INTO_CACHE else token
    offs = tl.arange(0, HALF)
    eps = tl.cast(eps, tl.float32)  # a compiler may hand it over as float64
    angle = position.to(tl.float64) * tl.load(inv_freq_ptr + offs).to(tl.float64)
    angle = (angle - TWO_PI * tl.floor(angle / TWO_PI + 0.5)).to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle)
    is_turned = offs < R // 2
    low_place = tl.where(is_turned, offs, offs + R // 2)
    high_place = tl.where(is_turned, offs + R // 2, offs + HALF)
    k_low, k_high = tl.load(k_weight_ptr + offs), tl.load(k_weight_ptr + HALF + offs)
    dtype = q_out_ptr.dtype.element_ty
    first_head = tl.program_id(1) * HEADS
    for head in range(first_head, min(first_head + HEADS, Q_HEADS + KV_HEADS)):
        if head < Q_HEADS:
            low, high = _normed_halves(q_ptr + token * stride_qt + head * D, offs, eps, HALF)
            low, high = low * tl.load(q_weight_ptr + offs), high * tl.load(q_weight_ptr + HALF + offs)
            turned_low, turned_high = _turned(low, high, cos, sin, dtype)
            dst = q_out_ptr + (tl.cast(head, tl.int64) * tokens + token) * D
            tl.store(dst + low_place, tl.where(is_turned, turned_low, low * k_low).to(dtype))
            tl.store(dst + high_place, tl.where(is_turned, turned_high, high * k_high).to(dtype))
        else:
            low, high = _normed_halves(k_ptr + token * stride_kt + (head - Q_HEADS) * D, offs, eps, HALF)
            turned_low, turned_high = _turned(low * k_low, high * k_high, cos, sin, dtype)
            dst = rows_ptr + tl.cast(head - Q_HEADS, tl.int64) * stride_rh + row * stride_rt
            tl.store(dst + offs, turned_low.to(dtype), mask=is_turned)
            tl.store(dst + R // 2 + offs, turned_high.to(dtype), mask=is_turned)
            tl.store(dst + R + low_place, low.to(dtype))
            tl.store(dst + R + high_place, high.to(dtype))


@triton.jit
def _normed_halves(src, offs, eps, HALF: tl.constexpr):
    """The two halves of one head, float32, divided by the head's root mean square."""
    low, high = tl.load(src + offs).to(tl.float32), tl.load(src + HALF + offs).to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * HALF) + eps)
    return low * inv_rms, high * inv_rms


@triton.jit
def _turned(low, high, cos, sin, dtype: tl.constexpr):
    """The halves of a head, rounded to `dtype` and turned."""
    low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


# ---------------------------------------------------------------------------------------------------------- ops


def _check(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, inv_freq: Tensor, input_pos: Tensor, rotated: int
) -> None:
    check_projections(q, k, None, q_weight, k_weight, inv_freq, input_pos)
    head_dim = q_weight.shape[0]
    if rotated % 2 or not 2 <= rotated <= head_dim:
        raise ValueError(f"rotated must be an even number of the {head_dim} dimensions, got {rotated}")


def _check_cache(k: Tensor, kv_cache: Tensor, head_dim: int, rotated: int) -> None:
    """Raise ValueError unless the cache is [1, Hkv, L, D + R] for k [T, Hkv * D]."""
    kv_heads, columns = k.shape[1] // head_dim, head_dim + rotated
    fits = kv_cache.dim() == 4 and kv_cache.shape[:2] == (1, kv_heads) and kv_cache.shape[3] == columns
    if not fits or kv_cache.stride(3) != 1 or kv_cache.dtype != k.dtype:
        found = f"{kv_cache.dtype} {list(kv_cache.shape)}"
        raise ValueError(f"kv_cache must be {k.dtype} [1, {kv_heads}, L, {columns}] with contiguous rows, got {found}")


def tied_norm_rope_launch(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rows: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    into_cache: bool,
) -> Tensor:
    """Run the kernel; fills rows [1, Hkv, T or L, D + R], returns queries [1, Hq, T, D]."""
    tokens, head_dim = q.shape[0], q_weight.shape[0]
    q_heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    heads = 1 if into_cache else PREFILL_HEADS
    q_out = q.new_empty((1, q_heads, tokens, head_dim))
    wrap_triton(_tied_norm_rope_kernel)[(tokens, triton.cdiv(q_heads + kv_heads, heads))](
        q_ptr=q,
        k_ptr=k,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        inv_freq_ptr=inv_freq,
        input_pos_ptr=input_pos,
        q_out_ptr=q_out,
        rows_ptr=rows,
        stride_qt=q.stride(0),
        stride_kt=k.stride(0),
        stride_rh=rows.stride(1),
        stride_rt=rows.stride(2),
        tokens=tokens,
        cache_len=rows.shape[2],
        eps=eps,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        R=rows.shape[3] - head_dim,
        INTO_CACHE=into_cache,
        HEADS=heads,
        num_warps=4 if into_cache else 1,
        **dependent_launch_options(q.device),
    )
    return q_out


@triton_op("gemma4::tied_norm_rope", mutates_args={})
def tied_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    rotated: int,
) -> tuple[Tensor, Tensor]:
    """Queries [1, Hq, T, D] and rows [1, Hkv, T, D + rotated] from projections q, k [T, H * D].

    q_weight, k_weight float32 [D]; inv_freq float32 [D/2], its first rotated / 2 are used; input_pos int64 [T].
    Raises ValueError on shapes, dtypes or strides that do not fit.
    """
    _check(q, k, q_weight, k_weight, inv_freq, input_pos, rotated)
    if q.device.type == "cpu":
        return tied_norm_rope_reference(q, k, q_weight, k_weight, inv_freq, input_pos, eps, rotated)
    rows = _empty_rows(k, q_weight.shape[0], rotated)
    return tied_norm_rope_launch(q, k, q_weight, k_weight, rows, inv_freq, input_pos, eps, into_cache=False), rows


def _empty_rows(k: Tensor, head_dim: int, rotated: int) -> Tensor:
    return k.new_empty((1, k.shape[1] // head_dim, k.shape[0], head_dim + rotated))


@tied_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    rotated: int,
) -> tuple[Tensor, Tensor]:
    _check(q, k, q_weight, k_weight, inv_freq, input_pos, rotated)
    head_dim = q_weight.shape[0]
    return q.new_empty((1, q.shape[1] // head_dim, q.shape[0], head_dim)), _empty_rows(k, head_dim, rotated)


@triton_op("gemma4::tied_norm_rope_cache", mutates_args={"kv_cache"})
def tied_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    kv_cache: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
) -> Tensor:
    """As `tied_norm_rope`, rows written to slot input_pos % L of kv_cache [1, Hkv, L, D + R]; returns the queries."""
    head_dim = q_weight.shape[0]
    rotated = kv_cache.shape[-1] - head_dim
    _check(q, k, q_weight, k_weight, inv_freq, input_pos, rotated)
    _check_cache(k, kv_cache, head_dim, rotated)
    if q.device.type == "cpu":
        queries, rows = tied_norm_rope_reference(q, k, q_weight, k_weight, inv_freq, input_pos, eps, rotated)
        kv_cache.index_copy_(2, input_pos % kv_cache.shape[2], rows)
        return queries
    return tied_norm_rope_launch(q, k, q_weight, k_weight, kv_cache, inv_freq, input_pos, eps, into_cache=True)


@tied_norm_rope_cache.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    kv_cache: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
) -> Tensor:
    head_dim = q_weight.shape[0]
    rotated = kv_cache.shape[-1] - head_dim
    _check(q, k, q_weight, k_weight, inv_freq, input_pos, rotated)
    _check_cache(k, kv_cache, head_dim, rotated)
    return q.new_empty((1, q.shape[1] // head_dim, q.shape[0], head_dim))
