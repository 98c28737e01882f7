"""Writes new keys and values into a TurboQuant cache: rotate, encode, pack, by position on the device.

k, v [1, Hkv, T, D]: normalized, rotary embedding applied to k. Codes uint8 [1, Hkv, L, C * bits / 8] and scales float32
[1, Hkv, L], as `gemma4.kernels.turboquant` defines them; position p is slot p. v has C = D. k has C = D, or fewer where
the values serve as keys in the dimensions that rotary embedding leaves (`gemma4.kernels.tq4_rotation`). One program
encodes one vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.tq4_rotation import hadamard, signs, turned_offsets, turned_part
from gemma4.kernels.turboquant import BITS, MIN_DIM, codebook, encode, rotate

# ---------------------------------------------------------------------------------------------------- reference


def tq4_write_reference(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor, input_pos: Tensor
) -> None:
    """The definition, in torch."""
    bits, turned = code_widths(int(v.shape[3]), k_codes, v_codes)
    for x, codes, scale in ((turned_part(k, turned), k_codes, k_scale), (v, v_codes, v_scale)):
        new_codes, new_scale = encode(rotate(x).float(), bits)
        codes.index_copy_(2, input_pos, new_codes)
        scale.index_copy_(2, input_pos, new_scale)


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
    input_pos_ptr,  # [T] int64
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    length,
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
    slot = head * length + tl.load(input_pos_ptr + token)
    if tl.program_id(1) < KV_HEADS:
        k_row = k_ptr + head * stride_kh + token * stride_kt
        k = tl.load(k_row + turned_offsets(D, TURNED)).to(tl.float32)
        k = hadamard(k * signs(TURNED), TURNED)
        _encode(k, k_codes_ptr + slot * (TURNED * BITS // 8), k_scale_ptr + slot, TURNED, BITS, K_GAIN, K_P, K_Q)
    else:
        v = tl.load(v_ptr + head * stride_vh + token * stride_vt + tl.arange(0, D)).to(tl.float32)
        v = hadamard(v * signs(D), D)
        _encode(v, v_codes_ptr + slot * (D * BITS // 8), v_scale_ptr + slot, D, BITS, V_GAIN, V_P, V_Q)


# ----------------------------------------------------------------------------------------------------------- op


def code_widths(head_dim: int, k_codes: Tensor, v_codes: Tensor) -> tuple[int, int]:
    """(bits of a code, dimensions of k that have codes) of a cache for heads of `head_dim`."""
    bits = int(v_codes.shape[-1]) * 8 // head_dim
    return bits, int(k_codes.shape[-1]) * 8 // max(bits, 1)


def check_codes(
    head_dim: int, kv_heads: int, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor
) -> None:
    """Raise ValueError unless codes and scales are a TurboQuant cache for `kv_heads` heads of `head_dim`."""
    if head_dim < MIN_DIM or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two from {MIN_DIM} on, got {head_dim}")
    bits, turned = code_widths(head_dim, k_codes, v_codes)
    if bits not in BITS or not MIN_DIM <= turned <= head_dim or turned & (turned - 1):
        widths = " or ".join(str(head_dim * b // 8) for b in BITS)
        raise ValueError(
            f"v_codes must have {widths} bytes for each of {head_dim} dimensions and k_codes as many or fewer by a "
            f"power of two, got {v_codes.shape[-1]} and {k_codes.shape[-1]}"
        )
    length = k_codes.shape[2]
    for name, codes, dim in (("k_codes", k_codes, turned), ("v_codes", v_codes, head_dim)):
        if codes.shape != (1, kv_heads, length, dim * bits // 8) or codes.dtype != torch.uint8:
            raise ValueError(
                f"{name} must be uint8 [1, {kv_heads}, {length}, {dim * bits // 8}], "
                f"got {codes.dtype} {list(codes.shape)}"
            )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.shape != (1, kv_heads, length) or scale.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 [1, {kv_heads}, {length}], got {scale.dtype} {list(scale.shape)}")
    if not all(x.is_contiguous() for x in (k_codes, k_scale, v_codes, v_scale)):
        raise ValueError("codes and scales must be contiguous")


def _check(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor, input_pos: Tensor
) -> None:
    if k.dim() != 4 or k.shape[0] != 1 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v must be [1, Hkv, T, D] alike, got {k.dtype} {list(k.shape)}, {list(v.shape)}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("k and v must be contiguous along D")
    check_codes(int(k.shape[3]), int(k.shape[1]), k_codes, k_scale, v_codes, v_scale)
    if input_pos.dim() != 1 or input_pos.shape[0] != k.shape[2] or input_pos.dtype != torch.int64:
        raise ValueError(f"input_pos must be int64 [{k.shape[2]}], got {input_pos.dtype} {list(input_pos.shape)}")


def tq4_write_launch(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor, input_pos: Tensor
) -> None:
    """Run the kernel."""
    _, kv_heads, tokens, head_dim = k.shape
    bits, turned = code_widths(head_dim, k_codes, v_codes)
    k_book, v_book = codebook(turned, bits), codebook(head_dim, bits)
    wrap_triton(_tq4_write_kernel)[(tokens, 2 * kv_heads)](
        k_ptr=k,
        v_ptr=v,
        k_codes_ptr=k_codes,
        k_scale_ptr=k_scale,
        v_codes_ptr=v_codes,
        v_scale_ptr=v_scale,
        input_pos_ptr=input_pos,
        stride_kh=k.stride(1),
        stride_kt=k.stride(2),
        stride_vh=v.stride(1),
        stride_vt=v.stride(2),
        length=k_codes.shape[2],
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


@triton_op("gemma4::tq4_write", mutates_args={"k_codes", "k_scale", "v_codes", "v_scale"})
def tq4_write(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor, input_pos: Tensor
) -> None:
    """Encode k, v [1, Hkv, T, D] into slots input_pos [T] int64 of the cache.

    Raises ValueError on shapes, dtypes or strides that do not fit. Positions are not checked: they stay on the device.
    """
    _check(k, v, k_codes, k_scale, v_codes, v_scale, input_pos)
    run = tq4_write_reference if k.device.type == "cpu" else tq4_write_launch
    run(k, v, k_codes, k_scale, v_codes, v_scale, input_pos)


@tq4_write.register_fake
def _(
    k: Tensor, v: Tensor, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor, input_pos: Tensor
) -> None:
    _check(k, v, k_codes, k_scale, v_codes, v_scale, input_pos)
