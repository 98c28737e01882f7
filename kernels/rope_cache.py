"""RMS norm of every query and key head, rotary embedding, and the write into the KV cache, in one kernel.

    q, k:  y = (x * rsqrt(mean(x^2) + eps) * weight) in x's dtype, then pairs (y[i], y[i + D/2]) turned by the angle
           position * inv_freq[i]
    v:     x * rsqrt(mean(x^2) + eps) where `v_norm` (Gemma 4), x itself elsewhere (Gemma 3); never turned

q [T, Hq * D], k and v [T, Hkv * D] are rows of the projections, strided where they are slices of one fused output. In
layers whose values are the keys, v is None and the raw key rows take its place. inv_freq float32 [D/2] is zero for
pairs that stay (proportional RoPE). The arithmetic is float32; the angle is formed and reduced to [-pi, pi] in float64,
because a float32 product is off by 0.01 rad at position 262143.

`qk_norm_rope` returns q, k, v as [1, H, T, D] (prefill attends before it writes); `qk_norm_rope_cache` writes k and v
into slot position % L of caches [1, Hkv, L, D] and returns q (decode). Origin: rotary embedding of Su et al. (2021) in
the two-halves order of GPT-NeoX.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.dependent_launch import await_inputs, dependent_launch_options

PREFILL_HEADS = 8  # heads that share the angles of one token where there are tokens enough to fill the device
TWO_PI = tl.constexpr(2.0 * math.pi)

# ---------------------------------------------------------------------------------------------------- reference


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded to x's dtype once."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rotate(x: Tensor, input_pos: Tensor, inv_freq: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [H, T, D] by input_pos[t] * inv_freq[i]."""
    angle = input_pos[:, None].double() * inv_freq.double()
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    low, high = x.to(dtype).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `qk_norm_rope`, in torch."""
    head_dim = q_weight.shape[0]
    q_heads, k_heads, v_heads = (
        x.view(x.shape[0], -1, head_dim).transpose(0, 1) for x in (q, k, k if v is None else v)
    )
    q_out = rotate(rms_norm(q_heads, q_weight, eps), input_pos, inv_freq)
    k_out = rotate(rms_norm(k_heads, k_weight, eps), input_pos, inv_freq)
    v_out = rms_norm(v_heads, None, eps) if v_norm else v_heads.clone(memory_format=torch.contiguous_format)
    return q_out[None], k_out[None], v_out.contiguous()[None]


def qk_norm_rope_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
) -> Tensor:
    """The definition of `qk_norm_rope_cache`, in torch."""
    q_out, k_out, v_out = qk_norm_rope_reference(q, k, v, q_weight, k_weight, inv_freq, input_pos, eps, v_norm)
    slots = input_pos % k_cache.shape[2]
    k_cache.index_copy_(2, slots, k_out.to(k_cache.dtype))
    v_cache.index_copy_(2, slots, v_out.to(v_cache.dtype))
    return q_out


# ------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _qk_norm_rope_kernel(
    q_ptr,  # [T, Hq * D], row stride stride_qt
    k_ptr,  # [T, Hkv * D], row stride stride_kt
    v_ptr,  # [T, Hkv * D], row stride stride_vt
    q_weight_ptr,  # [D] float32
    k_weight_ptr,  # [D] float32
    inv_freq_ptr,  # [D / 2] float32
    input_pos_ptr,  # [T] int64
    q_out_ptr,  # [Hq, T, D]
    k_out_ptr,  # [Hkv, T, D], or the cache [Hkv, L, D]
    v_out_ptr,  # like k_out_ptr
    stride_qt,
    stride_kt,
    stride_vt,
    stride_koh,
    stride_kot,
    stride_voh,
    stride_vot,
    tokens,
    cache_len,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    V_NORM: tl.constexpr,
    INTO_CACHE: tl.constexpr,
    HEADS: tl.constexpr,  # heads of one program, of Q_HEADS + 2 * KV_HEADS
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
    first_head = tl.program_id(1) * HEADS
    for head in range(first_head, min(first_head + HEADS, Q_HEADS + 2 * KV_HEADS)):
        if head < Q_HEADS:
            src = q_ptr + token * stride_qt + head * D
            dst = q_out_ptr + (tl.cast(head, tl.int64) * tokens + token) * D
            _norm_rope_head(src, dst, q_weight_ptr, cos, sin, eps, offs, HALF)
        elif head < Q_HEADS + KV_HEADS:
            src = k_ptr + token * stride_kt + (head - Q_HEADS) * D
            dst = k_out_ptr + tl.cast(head - Q_HEADS, tl.int64) * stride_koh + row * stride_kot
            _norm_rope_head(src, dst, k_weight_ptr, cos, sin, eps, offs, HALF)
        else:
            src = v_ptr + token * stride_vt + (head - Q_HEADS - KV_HEADS) * D
            dst = v_out_ptr + tl.cast(head - Q_HEADS - KV_HEADS, tl.int64) * stride_voh + row * stride_vot
            low = tl.load(src + offs).to(tl.float32)
            high = tl.load(src + HALF + offs).to(tl.float32)
            if V_NORM:
                inv_rms = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * HALF) + eps)
                low, high = low * inv_rms, high * inv_rms
            tl.store(dst + offs, low.to(src.dtype.element_ty).to(dst.dtype.element_ty))
            tl.store(dst + HALF + offs, high.to(src.dtype.element_ty).to(dst.dtype.element_ty))


@triton.jit
def _norm_rope_head(src, dst, weight_ptr, cos, sin, eps, offs, HALF: tl.constexpr):
    """One head: normalize, round to the input's dtype, turn, store."""
    low = tl.load(src + offs).to(tl.float32)
    high = tl.load(src + HALF + offs).to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * HALF) + eps)
    low = (low * inv_rms * tl.load(weight_ptr + offs)).to(src.dtype.element_ty).to(tl.float32)
    high = (high * inv_rms * tl.load(weight_ptr + HALF + offs)).to(src.dtype.element_ty).to(tl.float32)
    tl.store(dst + offs, (low * cos - high * sin).to(src.dtype.element_ty).to(dst.dtype.element_ty))
    tl.store(dst + HALF + offs, (high * cos + low * sin).to(src.dtype.element_ty).to(dst.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------- ops


def check_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
) -> None:
    """Raise ValueError unless the projections, weights and frequencies agree on T, D and dtype."""
    head_dim = q_weight.shape[0]
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two, got {head_dim}")
    for name, x in (("q", q), ("k", k), ("v", k if v is None else v)):
        if x.dim() != 2 or x.shape[0] != q.shape[0] or x.shape[1] % head_dim or x.stride(1) != 1:
            raise ValueError(
                f"{name} must be [T, H * {head_dim}] with contiguous rows, got {list(x.shape)} strides {x.stride()}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} like q, got {x.dtype}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v must be {list(k.shape)} like k, got {list(v.shape)}")
    for name, weight, size in (("k_weight", k_weight, head_dim), ("inv_freq", inv_freq, head_dim // 2)):
        if weight.shape != (size,):
            raise ValueError(f"{name} must be [{size}], got {list(weight.shape)}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight), ("inv_freq", inv_freq)):
        if weight.dtype != torch.float32 or weight.stride(0) != 1:
            raise ValueError(f"{name} must be contiguous float32, got {weight.dtype} strides {weight.stride()}")
    if input_pos.dtype != torch.int64 or input_pos.dim() != 1 or input_pos.shape[0] != q.shape[0]:
        raise ValueError(f"input_pos must be int64 [{q.shape[0]}], got {input_pos.dtype} {list(input_pos.shape)}")


def _check_caches(k: Tensor, k_cache: Tensor, v_cache: Tensor, head_dim: int) -> None:
    """Raise ValueError unless the caches are [1, Hkv, L, D] for k [T, Hkv * D]."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        kv_heads = k.shape[1] // head_dim
        if cache.dim() != 4 or cache.shape[:2] != (1, kv_heads) or cache.shape[3] != head_dim:
            raise ValueError(f"{name} must be [1, {kv_heads}, L, {head_dim}], got {list(cache.shape)}")
        if cache.shape != k_cache.shape or cache.stride(3) != 1:
            raise ValueError(f"{name} must have the shape of k_cache and contiguous rows")


def qk_norm_rope_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
    into_cache: bool,
) -> Tensor:
    """Run the kernel; fills k_out and v_out [1, Hkv, T or L, D], returns q [1, Hq, T, D]."""
    v = k if v is None else v
    tokens, head_dim = q.shape[0], q_weight.shape[0]
    q_heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    heads = 1 if into_cache else PREFILL_HEADS
    q_out = q.new_empty((1, q_heads, tokens, head_dim))
    wrap_triton(_qk_norm_rope_kernel)[(tokens, triton.cdiv(q_heads + 2 * kv_heads, heads))](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        inv_freq_ptr=inv_freq,
        input_pos_ptr=input_pos,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        v_out_ptr=v_out,
        stride_qt=q.stride(0),
        stride_kt=k.stride(0),
        stride_vt=v.stride(0),
        stride_koh=k_out.stride(1),
        stride_kot=k_out.stride(2),
        stride_voh=v_out.stride(1),
        stride_vot=v_out.stride(2),
        tokens=tokens,
        cache_len=k_out.shape[2],
        eps=eps,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        V_NORM=v_norm,
        INTO_CACHE=into_cache,
        HEADS=heads,
        num_warps=4 if into_cache else 1,
        **dependent_launch_options(q.device),
    )
    return q_out


@triton_op("gemma4::qk_norm_rope", mutates_args={})
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized and rotated q [1, Hq, T, D], k and v [1, Hkv, T, D] from projections [T, H * D].

    q_weight, k_weight float32 [D]; inv_freq float32 [D/2]; input_pos int64 [T]. v None: the values are the raw k.
    Raises ValueError on shapes, dtypes or strides that do not fit.
    """
    check_projections(q, k, v, q_weight, k_weight, inv_freq, input_pos)
    if q.device.type == "cpu":
        return qk_norm_rope_reference(q, k, v, q_weight, k_weight, inv_freq, input_pos, eps, v_norm)
    head_dim = q_weight.shape[0]
    k_out = k.new_empty((1, k.shape[1] // head_dim, k.shape[0], head_dim))
    v_out = torch.empty_like(k_out)
    q_out = qk_norm_rope_launch(
        q, k, v, q_weight, k_weight, k_out, v_out, inv_freq, input_pos, eps, v_norm, into_cache=False
    )
    return q_out, k_out, v_out


@qk_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_projections(q, k, v, q_weight, k_weight, inv_freq, input_pos)
    head_dim = q_weight.shape[0]
    k_out = k.new_empty((1, k.shape[1] // head_dim, k.shape[0], head_dim))
    q_out = q.new_empty((1, q.shape[1] // head_dim, q.shape[0], head_dim))
    return q_out, k_out, torch.empty_like(k_out)


@triton_op("gemma4::qk_norm_rope_cache", mutates_args={"k_cache", "v_cache"})
def qk_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
) -> Tensor:
    """As `qk_norm_rope`, with k and v written to slot input_pos % L of the caches [1, Hkv, L, D]; returns q."""
    check_projections(q, k, v, q_weight, k_weight, inv_freq, input_pos)
    _check_caches(k, k_cache, v_cache, q_weight.shape[0])
    run = qk_norm_rope_cache_reference
    if q.device.type == "cpu":
        return run(q, k, v, q_weight, k_weight, k_cache, v_cache, inv_freq, input_pos, eps, v_norm)
    return qk_norm_rope_launch(
        q, k, v, q_weight, k_weight, k_cache, v_cache, inv_freq, input_pos, eps, v_norm, into_cache=True
    )


@qk_norm_rope_cache.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    inv_freq: Tensor,
    input_pos: Tensor,
    eps: float,
    v_norm: bool,
) -> Tensor:
    check_projections(q, k, v, q_weight, k_weight, inv_freq, input_pos)
    _check_caches(k, k_cache, v_cache, q_weight.shape[0])
    head_dim = q_weight.shape[0]
    return q.new_empty((1, q.shape[1] // head_dim, q.shape[0], head_dim))
