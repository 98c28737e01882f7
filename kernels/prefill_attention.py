"""Attention of a chunk of new tokens over the KV cache as it was before the chunk, and causally over the chunk itself.

    out[b, h, t] = softmax_j(scale * q[b, h, t] . k_j) v_j,   max(0, p_t - window + 1) <= j <= p_t,  p_t = input_pos[t]
    k_j, v_j = k_cache, v_cache[b, h // G, j % L] for j < input_pos[0], else k_new, v_new[b, h // G, j - input_pos[0]]

q [B, Hq, T, D], k_new and v_new [B, Hkv, T, D], caches [B, Hkv, L, D], all of one dtype; input_pos [T] int64,
consecutive; T >= 1; window 0 attends to everything before. Attend first, then write the chunk into the cache: the old
keys that early rows of the chunk still need would otherwise be overwritten in a ring. A ring needs L >= window - 1
slots; how long the chunk is does not matter.

A tile holds BLOCK_M rows (token, query head of the group), token major, so all heads of a group share the keys they
load and the causal edge cuts few keys. Key loops run over the window only: a sliding layer costs O(T * window).
Method: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.decode_attention import (
    LOG2_E,
    check_attention,
    masked_attention,
    slot_positions,
    softmax_step,
)
from gemma4.kernels.split_merge import by_token, empty_heads
from gemma4.kernels.tied_rope_cache import natural_column


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Shape of one launch: rows, keys and value columns of a tile. `wgmma`: for Hopper's warpgroup instructions."""

    block_m: int
    block_n: int
    block_dv: int
    num_warps: int
    num_stages: int
    wgmma: bool

    def shared_bytes(self, head_dim: int, itemsize: int) -> int:
        """Upper bound of the shared memory of one program: K and V tiles in flight, Q, the exchange of scores."""
        in_flight = self.num_stages if self.wgmma else max(1, self.num_stages - 1)
        tiles = in_flight * self.block_n * (head_dim + min(head_dim, self.block_dv)) * itemsize
        exchange = 0 if self.wgmma else self.block_m * self.block_n * 4 + 1024
        return tiles + self.block_m * head_dim * itemsize + exchange

    def fits(self, head_dim: int, itemsize: int, shared_limit: int) -> bool:
        """Whether the float32 output tile stays in registers and the rest in shared memory."""
        accumulator = self.block_m * min(head_dim, self.block_dv) // (32 * self.num_warps)
        most = 128 if self.wgmma else 64
        return accumulator <= most and self.shared_bytes(head_dim, itemsize) <= shared_limit


# Best first. A launch takes the first that suits the device.
CONFIGS = (
    PrefillConfig(block_m=128, block_n=64, block_dv=256, num_warps=8, num_stages=2, wgmma=True),
    PrefillConfig(block_m=128, block_n=32, block_dv=256, num_warps=8, num_stages=2, wgmma=True),
    PrefillConfig(block_m=64, block_n=32, block_dv=512, num_warps=8, num_stages=2, wgmma=True),
    PrefillConfig(block_m=64, block_n=64, block_dv=512, num_warps=8, num_stages=2, wgmma=False),
    PrefillConfig(block_m=64, block_n=32, block_dv=512, num_warps=8, num_stages=2, wgmma=False),
    PrefillConfig(block_m=32, block_n=32, block_dv=512, num_warps=8, num_stages=2, wgmma=False),
    PrefillConfig(block_m=16, block_n=16, block_dv=512, num_warps=4, num_stages=2, wgmma=False),
)


