"""Attention of a chunk of tokens over a TurboQuant cache: the prefill half of `gemma4::tq4_sdpa`.

The loop over keys is in slices, some MiB each: a slice is decoded once (`gemma4.kernels.tq4_rows`), all tiles of
queries attend to it, and keep what a softmax carries along (its maximum, sum and weighted values, float32) for the next
slice. Tiles that decode keys for themselves repeat it for every BLOCK_M rows of a chunk, and tensor cores wait for it.
How keys are cut into slices, and heads into groups that share one, changes no bit of the result: a tile takes the same
keys in the same order.

A tile holds BLOCK_M rows (token, query head of the group), token major, so all heads of a group share the keys they
load and the causal edge cuts few keys. Slices past the last position end at once, on the device.
Method: FlashAttention-2 (Dao, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.decode_attention import LOG2_E, softmax_step
from gemma4.kernels.pieces import COMPILED_PIECES, SLICE_KEYS, SLICED_BYTES, SliceShape
from gemma4.kernels.prefill_attention import PrefillConfig, choose_config, device_limits
from gemma4.kernels.split_merge import empty_heads
from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_rows import launch_tq4_rows


@triton.jit
def _tq4_prefill_kernel(
    q_ptr,  # [Hkv * GROUP, T, D], strided over heads and tokens
    slice_ptr,  # [Hkv, KEYS, 2, D]: keys and values of positions begin, begin + 1, ...
    input_pos_ptr,  # [T] int64
    out_ptr,  # [Hkv * GROUP, T, D], strided over heads and tokens
    acc_ptr,  # [Hkv, T * GROUP, D] float32
    max_ptr,  # [Hkv, D / BLOCK_DV, T * GROUP] float32
    sum_ptr,  # [Hkv, D / BLOCK_DV, T * GROUP] float32
    stride_qh,
    stride_qt,
    stride_oh,
    stride_ot,
    begin,
    keys,
    tokens,
    scale_log2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,  # columns of v and out of one program
    NUM_STAGES: tl.constexpr,
):
    V_PARTS: tl.constexpr = D // BLOCK_DV
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) % V_PARTS
    row_tile = tl.num_programs(0) // V_PARTS - 1 - tl.program_id(0) // V_PARTS  # the longest loops start first
    first_row = row_tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_token = rows // GROUP
    row_mask = row_token < tokens
    first = tl.load(input_pos_ptr).to(tl.int32)
    row_pos = first + row_token
    end = first + tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, tokens)
    scale_log2 = tl.cast(scale_log2, tl.float32)  # a compiler may hand it over as float64
    if begin < end:
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, D)
        offs_v = part * BLOCK_DV + tl.arange(0, BLOCK_DV)
        q_rows = (head * GROUP + rows % GROUP) * stride_qh + row_token.to(tl.int64) * stride_qt
        q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask[:, None], other=0.0)
        acc_at = acc_ptr + (head * tokens * GROUP + rows)[:, None] * D + offs_v[None, :]
        row_at = (head * V_PARTS + part) * tokens * GROUP + rows  # a part may end before another begins
        is_later = rows < tl.where(begin > 0, tokens * GROUP, 0)
        acc = tl.load(acc_at, mask=is_later[:, None], other=0.0)
        row_max = tl.load(max_ptr + row_at, mask=is_later, other=float("-inf"))
        row_sum = tl.load(sum_ptr + row_at, mask=is_later, other=0.0)
        k_tile = slice_ptr + head * keys * (2 * D)
        stop = tl.minimum(end, begin + keys)
        for start in tl.range(begin, stop, BLOCK_N, num_stages=NUM_STAGES):
            key_pos = start + offs_n
            key_mask = key_pos < stop
            key_rows = (start - begin + offs_n) * (2 * D)
            k = tl.load(k_tile + (key_rows[:, None] + offs_d[None, :]), mask=key_mask[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            seen = key_mask[None, :] & (key_pos[None, :] <= row_pos[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            weights, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum)
            v = tl.load(k_tile + (key_rows[:, None] + D + offs_v[None, :]), mask=key_mask[:, None], other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        # Read anew, so that what follows is computed here and takes no registers in the loop.
        rows = first_row + tl.load(input_pos_ptr, volatile=True).to(tl.int32) - first + tl.arange(0, BLOCK_M)
        row_token = rows // GROUP
        row_mask = row_token < tokens
        if end <= begin + keys:
            out_rows = (head * GROUP + rows % GROUP) * stride_oh + row_token.to(tl.int64) * stride_ot
            out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_rows[:, None] + offs_v[None, :], out, mask=row_mask[:, None])
        else:
            acc_at = acc_ptr + (head * tokens * GROUP + rows)[:, None] * D + offs_v[None, :]
            row_at = (head * V_PARTS + part) * tokens * GROUP + rows
            tl.store(acc_at, acc, mask=row_mask[:, None])
            tl.store(max_ptr + row_at, row_max, mask=row_mask)
            tl.store(sum_ptr + row_at, row_sum, mask=row_mask)


def slice_shape(q: Tensor, kv_heads: int) -> SliceShape:
    """For q [1, Hq, T, D]. A graph, whose T may be open, takes all tokens of a head at a time, and larger slices."""
    _, q_heads, tokens, head_dim = q.shape
    key_bytes = 2 * head_dim * q.element_size()
    if torch.compiler.is_compiling():
        return SliceShape(tokens, 1, COMPILED_PIECES * SLICED_BYTES // key_bytes // SLICE_KEYS * SLICE_KEYS)
    return SliceShape.of(tokens, kv_heads, q_heads // kv_heads * (4 * head_dim + 16), key_bytes)


def tq4_prefill(q: Tensor, cache: TQ4Cache, k_weight: Tensor | None, input_pos: Tensor, scale: float) -> Tensor:
    """As `gemma4::tq4_sdpa`, for more than a few tokens."""
    wgmma, shared_limit = device_limits(q.device)
    config = choose_config(q.shape[3], q.element_size(), wgmma and q.dtype != torch.float32, shared_limit)
    shape = slice_shape(q, cache.kv_heads)
    return tq4_prefill_launch(q, cache, k_weight, input_pos, scale, config, shape)


def tq4_prefill_launch(
    q: Tensor,
    cache: TQ4Cache,
    k_weight: Tensor | None,
    input_pos: Tensor,
    scale: float,
    config: PrefillConfig,
    shape: SliceShape,
) -> Tensor:
    """Run the kernels with the given configuration and slices, of whole tiles of keys."""
    tokens, group = q.shape[2], q.shape[1] // cache.kv_heads
    starts = range(0, tokens, shape.tokens) if isinstance(tokens, int) else (0,)
    queries = q.split(shape.heads * group, 1)
    out = None if torch.compiler.is_compiling() else empty_heads(q)
    # A compiler would copy the whole for each part that is written.
    results = [empty_heads(part) for part in queries] if out is None else out.split(shape.heads * group, 1)
    caches = map(TQ4Cache, *(x.split(shape.heads, 1) for x in cache))
    for part, cache_of_part, result in zip(queries, caches, results, strict=True):
        for new in (slice(start, start + shape.tokens) for start in starts):
            slices = part[:, :, new], cache_of_part, k_weight, input_pos[new], scale, result[:, :, new]
            _attend_to_slices(*slices, config, min(shape.keys, cache.length))
    return torch.cat([part.transpose(1, 2) for part in results], 2).transpose(1, 2) if out is None else out


def _attend_to_slices(
    q: Tensor,
    cache: TQ4Cache,
    k_weight: Tensor | None,
    input_pos: Tensor,
    scale: float,
    out: Tensor,
    config: PrefillConfig,
    keys: int,
) -> None:
    """Fill `out` for the query heads of a few KV heads, slice by slice."""
    _, q_heads, tokens, head_dim = q.shape
    kv_heads, length = cache.kv_heads, cache.length
    group = q_heads // kv_heads
    block_dv = min(head_dim, config.block_dv)
    parts = head_dim // block_dv
    acc = q.new_empty((kv_heads, tokens * group, head_dim), dtype=torch.float32)
    row_max, row_sum = (acc.new_empty((kv_heads, parts, tokens * group)) for _ in range(2))
    for begin in range(0, length, keys):
        decoded = q.new_empty((kv_heads, min(keys, length - begin), 2, head_dim))
        launch_tq4_rows(cache, k_weight, input_pos, begin, decoded)
        wrap_triton(_tq4_prefill_kernel)[(triton.cdiv(tokens * group, config.block_m) * parts, kv_heads)](
            q_ptr=q,
            slice_ptr=decoded,
            input_pos_ptr=input_pos,
            out_ptr=out,
            acc_ptr=acc,
            max_ptr=row_max,
            sum_ptr=row_sum,
            stride_qh=q.stride(1),
            stride_qt=q.stride(2),
            stride_oh=out.stride(1),
            stride_ot=out.stride(2),
            begin=begin,
            keys=decoded.shape[1],
            tokens=tokens,
            scale_log2=scale * LOG2_E,
            GROUP=group,
            D=head_dim,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_DV=block_dv,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
        del decoded
