"""Attention of a chunk of tokens over a TurboQuant cache: the prefill half of `gemma4::tq4_sdpa`.

A tile holds BLOCK_M rows (token, query head of the group), token major, so all heads of a group share the keys that are
decoded for them and the causal edge cuts few keys. A last kernel rotates the result back, in place.
Method: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.decode_attention import LOG2_E
from gemma4.kernels.prefill_attention import device_limits
from gemma4.kernels.tq4_rotation import launch_rotate_back
from gemma4.kernels.tq4_tile import curve_bits, load_levels, load_quarters
from gemma4.kernels.tq4_write import code_widths


@dataclass(frozen=True, slots=True)
class TQ4PrefillConfig:
    """Shape of one launch: rows and keys of a tile. `wgmma`: for Hopper's warpgroup instructions."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    wgmma: bool

    def shared_bytes(self, key_dim: int, head_dim: int, bits: int) -> int:
        """Upper bound of the shared memory of one program: levels and codes of a tile, queries, weights, scales."""
        is_tied = key_dim < head_dim
        width = key_dim + head_dim
        levels = self.block_n * (width if is_tied else head_dim) * 2  # without k: one after the other
        codes = max(1, self.num_stages - 1) * self.block_n * (width * bits // 8 + 8)
        queries = (key_dim + head_dim * is_tied) * self.block_m * 2
        exchange = self.block_m * self.block_n * 4
        return levels + codes + queries + exchange + 1024

    def fits(self, key_dim: int, head_dim: int, bits: int, shared_limit: int) -> bool:
        """Whether the float32 output tile stays in registers and the rest in shared memory."""
        accumulator = self.block_m * head_dim // (32 * self.num_warps)
        most = 128 if self.wgmma else 64
        return accumulator <= most and self.shared_bytes(key_dim, head_dim, bits) <= shared_limit


# Best first. A launch takes the first that suits the device.
CONFIGS = (
    TQ4PrefillConfig(block_m=128, block_n=32, num_warps=8, num_stages=2, wgmma=True),
    TQ4PrefillConfig(block_m=64, block_n=32, num_warps=8, num_stages=2, wgmma=True),
    TQ4PrefillConfig(block_m=64, block_n=32, num_warps=8, num_stages=2, wgmma=False),
    TQ4PrefillConfig(block_m=32, block_n=32, num_warps=8, num_stages=2, wgmma=False),
    TQ4PrefillConfig(block_m=32, block_n=16, num_warps=8, num_stages=2, wgmma=False),
    TQ4PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, wgmma=False),
)