@cache
def device_limits(device: torch.device) -> tuple[bool, int]:
    """(whether the device has warpgroup instructions, bytes of shared memory one program may use)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major == 9, int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- reference


def prefill_attention_reference(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """The definition, over every slot of the cache: no value of `input_pos` is read on the host."""
    old_pos = slot_positions(input_pos[0] - 1, k_cache.shape[2])
    k, v = torch.cat((k_cache, k_new), 2), torch.cat((v_cache, v_new), 2)
    return by_token(masked_attention(q, k, v, input_pos, torch.cat((old_pos, input_pos)), scale, window))


# ------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _key_columns(offs_d, R: tl.constexpr):
    """Where the columns of a key are in its row."""
    if R == 0:
        return offs_d
    return tl.max_contiguous(tl.multiple_of(tl.where(offs_d < R, offs_d, offs_d + R), 8), 8)


@triton.jit
def _out_columns(offs_v, D: tl.constexpr, R: tl.constexpr):
    """Where the columns of a value belong in the output."""
    if R == 0:
        return offs_v
    return natural_column(offs_v, D, R)


@triton.jit
def _prefill_attention_kernel(
    q_ptr,  # [B, Hkv * GROUP, T, D]
    k_new_ptr,  # [B, Hkv, T, D], a row every ROW elements, as in the next three
    v_new_ptr,  # [B, Hkv, T, D]
    k_cache_ptr,  # [B, Hkv, L, D]
    v_cache_ptr,  # [B, Hkv, L, D]
    input_pos_ptr,  # [T] int64
    out_ptr,  # [B, Hkv * GROUP, T, D], strided but along D
    stride_qb,
    stride_qh,
    stride_qt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_kcb,
    stride_kch,
    stride_vcb,
    stride_vch,
    scale_log2,
    tokens,
    cache_len,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILES_WRAP: tl.constexpr,  # whether a tile of keys may reach over the end of the ring
    D: tl.constexpr,
    R: tl.constexpr,  # 0, or columns of a key that are not also columns of its value: tied rows
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,  # columns of v and out of one program
    NUM_STAGES: tl.constexpr,
):
    V_PARTS: tl.constexpr = D // BLOCK_DV
    head_index = tl.program_id(1)  # over B * Hkv
    batch, head = (head_index // KV_HEADS).to(tl.int64), (head_index % KV_HEADS).to(tl.int64)
    row_tile = tl.num_programs(0) // V_PARTS - 1 - tl.program_id(0) // V_PARTS  # the longest loops start first
    first_row = row_tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_token = rows // GROUP
    row_mask = row_token < tokens
    first_token = first_row // GROUP
    end_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, tokens)
    old_keys = tl.load(input_pos_ptr).to(tl.int32)
    row_pos = old_keys + row_token

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    offs_k = _key_columns(offs_d, R)
    offs_v = (tl.program_id(0) % V_PARTS) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    q_head = head * GROUP + rows % GROUP
    q_rows = batch * stride_qb + q_head * stride_qh + row_token.to(tl.int64) * stride_qt
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask[:, None], other=0.0)
    scale_log2 = tl.cast(scale_log2, tl.float32)  # a compiler may hand it over as float64
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    oldest = tl.maximum(old_keys + first_token - WINDOW + 1, 0) if WINDOW > 0 else 0
    old_begin = tl.minimum(oldest // BLOCK_N * BLOCK_N, old_keys)  # aligned, so that whole tiles lie in one piece
    new_begin = tl.maximum(oldest - old_keys, 0)
    old_tiles = tl.cdiv(old_keys - old_begin, BLOCK_N)
    new_tiles = tl.cdiv(end_token - new_begin, BLOCK_N)
    k_cache = k_cache_ptr + batch * stride_kcb + head * stride_kch
    v_cache = v_cache_ptr + batch * stride_vcb + head * stride_vch
    k_new = k_new_ptr + batch * stride_kb + head * stride_kh
    v_new = v_new_ptr + batch * stride_vb + head * stride_vh
    for tile in tl.range(0, old_tiles + new_tiles, num_stages=NUM_STAGES):
        is_old = tile < old_tiles
        start = tl.where(is_old, old_begin + tile * BLOCK_N, old_keys + new_begin + (tile - old_tiles) * BLOCK_N)
        key_pos = start + offs_n
        key_mask = (key_pos >= oldest) & (key_pos < tl.where(is_old, old_keys, old_keys + end_token))
        first_key = tl.where(is_old, start % cache_len if WINDOW > 0 else start, start - old_keys).to(tl.int64)
        key_rows = offs_n
        if TILES_WRAP:
            slots = first_key + offs_n % cache_len
            slots = tl.where(slots >= cache_len, slots - cache_len, slots)
            key_rows = tl.where(is_old, slots, first_key + offs_n)
            first_key = 0
        k_tile = tl.where(is_old, k_cache, k_new) + first_key * ROW
        k = tl.load(k_tile + (key_rows[:, None] * ROW + offs_k[None, :]), mask=key_mask[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        seen = key_mask[None, :] & (key_pos[None, :] <= row_pos[:, None])
        if WINDOW > 0:
            seen = seen & (key_pos[None, :] > row_pos[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        weights, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum)
        v_tile = tl.where(is_old, v_cache, v_new) + first_key * ROW
        v = tl.load(v_tile + (key_rows[:, None] * ROW + offs_v[None, :]), mask=key_mask[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")

    out = acc / row_sum[:, None]
    out_rows = batch * stride_ob + q_head * stride_oh + row_token.to(tl.int64) * stride_ot
    offs_o = _out_columns(offs_v, D, R)
    tl.store(out_ptr + out_rows[:, None] + offs_o[None, :], out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


# ----------------------------------------------------------------------------------------------------------- op


def _check(
    q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, window: int
) -> None:
    check_attention(q, k_new, v_new, input_pos, window)
    check_attention(q, k_cache, v_cache, input_pos, window)
    if k_new.shape[2] != q.shape[2] or k_new.shape[1] != k_cache.shape[1]:
        raise ValueError(f"k_new {list(k_new.shape)} does not fit q {list(q.shape)} and k_cache {list(k_cache.shape)}")
    for name, x in (("k_new", k_new), ("v_new", v_new), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(2) != x.shape[3]:
            raise ValueError(f"{name} must hold the rows of one head one after another, got strides {x.stride()}")
    if window > 0 and k_cache.shape[2] < window - 1:
        raise ValueError(f"a window of {window} does not fit a cache of {k_cache.shape[2]} slots")


def choose_config(head_dim: int, itemsize: int, wgmma: bool, shared_limit: int) -> PrefillConfig:
    """The first of CONFIGS that suits the device, else the smallest."""
    configs = (c for c in CONFIGS if c.wgmma == wgmma and c.fits(head_dim, itemsize, shared_limit))
    return next(configs, CONFIGS[-1])


def prefill_attention_launch(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int,
    config: PrefillConfig,
    rotated: int = 0,
) -> Tensor:
    """Run the kernel with the given configuration. rotated: R of tied rows, where k are these and v their values."""
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, length = k_cache.shape[1], k_cache.shape[2]
    group = q_heads // kv_heads
    block_dv = min(head_dim, config.block_dv)
    tiles = triton.cdiv(tokens * group, config.block_m) * (head_dim // block_dv)
    out = empty_heads(q)
    wrap_triton(_prefill_attention_kernel)[(tiles, batch * kv_heads)](
        q_ptr=q,
        k_new_ptr=k_new,
        v_new_ptr=v_new,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        input_pos_ptr=input_pos,
        out_ptr=out,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_qt=q.stride(2),
        stride_ob=out.stride(0),
        stride_oh=out.stride(1),
        stride_ot=out.stride(2),
        stride_kb=k_new.stride(0),
        stride_kh=k_new.stride(1),
        stride_vb=v_new.stride(0),
        stride_vh=v_new.stride(1),
        stride_kcb=k_cache.stride(0),
        stride_kch=k_cache.stride(1),
        stride_vcb=v_cache.stride(0),
        stride_vch=v_cache.stride(1),
        scale_log2=scale * LOG2_E,
        tokens=tokens,
        cache_len=length,
        GROUP=group,
        KV_HEADS=kv_heads,
        WINDOW=window,
        TILES_WRAP=window > 0 and length % config.block_n != 0,
        D=head_dim,
        R=rotated,
        ROW=k_cache.stride(2),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_DV=block_dv,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out


@triton_op("gemma4::prefill_attention", mutates_args={})
def prefill_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attend from a chunk q [B, Hq, T, D] to the cache before it and to its own keys k_new, v_new [B, Hkv, T, D].

    The caches [B, Hkv, L, D] are only read: write the chunk afterwards. `input_pos` [T] int64, consecutive.
    Returns [B, Hq, T, D] in q's dtype, in memory token by token. Raises ValueError on shapes, dtypes or strides that do
    not fit.
    """
    _check(q, k_new, v_new, k_cache, v_cache, input_pos, window)
    if q.device.type == "cpu":
        return by_token(prefill_attention_reference(q, k_new, v_new, k_cache, v_cache, input_pos, scale, window))
    wgmma, shared_limit = device_limits(q.device)
    config = choose_config(q.shape[3], q.element_size(), wgmma and q.dtype != torch.float32, shared_limit)
    return prefill_attention_launch(q, k_new, v_new, k_cache, v_cache, input_pos, scale, window, config)


@prefill_attention.register_fake
def _(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    _check(q, k_new, v_new, k_cache, v_cache, input_pos, window)
    return empty_heads(q)


@prefill_attention.register_kernel("cpu")
def _(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    _check(q, k_new, v_new, k_cache, v_cache, input_pos, window)
    first = int(input_pos[0])
    old_pos = torch.arange(max(0, first - window + 1) if window > 0 else 0, first)
    slots = old_pos % k_cache.shape[2]
    k = torch.cat((k_cache[:, :, slots], k_new), 2)
    v = torch.cat((v_cache[:, :, slots], v_new), 2)
    return by_token(masked_attention(q, k, v, input_pos, torch.cat((old_pos, input_pos)), scale, window))
