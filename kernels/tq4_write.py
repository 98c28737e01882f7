"""Writes new keys and values into a TurboQuant cache: rotate, encode, pack, by position on the device.

k, v [1, Hkv, T, D]: normalized, rotary embedding applied to k. The cache is as `gemma4.kernels.tq4_cache` describes it.
One program encodes one vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_rotation import hadamard, signs, turned_offsets, turned_part
from gemma4.kernels.turboquant import codebook, encode, rotate

# ---------------------------------------------------------------------------------------------------- reference


def tq4_write_reference(k: Tensor, v: Tensor, cache: TQ4Cache, input_pos: Tensor) -> None:
    """The definition, in torch."""
    bits, turned = cache.widths(int(v.shape[3]))
    rotated = rotate(turned_part(k, turned)).float(), rotate(v).float()
    for y, codes, scale in zip(rotated, cache[0:4:2], cache[1:4:2], strict=True):
        new_codes, new_scale = encode(y, bits)
        codes.index_copy_(2, input_pos, new_codes)
        scale.index_copy_(2, input_pos, new_scale)
    new_key = torch.cat(rotated, -1)[:, :, 0, : cache.first_key.shape[2]]
    cache.first_key.copy_(torch.where(input_pos[0] == 0, new_key, cache.first_key))


# ------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _encode(
    y,  # [D] float32, rotated
    codes_ptr,  # uint8, the D * BITS / 8 bytes of this vector
    scale_ptr,  # float32, its scale
    D: tl.constexpr,
    BITS: tl.constexpr,
    GAIN: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    N: tl.constexpr = 2**BITS
    HALF: tl.constexpr = N // 2
    square = tl.sum(y * y, 0)
    size = tl.abs(y) * tl.where(square > 0.0, tl.rsqrt(square / D), 0.0)
    passed = tl.zeros([D], tl.int32)
    for i in tl.static_range(HALF - 1):
        low = (2 * i + 1) / N
        high = (2 * i + 3) / N
        low_level = low * ((low * low + P) * (low * low + P) + Q)
        high_level = high * ((high * high + P) * (high * high + P) + Q)
        passed += (size > GAIN * (low_level + high_level) / 2).to(tl.int32)
    code = tl.where(y < 0.0, HALF - 1 - passed, HALF + passed)
    u = (2 * code + 1 - N).to(tl.float32) / N
    w = u * u + P
    dot = tl.sum(y * (u * (w * w + Q)), 0)
    tl.store(scale_ptr, tl.where(dot > 0.0, square / dot, 0.0))
    quarter = tl.arange(0, D) // (D // 4)
    half, second = quarter // 2, quarter % 2
    nibbles = tl.sum(tl.reshape((code >> (BITS - 4)) << (4 * half), (2, D // 2)), 0)
    tl.store(codes_ptr + tl.arange(0, D // 2), nibbles.to(tl.uint8))
    if BITS == 6:
        fine = tl.sum(tl.reshape((code & 3) << (2 * half + 4 * second), (4, D // 4)), 0)
        tl.store(codes_ptr + D // 2 + tl.arange(0, D // 4), fine.to(tl.uint8))


@triton.jit
def _tq4_write_kernel(
    k_ptr,  # [Hkv, T, D]
    v_ptr,  # [Hkv, T, D]
    k_codes_ptr,  # [Hkv, L, TURNED * BITS / 8]
    k_scale_ptr,  # [Hkv, L]
    v_codes_ptr,  # [Hkv, L, D * BITS / 8]
    v_scale_ptr,  # [Hkv, L]
    first_key_ptr,  # [Hkv, TURNED + D] where TURNED < D, else [Hkv, D]
    input_pos_ptr,  # [T] int64
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    room,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    BITS: tl.constexpr,
    K_GAIN: tl.constexpr,
    K_P: tl.constexpr,
    K_Q: tl.constexpr,
    V_GAIN: tl.constexpr,
    V_P: tl.constexpr,
    V_Q: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    position = tl.load(input_pos_ptr + token)
    slot = head * room + position
    first_key_ptr += head * (TURNED + D if TURNED < D else D)
    if tl.program_id(1) < KV_HEADS:
        k_row = k_ptr + head * stride_kh + token * stride_kt
        k = tl.load(k_row + turned_offsets(D, TURNED)).to(tl.float32)
        k = hadamard(k * signs(TURNED), TURNED)
        if position == 0:
            tl.store(first_key_ptr + tl.arange(0, TURNED), k)
        _encode(k, k_codes_ptr + slot * (TURNED * BITS // 8), k_scale_ptr + slot, TURNED, BITS, K_GAIN, K_P, K_Q)
    else:
        v = tl.load(v_ptr + head * stride_vh + token * stride_vt + tl.arange(0, D)).to(tl.float32)
        v = hadamard(v * signs(D), D)
        if TURNED < D and position == 0:
            tl.store(first_key_ptr + TURNED + tl.arange(0, D), v)
        _encode(v, v_codes_ptr + slot * (D * BITS // 8), v_scale_ptr + slot, D, BITS, V_GAIN, V_P, V_Q)


# ----------------------------------------------------------------------------------------------------------- op


def _check(k: Tensor, v: Tensor, cache: TQ4Cache, input_pos: Tensor) -> None:
    if k.dim() != 4 or k.shape[0] != 1 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v must be [1, Hkv, T, D] alike, got {k.dtype} {list(k.shape)}, {list(v.shape)}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("k and v must be contiguous along D")
    cache.check(int(k.shape[3]), int(k.shape[1]))
    if input_pos.dim() != 1 or input_pos.shape[0] != k.shape[2] or input_pos.dtype != torch.int64:
        raise ValueError(f"input_pos must be int64 [{k.shape[2]}], got {input_pos.dtype} {list(input_pos.shape)}")


def tq4_write_launch(k: Tensor, v: Tensor, cache: TQ4Cache, input_pos: Tensor) -> None:
    """Run the kernel."""
    _, kv_heads, tokens, head_dim = k.shape
    bits, turned = cache.widths(head_dim)
    k_book, v_book = codebook(turned, bits), codebook(head_dim, bits)
    wrap_triton(_tq4_write_kernel)[(tokens, 2 * kv_heads)](
        k_ptr=k,
        v_ptr=v,
        **cache.pointers(),
        input_pos_ptr=input_pos,
        stride_kh=k.stride(1),
        stride_kt=k.stride(2),
        stride_vh=v.stride(1),
        stride_vt=v.stride(2),
        room=cache.room,
        KV_HEADS=kv_heads,
        D=head_dim,
        TURNED=turned,
        BITS=bits,
        K_GAIN=k_book.gain,
        K_P=k_book.p,
        K_Q=k_book.q,
        V_GAIN=v_book.gain,
        V_P=v_book.p,
        V_Q=v_book.q,
        num_warps=1,
    )


@triton_op("gemma4::tq4_write", mutates_args={"k_codes", "k_scale", "v_codes", "v_scale", "first_key"})
def tq4_write(
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    first_key: Tensor,
    input_pos: Tensor,
) -> None:
    """Encode k, v [1, Hkv, T, D] into slots input_pos [T] int64, consecutive, of the cache.

    Raises ValueError on shapes, dtypes or strides that do not fit. Positions are not checked: they stay on the device.
    """
    cache = TQ4Cache(k_codes, k_scale, v_codes, v_scale, first_key)
    _check(k, v, cache, input_pos)
    run = tq4_write_reference if k.device.type == "cpu" else tq4_write_launch
    run(k, v, cache, input_pos)


@tq4_write.register_fake
def _(
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    first_key: Tensor,
    input_pos: Tensor,
) -> None:
    _check(k, v, TQ4Cache(k_codes, k_scale, v_codes, v_scale, first_key), input_pos)