@triton.jit
def _tq4_prefill_kernel(
    q_ptr,  # [Hkv * GROUP, T, WIDTH] float16, rotated
    k_codes_ptr,  # [Hkv, L, TURNED * BITS / 8]
    k_scale_ptr,  # [Hkv, L]
    v_codes_ptr,  # [Hkv, L, D * BITS / 8]
    v_scale_ptr,  # [Hkv, L]
    input_pos_ptr,  # [T] int64
    out_ptr,  # [Hkv * GROUP, T, D], rotated, strided over heads and tokens
    stride_oh,
    stride_ot,
    length,
    tokens,
    scale_log2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    BITS: tl.constexpr,
    K_P: tl.constexpr,
    K_Q: tl.constexpr,
    V_P: tl.constexpr,
    V_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    WIDTH: tl.constexpr = TURNED + D if TURNED < D else D
    head = tl.program_id(1).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest loops start first
    rows = first_row + tl.arange(0, BLOCK_M)
    row_token = rows // GROUP
    row_mask = row_token < tokens
    first = tl.load(input_pos_ptr).to(tl.int32)
    row_pos = first + row_token
    end = first + tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, tokens)

    offs_n = tl.arange(0, BLOCK_N)
    q_head = head * GROUP + rows % GROUP
    q_rows = q_ptr + (q_head * tokens + row_token)[:, None] * WIDTH
    q0, q1, q2, q3 = load_quarters(q_rows, row_mask[:, None], TURNED)
    if TURNED < D:
        r0, r1, r2, r3 = load_quarters(q_rows + TURNED, row_mask[:, None], D)
    slots_base = head * length

    scale_log2 = tl.cast(scale_log2, tl.float32)  # a compiler may hand it over as float64
    acc0 = tl.zeros([BLOCK_M, D // 4], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D // 4], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D // 4], tl.float32)
    acc3 = tl.zeros([BLOCK_M, D // 4], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, end, BLOCK_N, num_stages=NUM_STAGES):
        key_pos = start + offs_n
        key_mask = key_pos < end
        slots = slots_base + key_pos
        k0, k1, k2, k3 = load_levels(k_codes_ptr, slots, key_mask, TURNED, BLOCK_N, BITS, K_P, K_Q)
        k_scale = tl.load(k_scale_ptr + slots, mask=key_mask, other=0.0)
        v_scale = tl.load(v_scale_ptr + slots, mask=key_mask, other=0.0)
        products = tl.dot(q0, tl.trans(k0))
        products = tl.dot(q1, tl.trans(k1), products)
        products = tl.dot(q2, tl.trans(k2), products)
        products = tl.dot(q3, tl.trans(k3), products)
        scores = products * (k_scale * scale_log2)[None, :]
        v0, v1, v2, v3 = load_levels(v_codes_ptr, slots, key_mask, D, BLOCK_N, BITS, V_P, V_Q)
        if TURNED < D:
            products = tl.dot(r0, tl.trans(v0))
            products = tl.dot(r1, tl.trans(v1), products)
            products = tl.dot(r2, tl.trans(v2), products)
            products = tl.dot(r3, tl.trans(v3), products)
            scores += products * (v_scale * scale_log2)[None, :]
        scores = tl.where(key_pos[None, :] <= row_pos[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))  # every row sees key 0, in the first tile
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        weights = (weights * v_scale[None, :]).to(tl.float16)
        acc0 = tl.dot(weights, v0, acc0 * decay[:, None])
        acc1 = tl.dot(weights, v1, acc1 * decay[:, None])
        acc2 = tl.dot(weights, v2, acc2 * decay[:, None])
        acc3 = tl.dot(weights, v3, acc3 * decay[:, None])

    out_rows = q_head * stride_oh + row_token.to(tl.int64) * stride_ot
    at = out_ptr + out_rows[:, None] + tl.arange(0, D // 4)[None, :]
    factor = (1.0 / row_sum)[:, None]
    tl.store(at, (acc0 * factor).to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    tl.store(at + D // 4, (acc1 * factor).to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    tl.store(at + D // 2, (acc2 * factor).to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    tl.store(at + 3 * D // 4, (acc3 * factor).to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


def choose_config(key_dim: int, head_dim: int, bits: int, wgmma: bool, shared_limit: int) -> TQ4PrefillConfig:
    """The first of CONFIGS that suits the device, else the smallest."""
    configs = (c for c in CONFIGS if wgmma >= c.wgmma and c.fits(key_dim, head_dim, bits, shared_limit))
    return next(configs, CONFIGS[-1])


def tq4_prefill_launch(
    queries: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    input_pos: Tensor,
    scale: float,
    out: Tensor,
    config: TQ4PrefillConfig,
) -> None:
    """Run the two kernels with the given configuration."""
    _, q_heads, tokens, head_dim = out.shape
    kv_heads, length = k_codes.shape[1], k_codes.shape[2]
    bits, turned = code_widths(head_dim, k_codes, v_codes)
    group = q_heads // kv_heads
    k_p, k_q = curve_bits(turned, bits)
    v_p, v_q = curve_bits(head_dim, bits)
    wrap_triton(_tq4_prefill_kernel)[(triton.cdiv(tokens * group, config.block_m), kv_heads)](
        q_ptr=queries,
        k_codes_ptr=k_codes,
        k_scale_ptr=k_scale,
        v_codes_ptr=v_codes,
        v_scale_ptr=v_scale,
        input_pos_ptr=input_pos,
        out_ptr=out,
        stride_oh=out.stride(1),
        stride_ot=out.stride(2),
        length=length,
        tokens=tokens,
        scale_log2=scale * LOG2_E,
        GROUP=group,
        D=head_dim,
        TURNED=turned,
        BITS=bits,
        K_P=k_p,
        K_Q=k_q,
        V_P=v_p,
        V_Q=v_q,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    launch_rotate_back(out)


def tq4_prefill(
    queries: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    input_pos: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Attend from rotated queries float16 [1, Hq, T, D or C + D] into out [1, Hq, T, D]."""
    head_dim = out.shape[3]
    bits, turned = code_widths(head_dim, k_codes, v_codes)
    wgmma, shared_limit = device_limits(out.device)
    config = choose_config(turned, head_dim, bits, wgmma, shared_limit)
    tq4_prefill_launch(queries, k_codes, k_scale, v_codes, v_scale, input_pos, scale, out, config)
