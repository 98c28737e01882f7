"""Attention of the newest 1 to 8 tokens over a cache of tied rows: split-K flash decoding that reads each row once.

    out[b, h, t] = softmax_j(scale * q[b, h, t] . k_j) v_j,   0 <= j <= input_pos[t]
    k_j = [row_j[:R] | row_j[2R:]],  v_j = row_j[R:],  row_j = kv[b, h // G, j]

q [B, Hq, T, D] and kv [B, Hkv, L, D + R] of one dtype, as `gemma4.kernels.tied_rope_cache` makes them, R = D / 4;
input_pos [T] int64, consecutive. The rows of all T tokens are in the cache already. The result has its dimensions in
their own order. Everything else is as in `gemma4.kernels.decode_attention`: a KV head's query rows form one tile, the
keys are divided among a fixed number of programs, and a second kernel merges what they found.

A row is read as five tiles of R columns, [k | v0 | v1 | v2 | v3]; v1 to v3 serve the scores and the sums from one copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.activations import quantize_activations_reference
from gemma4.kernels.decode_attention import (
    LOG2_E,
    MAX_TOKENS,
    SPLIT_GRAIN,
    DecodeConfig,
    check_planes,
    choose_config,
    device_limits,
    masked_attention,
    softmax_step,
    split_count,
    split_range,
)
from gemma4.kernels.split_merge import (
    Partials,
    empty_partials,
    empty_quantized,
    head_rows,
    merge_heads,
    merge_quantized,
)
from gemma4.kernels.tied_rope_cache import keys_and_values, natural_column, natural_order

NARROWEST_TILE = 16  # columns that a matrix instruction needs

# Best first, as in `gemma4.kernels.decode_attention`.
CONFIGS = (
    DecodeConfig(block_r=16, block_n=32, num_warps=4, num_stages=4, programs_per_sm=1),
    DecodeConfig(block_r=16, block_n=32, num_warps=4, num_stages=3, programs_per_sm=1),
    DecodeConfig(block_r=16, block_n=32, num_warps=4, num_stages=2, programs_per_sm=1),
    DecodeConfig(block_r=16, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1),
    DecodeConfig(block_r=32, block_n=32, num_warps=8, num_stages=3, programs_per_sm=1),
    DecodeConfig(block_r=32, block_n=32, num_warps=8, num_stages=2, programs_per_sm=1),
    DecodeConfig(block_r=32, block_n=16, num_warps=8, num_stages=2, programs_per_sm=1),
)


# ---------------------------------------------------------------------------------------------------- reference


def tied_decode_attention_reference(q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    """The definition, over every slot of the cache: no value of `input_pos` is read on the host."""
    rotated = kv.shape[3] - q.shape[3]
    key_pos = torch.arange(kv.shape[2], device=kv.device)
    out = masked_attention(q, *keys_and_values(kv, rotated), input_pos, key_pos, scale, 0)
    return natural_order(out, rotated)


# ------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _load_tile(ptr, rows, offs, row_mask, R: tl.constexpr, TILE: tl.constexpr):
    """[rows, TILE] at ptr + rows + offs; zeros where a row is masked, and in columns from R on."""
    mask = row_mask[:, None]
    if TILE > R:
        mask = mask & (offs < R)[None, :]
    return tl.load(ptr + rows[:, None] + offs[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, rows, place, offs, x, row_mask, D: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr):
    """Stores x [rows, TILE], whose first R columns begin at `place` of tied order, in natural order."""
    mask = row_mask[:, None]
    if TILE > R:
        mask = mask & (offs < R)[None, :]
    tl.store(ptr + rows[:, None] + natural_column(place + offs, D, R)[None, :], x, mask=mask)


@triton.jit
def _tied_split_kernel(
    q_ptr,  # [B, Hkv * GROUP, T, D]
    kv_ptr,  # [B, Hkv, L, D + R]
    input_pos_ptr,  # [T] int64
    acc_ptr,  # [B, Hkv, SPLITS, GROUP * T, D] float32, sums of exp2(score - max) * v, dimensions in natural order
    max_ptr,  # [B, Hkv, SPLITS, GROUP * T] float32, largest score in units of log2
    sum_ptr,  # [B, Hkv, SPLITS, GROUP * T] float32, sums of exp2(score - max)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kl,
    scale_log2,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    GRAIN: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,  # R, or the narrowest tile there is
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    D: tl.constexpr = 4 * R
    ROWS: tl.constexpr = GROUP * T
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    head_index = tl.program_id(0) // ROW_TILES  # over B * Hkv
    batch, head = (head_index // KV_HEADS).to(tl.int64), (head_index % KV_HEADS).to(tl.int64)
    rows = (tl.program_id(0) % ROW_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < ROWS
    out_rows = (head_index * SPLITS + tl.program_id(1)).to(tl.int64) * ROWS + rows

    offs = tl.arange(0, TILE)
    first = tl.load(input_pos_ptr).to(tl.int32)
    q_rows = batch * stride_qb + (head * GROUP + rows // T) * stride_qh + (rows % T) * stride_qt
    # Loaded before the keys' range is known, so that the loads wait together.
    q0 = _load_tile(q_ptr, q_rows, offs, row_mask, R, TILE)
    q1 = _load_tile(q_ptr + R, q_rows, offs, row_mask, R, TILE)
    q2 = _load_tile(q_ptr + 2 * R, q_rows, offs, row_mask, R, TILE)
    q3 = _load_tile(q_ptr + 3 * R, q_rows, offs, row_mask, R, TILE)
    begin, end = split_range(first, T, 0, SPLITS, GRAIN)
    if begin >= end:
        tl.store(max_ptr + out_rows, float("-inf"), mask=row_mask)
        tl.store(sum_ptr + out_rows, 0.0, mask=row_mask)
        return

    row_pos = first + rows % T
    offs_n = tl.arange(0, BLOCK_N)
    base = kv_ptr + batch * stride_kb + head * stride_kh
    scale_log2 = tl.cast(scale_log2, tl.float32)  # a compiler may hand it over as float64
    acc0 = tl.zeros([BLOCK_R, TILE], tl.float32)
    acc1 = tl.zeros([BLOCK_R, TILE], tl.float32)
    acc2 = tl.zeros([BLOCK_R, TILE], tl.float32)
    acc3 = tl.zeros([BLOCK_R, TILE], tl.float32)
    row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        key_pos = start + offs_n
        key_mask = key_pos < end
        keys = key_pos.to(tl.int64) * stride_kl
        k = _load_tile(base, keys, offs, key_mask, R, TILE)
        v0 = _load_tile(base + R, keys, offs, key_mask, R, TILE)
        v1 = _load_tile(base + 2 * R, keys, offs, key_mask, R, TILE)
        v2 = _load_tile(base + 3 * R, keys, offs, key_mask, R, TILE)
        v3 = _load_tile(base + 4 * R, keys, offs, key_mask, R, TILE)
        # Scaled before they are added, or the compiler makes one chain of them, each link of which waits.
        scores = tl.dot(q0, tl.trans(k), input_precision="ieee") * scale_log2
        scores += tl.dot(q1, tl.trans(v1), input_precision="ieee") * scale_log2
        scores += tl.dot(q2, tl.trans(v2), input_precision="ieee") * scale_log2
        scores += tl.dot(q3, tl.trans(v3), input_precision="ieee") * scale_log2
        seen = key_mask[None, :] & (key_pos[None, :] <= row_pos[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        weights, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum)
        weights, decay = weights.to(v0.dtype), decay[:, None]
        acc0 = tl.dot(weights, v0, acc0 * decay, input_precision="ieee")
        acc1 = tl.dot(weights, v1, acc1 * decay, input_precision="ieee")
        acc2 = tl.dot(weights, v2, acc2 * decay, input_precision="ieee")
        acc3 = tl.dot(weights, v3, acc3 * decay, input_precision="ieee")

    _store_tile(acc_ptr, out_rows * D, 0, offs, acc0, row_mask, D, R, TILE)
    _store_tile(acc_ptr, out_rows * D, R, offs, acc1, row_mask, D, R, TILE)
    _store_tile(acc_ptr, out_rows * D, 2 * R, offs, acc2, row_mask, D, R, TILE)
    _store_tile(acc_ptr, out_rows * D, 3 * R, offs, acc3, row_mask, D, R, TILE)
    tl.store(max_ptr + out_rows, row_max, mask=row_mask)
    tl.store(sum_ptr + out_rows, row_sum, mask=row_mask)


# ----------------------------------------------------------------------------------------------------------- op


def check_tied(q: Tensor, kv: Tensor, input_pos: Tensor) -> None:
    """Raise ValueError unless q [B, Hq, T, D], kv [B, Hkv, L, D + D/4] and input_pos [T] belong together."""
    if q.dim() != 4 or kv.dim() != 4:
        raise ValueError(f"q and kv must have 4 dimensions, got {list(q.shape)} and {list(kv.shape)}")
    head_dim = q.shape[3]
    if head_dim < 32 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two from 32 on, got {head_dim}")
    if q.shape[0] != kv.shape[0] or kv.shape[3] != head_dim + head_dim // 4 or q.shape[1] % kv.shape[1]:
        raise ValueError(f"kv {list(kv.shape)} does not fit q {list(q.shape)}, of which it has a quarter more columns")
    if q.dtype != kv.dtype:
        raise ValueError(f"q and kv must have one dtype, got {q.dtype} and {kv.dtype}")
    if q.stride(3) != 1 or kv.stride(3) != 1:
        raise ValueError("q and kv must be contiguous along their last dimension")
    if input_pos.dim() != 1 or input_pos.shape[0] != q.shape[2] or input_pos.dtype != torch.int64:
        raise ValueError(f"input_pos must be int64 [{q.shape[2]}], got {input_pos.dtype} {list(input_pos.shape)}")


def _check(q: Tensor, kv: Tensor, input_pos: Tensor) -> None:
    check_tied(q, kv, input_pos)
    if not 1 <= q.shape[2] <= MAX_TOKENS:
        raise ValueError(f"tied_decode_attention takes 1 to {MAX_TOKENS} tokens, got {q.shape[2]}")


def tied_split_launch(
    q: Tensor, kv: Tensor, input_pos: Tensor, scale: float, config: DecodeConfig, splits: int
) -> Partials:
    """Run the kernel that divides the keys, with the given configuration."""
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads = kv.shape[1]
    rows = q_heads // kv_heads * tokens
    partials = empty_partials(q, kv_heads, splits)
    wrap_triton(_tied_split_kernel)[(batch * kv_heads * triton.cdiv(rows, config.block_r), splits)](
        q_ptr=q,
        kv_ptr=kv,
        input_pos_ptr=input_pos,
        acc_ptr=partials.acc,
        max_ptr=partials.largest,
        sum_ptr=partials.sums,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_qt=q.stride(2),
        stride_kb=kv.stride(0),
        stride_kh=kv.stride(1),
        stride_kl=kv.stride(2),
        scale_log2=scale * LOG2_E,
        T=tokens,
        GROUP=q_heads // kv_heads,
        KV_HEADS=kv_heads,
        SPLITS=splits,
        GRAIN=SPLIT_GRAIN,
        R=head_dim // 4,
        TILE=max(NARROWEST_TILE, head_dim // 4),
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return partials


def _split(q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Partials:
    """Run it with the configuration and the number of splits that suit the device."""
    rows = q.shape[1] // kv.shape[1] * q.shape[2]
    multiprocessors, shared_limit = device_limits(q.device)
    config = choose_config(CONFIGS, rows, q.shape[3], kv.shape[3], q.element_size(), shared_limit)
    splits = split_count(config, kv.shape[0] * kv.shape[1], rows, kv.shape[2], multiprocessors)
    return tied_split_launch(q, kv, input_pos, scale, config, splits)


@triton_op("gemma4::tied_decode_attention", mutates_args={})
def tied_decode_attention(q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    """Attend from q [B, Hq, T, D], T = 1 to 8, to a cache kv [B, Hkv, L, D + D/4] that holds these tokens already.

    `input_pos` [T] int64, consecutive. Returns [B, Hq, T, D] in q's dtype, dimensions in natural order. Raises
    ValueError on shapes, dtypes or strides that do not fit. Positions are not checked: they stay on the device.
    """
    _check(q, kv, input_pos)
    if q.device.type == "cpu":
        return tied_decode_attention_reference(q, kv, input_pos, scale)
    return merge_heads(_split(q, kv, input_pos, scale), q)


@tied_decode_attention.register_fake
def _(q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    _check(q, kv, input_pos)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@tied_decode_attention.register_kernel("cpu")
def _(q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    _check(q, kv, input_pos)
    return tied_decode_attention_reference(q, kv[:, :, : int(input_pos[-1]) + 1], input_pos, scale)


@triton_op("gemma4::tied_decode_attention_quantize", mutates_args={})
def tied_decode_attention_quantize(
    q: Tensor, kv: Tensor, input_pos: Tensor, scale: float, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tied_decode_attention`; returns what `quantize_activations` returns for its float32 rows [B * T, Hq * D]."""
    _check(q, kv, input_pos)
    check_planes(planes)
    if q.device.type == "cpu":
        heads = tied_decode_attention_reference(q.float(), kv.float(), input_pos, scale)
        return quantize_activations_reference(head_rows(heads), planes)
    return merge_quantized(_split(q, kv, input_pos, scale), q, planes)


@tied_decode_attention_quantize.register_fake
def _(q: Tensor, kv: Tensor, input_pos: Tensor, scale: float, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, kv, input_pos)
    check_planes(planes)
    return empty_quantized(q, planes)
