"""Split-K attention of 1 to 8 tokens over a TurboQuant cache: the decode half of `gemma4::tq4_sdpa`.

The G * T rows that share a KV head form one tile. Products are transposed, keys and dimensions down, rows across: a
tensor core then multiplies tiles of 8 rows, which a decode step has, where rows down would be padded to 16. The keys
are divided among a fixed number of programs, each finds its range from input_pos, and a second kernel merges the
partial results in a fixed order and rotates them back. Method: FlashAttention-2 (Dao, 2023) with the key split of
Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.decode_attention import LOG2_E, device_limits
from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_rotation import hadamard, signs
from gemma4.kernels.tq4_tile import curve_bits, load_levels, load_quarters

MERGED_SPLITS = 16  # partial results that the merge holds at a time


@dataclass(frozen=True, slots=True)
class TQ4DecodeConfig:
    """Shape of one launch: rows and keys of a tile, and how many programs share a streaming multiprocessor."""

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def shared_bytes(self, key_dim: int, head_dim: int, bits: int) -> int:
        """Upper bound of the shared memory of one program: levels and codes of a tile, queries, weights, scales."""
        is_tied = key_dim < head_dim
        width = key_dim + head_dim
        levels = self.block_n * (width if is_tied else head_dim) * 2  # without k: one after the other
        codes = max(1, self.num_stages - 1) * self.block_n * (width * bits // 8 + 8)
        queries = (key_dim + head_dim * is_tied) * self.block_r * 2
        exchange = self.block_n * self.block_r * 4
        return levels + codes + queries + exchange + 1024


# Best first. A launch takes the first that holds its rows and fits the shared memory of the device.
CONFIGS = tuple(
    TQ4DecodeConfig(block_r, block_n, num_warps=8 if block_r == 32 else 4, num_stages=2, programs_per_sm=programs)
    for block_r in (8, 16, 32)
    for block_n, programs in ((64, 2), (32, 2), (16, 2))
)


# ------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _products(key_ptr, q_rows, row_mask, D: tl.constexpr, ROWS: tl.constexpr):
    """float32 [ROWS]: the products of a float32 key [D] and float16 queries, whose pointers are q_rows [1, ROWS]."""
    STEP: tl.constexpr = 64
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, STEP):
        offs = start + tl.arange(0, STEP)
        q = tl.load(q_rows + offs[:, None], mask=row_mask[None, :], other=0.0)
        total += tl.sum(q.to(tl.float32) * tl.load(key_ptr + offs)[:, None], 0)
    return total


@triton.jit
def _tq4_decode_split_kernel(
    q_ptr,  # [Hkv * GROUP, T, WIDTH] float16, rotated
    k_codes_ptr,  # [Hkv, L, TURNED * BITS / 8]
    k_scale_ptr,  # [Hkv, L]
    v_codes_ptr,  # [Hkv, L, D * BITS / 8]
    v_scale_ptr,  # [Hkv, L]
    first_key_ptr,  # [Hkv, WIDTH] float32, rotated
    input_pos_ptr,  # [T] int64
    acc_ptr,  # [Hkv, SPLITS, GROUP * T, D] float32, rotated sums of exp2(score - max) * v
    max_ptr,  # [Hkv, SPLITS, GROUP * T] float32, largest score in units of log2
    sum_ptr,  # [Hkv, SPLITS, GROUP * T] float32, sums of exp2(score - max)
    room,
    scale_log2,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    BITS: tl.constexpr,
    K_P: tl.constexpr,
    K_Q: tl.constexpr,
    V_P: tl.constexpr,
    V_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = GROUP * T
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    WIDTH: tl.constexpr = TURNED + D if TURNED < D else D
    head = (tl.program_id(0) // ROW_TILES).to(tl.int64)
    rows = (tl.program_id(0) % ROW_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < ROWS
    out_rows = (head * SPLITS + tl.program_id(1)) * ROWS + rows

    first = tl.load(input_pos_ptr).to(tl.int32)
    end = first + T
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), SPLITS) * BLOCK_N  # keys of one split
    begin = tl.program_id(1) * share
    if begin >= end:
        tl.store(max_ptr + out_rows, float("-inf"), mask=row_mask)
        tl.store(sum_ptr + out_rows, 0.0, mask=row_mask)
        return
    end = tl.minimum(begin + share, end)

    row_pos = first + rows % T
    offs_n = tl.arange(0, BLOCK_N)
    q_rows = q_ptr + (head * ROWS + rows)[None, :] * WIDTH
    q0, q1, q2, q3 = load_quarters(q_rows, row_mask[None, :], TURNED)
    if TURNED < D:
        r0, r1, r2, r3 = load_quarters(q_rows + TURNED, row_mask[None, :], D)
    slots_base = head * room

    scale_log2 = tl.cast(scale_log2, tl.float32)  # a compiler may hand it over as float64
    first_scores = tl.zeros([BLOCK_R], tl.float32)
    if begin == 0:
        first_key_ptr += head * WIDTH
        first_scores = _products(first_key_ptr, q_rows, row_mask, TURNED, BLOCK_R)
        if TURNED < D:
            first_scores += _products(first_key_ptr + TURNED, q_rows + TURNED, row_mask, D, BLOCK_R)
    first_scores *= scale_log2
    acc0 = tl.zeros([D // 4, BLOCK_R], tl.float32)
    acc1 = tl.zeros([D // 4, BLOCK_R], tl.float32)
    acc2 = tl.zeros([D // 4, BLOCK_R], tl.float32)
    acc3 = tl.zeros([D // 4, BLOCK_R], tl.float32)
    row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        key_pos = start + offs_n
        key_mask = key_pos < end
        slots = slots_base + key_pos
        k0, k1, k2, k3 = load_levels(k_codes_ptr, slots, key_mask, TURNED, BLOCK_N, BITS, K_P, K_Q)
        k_scale = tl.load(k_scale_ptr + slots, mask=key_mask, other=0.0)
        v_scale = tl.load(v_scale_ptr + slots, mask=key_mask, other=0.0)
        products = tl.dot(k3, q3, tl.dot(k2, q2, tl.dot(k1, q1, tl.dot(k0, q0))))
        scores = products * (k_scale * scale_log2)[:, None]
        v0, v1, v2, v3 = load_levels(v_codes_ptr, slots, key_mask, D, BLOCK_N, BITS, V_P, V_Q)
        if TURNED < D:
            products = tl.dot(v3, r3, tl.dot(v2, r2, tl.dot(v1, r1, tl.dot(v0, r0))))
            scores += products * (v_scale * scale_log2)[:, None]
        scores = tl.where(key_pos[:, None] == 0, first_scores[None, :], scores)
        seen = key_mask[:, None] & (key_pos[:, None] <= row_pos[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row may see none of the first keys
        weights = tl.exp2(scores - shift[None, :])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 0)
        row_max = new_max
        weights = (weights * v_scale[:, None]).to(tl.float16)
        acc0 = tl.dot(tl.trans(v0), weights, acc0 * decay[None, :])
        acc1 = tl.dot(tl.trans(v1), weights, acc1 * decay[None, :])
        acc2 = tl.dot(tl.trans(v2), weights, acc2 * decay[None, :])
        acc3 = tl.dot(tl.trans(v3), weights, acc3 * decay[None, :])

    at = acc_ptr + out_rows[None, :] * D + tl.arange(0, D // 4)[:, None]
    tl.store(at, acc0, mask=row_mask[None, :])
    tl.store(at + D // 4, acc1, mask=row_mask[None, :])
    tl.store(at + D // 2, acc2, mask=row_mask[None, :])
    tl.store(at + 3 * D // 4, acc3, mask=row_mask[None, :])
    tl.store(max_ptr + out_rows, row_max, mask=row_mask)
    tl.store(sum_ptr + out_rows, row_sum, mask=row_mask)


@triton.jit
def _tq4_decode_merge_kernel(
    acc_ptr,  # [Hkv, SPLITS, ROWS, D] float32, not written where the split had no keys
    max_ptr,  # [Hkv, SPLITS, ROWS] float32, -inf where the split had no keys
    sum_ptr,  # [Hkv, SPLITS, ROWS] float32
    out_ptr,  # [Hq, T, D], strided over heads and tokens
    stride_oh,
    stride_ot,
    tokens,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    first_part = out_row // ROWS * SPLITS * ROWS + out_row % ROWS
    splits = tl.arange(0, SPLITS_PADDED)
    mask = splits < SPLITS
    part_max = tl.load(max_ptr + first_part + splits * ROWS, mask=mask, other=float("-inf"))
    part_sum = tl.load(sum_ptr + first_part + splits * ROWS, mask=mask, other=0.0)
    largest = tl.max(part_max, 0)
    total = tl.sum(part_sum * tl.exp2(part_max - largest), 0)
    offs = tl.arange(0, D)
    out = tl.zeros([D], tl.float32)
    for start in range(0, SPLITS, STEP):
        part = start + tl.arange(0, STEP)
        peak = tl.load(max_ptr + first_part + part * ROWS, mask=part < SPLITS, other=float("-inf"))
        weight = tl.exp2(peak - largest)
        at = acc_ptr + (first_part + part * ROWS)[:, None] * D + offs[None, :]
        out += tl.sum(tl.load(at, mask=(weight > 0.0)[:, None], other=0.0) * weight[:, None], 0)
    out = hadamard(out / total, D) * signs(D)
    at = out_row // tokens * stride_oh + out_row % tokens * stride_ot + offs
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------- launch


def choose_config(rows: int, key_dim: int, head_dim: int, bits: int, shared_limit: int) -> TQ4DecodeConfig:
    """The first of CONFIGS made for this many rows that fits the shared memory, else the smallest of them."""
    block_r = 8 if rows <= 8 else 16 if rows <= 16 else 32
    configs = [c for c in CONFIGS if c.block_r == block_r]
    return next((c for c in configs if c.shared_bytes(key_dim, head_dim, bits) <= shared_limit), configs[-1])


def split_count(config: TQ4DecodeConfig, kv_heads: int, rows: int, length: int, multiprocessors: int) -> int:
    """Programs that share the keys of one head, so that all heads together fill the device once."""
    programs = kv_heads * -(-rows // config.block_r)
    return min(max(1, config.programs_per_sm * multiprocessors // programs), -(-length // config.block_n))


def tq4_decode_launch(
    queries: Tensor,
    cache: TQ4Cache,
    input_pos: Tensor,
    scale: float,
    out: Tensor,
    config: TQ4DecodeConfig,
    splits: int,
) -> None:
    """Run the two kernels with the given configuration."""
    _, q_heads, tokens, head_dim = out.shape
    kv_heads = cache.kv_heads
    bits, turned = cache.widths(head_dim)
    rows = q_heads // kv_heads * tokens
    k_p, k_q = curve_bits(turned, bits)
    v_p, v_q = curve_bits(head_dim, bits)
    acc = out.new_empty((kv_heads, splits, rows, head_dim), dtype=torch.float32)
    row_max = out.new_empty((kv_heads, splits, rows), dtype=torch.float32)
    row_sum = torch.empty_like(row_max)
    wrap_triton(_tq4_decode_split_kernel)[(kv_heads * triton.cdiv(rows, config.block_r), splits)](
        q_ptr=queries,
        **cache.pointers(),
        input_pos_ptr=input_pos,
        acc_ptr=acc,
        max_ptr=row_max,
        sum_ptr=row_sum,
        room=cache.room,
        scale_log2=scale * LOG2_E,
        T=tokens,
        GROUP=q_heads // kv_heads,
        SPLITS=splits,
        D=head_dim,
        TURNED=turned,
        BITS=bits,
        K_P=k_p,
        K_Q=k_q,
        V_P=v_p,
        V_Q=v_q,
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    wrap_triton(_tq4_decode_merge_kernel)[(q_heads * tokens,)](
        acc_ptr=acc,
        max_ptr=row_max,
        sum_ptr=row_sum,
        out_ptr=out,
        stride_oh=out.stride(1),
        stride_ot=out.stride(2),
        tokens=tokens,
        ROWS=rows,
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        D=head_dim,
        STEP=MERGED_SPLITS,
        num_warps=4,
    )


def tq4_decode(queries: Tensor, cache: TQ4Cache, input_pos: Tensor, scale: float, out: Tensor) -> None:
    """Attend from rotated queries float16 [1, Hq, T, D or C + D], T = 1 to 8, into out [1, Hq, T, D]."""
    _, q_heads, tokens, head_dim = out.shape
    kv_heads = cache.kv_heads
    bits, turned = cache.widths(head_dim)
    rows = q_heads // kv_heads * tokens
    multiprocessors, shared_limit = device_limits(out.device)
    config = choose_config(rows, turned, head_dim, bits, shared_limit)
    splits = split_count(config, kv_heads, rows, cache.room, multiprocessors)
    tq4_decode_launch(queries, cache, input_pos, scale, out, config, splits)
