"""A slice of a TurboQuant cache as keys and values in the model's basis: what prefill attends to, slice by slice.

The cache is as `gemma4.kernels.tq4_cache` describes it. Where values serve as keys (k_weight [D] is given), k_codes
hold the dimensions that rotary embedding turns, and k = v * k_weight in the rest (`gemma4.kernels.tq4_rotation`). One
program decodes the key and the value of one position and head; those past the last of the positions stay unwritten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_rotation import hadamard, signs, turned_offsets
from gemma4.kernels.tq4_tile import curve_bits, level
from gemma4.kernels.turboquant import decode, rotate_back

# ---------------------------------------------------------------------------------------------------- reference


def tq4_rows_reference(cache: TQ4Cache, k_weight: Tensor | None, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, Hkv, L, D] of all slots, in float32."""
    _, turned = cache.widths(head_dim)
    keys, values = decode(cache.k_codes, cache.k_scale, turned), decode(cache.v_codes, cache.v_scale, head_dim)
    first_key, first_value = cache.first_key[:, :, None].tensor_split((turned,), -1)
    keys = rotate_back(torch.cat((first_key, keys[:, :, 1:]), 2))
    if k_weight is not None:
        shared = rotate_back(torch.cat((first_value, values[:, :, 1:]), 2))
        joint = (shared * k_weight).unflatten(-1, (2, -1))
        joint[..., : turned // 2] = keys.unflatten(-1, (2, -1))
        keys = joint.flatten(-2)
    return keys, rotate_back(values)


# ------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _decode(codes_ptr, scale, D: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """float32 [D]: the vector of the codes at codes_ptr, turned back."""
    i = tl.arange(0, D)
    quarter, at = i // (D // 4), i % (D // 4)
    half, second = quarter // 2, quarter % 2
    code = tl.load(codes_ptr + second * (D // 4) + at).to(tl.int32) >> (4 * half) & 15
    if BITS == 6:
        code = code * 4 + (tl.load(codes_ptr + D // 2 + at).to(tl.int32) >> (2 * half + 4 * second) & 3)
    return hadamard(level(code, BITS, P, Q).to(tl.float32) * scale, D) * signs(D)


@triton.jit
def _turned_back(ptr, D: tl.constexpr):
    """float32 [D]: the rotated vector at ptr, turned back."""
    return hadamard(tl.load(ptr + tl.arange(0, D)), D) * signs(D)


@triton.jit
def _tq4_rows_kernel(
    k_codes_ptr,  # [Hkv, L, TURNED * BITS / 8]
    k_scale_ptr,  # [Hkv, L]
    v_codes_ptr,  # [Hkv, L, D * BITS / 8]
    v_scale_ptr,  # [Hkv, L]
    first_key_ptr,  # [Hkv, TURNED + D] where TURNED < D, else [Hkv, D]
    k_weight_ptr,  # [D] float32, read only where TURNED < D
    input_pos_ptr,  # [T] int64
    slice_ptr,  # [Hkv, KEYS, 2, D]: keys and values of positions begin, begin + 1, ...
    room,
    keys,
    begin,
    tokens,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    BITS: tl.constexpr,
    K_P: tl.constexpr,
    K_Q: tl.constexpr,
    V_P: tl.constexpr,
    V_Q: tl.constexpr,
):
    position = begin + tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if position <= tl.load(input_pos_ptr + tokens - 1):
        slot = head * room + position
        row = slice_ptr + (head * keys + tl.program_id(0)) * (2 * D)
        offs = tl.arange(0, D)
        v = _decode(v_codes_ptr + slot * (D * BITS // 8), tl.load(v_scale_ptr + slot), D, BITS, V_P, V_Q)
        tl.store(row + D + offs, v.to(slice_ptr.dtype.element_ty))
        k = _decode(k_codes_ptr + slot * (TURNED * BITS // 8), tl.load(k_scale_ptr + slot), TURNED, BITS, K_P, K_Q)
        first_key_ptr += head * (TURNED + D if TURNED < D else D)
        if position == 0:
            k = _turned_back(first_key_ptr, TURNED)
        tl.store(row + turned_offsets(D, TURNED), k.to(slice_ptr.dtype.element_ty))
        if TURNED < D:
            if position == 0:
                v = _turned_back(first_key_ptr + TURNED, D)
            is_rest = offs % (D // 2) >= TURNED // 2
            shared = v * tl.load(k_weight_ptr + offs)
            tl.store(row + offs, shared.to(slice_ptr.dtype.element_ty), mask=is_rest)


def launch_tq4_rows(cache: TQ4Cache, k_weight: Tensor | None, input_pos: Tensor, begin: int, rows: Tensor) -> None:
    """Fill rows [Hkv, KEYS, 2, D] with the cache's positions from `begin` on, as far as input_pos [T] reaches."""
    kv_heads, keys, _, head_dim = rows.shape
    bits, turned = cache.widths(head_dim)
    k_p, k_q = curve_bits(turned, bits)
    v_p, v_q = curve_bits(head_dim, bits)
    wrap_triton(_tq4_rows_kernel)[(keys, kv_heads)](
        **cache.pointers(),
        k_weight_ptr=cache.v_scale if k_weight is None else k_weight,
        input_pos_ptr=input_pos,
        slice_ptr=rows,
        room=cache.room,
        keys=keys,
        begin=begin,
        tokens=input_pos.shape[0],
        D=head_dim,
        TURNED=turned,
        BITS=bits,
        K_P=k_p,
        K_Q=k_q,
        V_P=v_p,
        V_Q=v_q,
        num_warps=1,
    )
