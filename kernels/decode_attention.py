"""Attention of the newest 1 to 8 tokens over a KV cache: split-K flash decoding.

    out[b, h, t] = softmax_j(scale * q[b, h, t] . k[b, h // G, j % L]) v[b, h // G, j % L],  G = Hq // Hkv,
    max(0, p_t - window + 1) <= j <= p_t,  p_t = input_pos[t]   (window 0: 0 <= j <= p_t)

q [B, Hq, T, D] and k, v [B, Hkv, L, D] in bfloat16, float16 or float32; input_pos [T] int64, consecutive. The keys and
values of all T tokens are in the cache already. A cache is a ring: position j lives in slot j % L, so a full-attention
layer (L = longest context) and a sliding layer (L >= window + T - 1) read alike.

The G * T rows that share a KV head form one tile. The keys are divided among a fixed number of programs; each finds its
range from input_pos on the device, so one CUDA graph serves every step at a cost that follows the context and not L.
A second kernel merges the partial results in a fixed order, which makes the output the same bits on every run: as heads
(`decode_attention`), or at once as the int8 activations of the output projection (`decode_attention_quantize`). Method:
FlashAttention-2 (Dao, 2023) with the key split of Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.activations import quantize_activations_reference
from gemma4.kernels.split_merge import (
    Partials,
    empty_partials,
    empty_quantized,
    head_rows,
    merge_heads,
    merge_quantized,
)

MAX_TOKENS = 8  # rows of one tile stay few enough to live in registers
SPLIT_GRAIN = 8  # splits are multiples of this many keys, so that all of them end together
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Shape of one launch: rows and keys of a tile, and how many programs share a streaming multiprocessor."""

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def shared_bytes(self, head_dim: int, columns: int, itemsize: int) -> int:
        """Upper bound of the shared memory of one program: tiles of keys and values in flight, Q, the exchange of
        scores. columns: numbers that a cache holds of one key and value.
        """
        tiles = max(1, self.num_stages - 1) * self.block_n * columns * itemsize
        return tiles + self.block_r * (head_dim * itemsize + self.block_n * 4) + 1024


# Best first. A launch takes the first that holds its rows and fits the shared memory of the device.
CONFIGS = (
    DecodeConfig(block_r=16, block_n=32, num_warps=4, num_stages=3, programs_per_sm=1),
    DecodeConfig(block_r=16, block_n=32, num_warps=4, num_stages=2, programs_per_sm=1),
    DecodeConfig(block_r=16, block_n=16, num_warps=4, num_stages=2, programs_per_sm=1),
    DecodeConfig(block_r=32, block_n=32, num_warps=8, num_stages=3, programs_per_sm=1),
    DecodeConfig(block_r=32, block_n=32, num_warps=8, num_stages=2, programs_per_sm=1),
    DecodeConfig(block_r=32, block_n=16, num_warps=8, num_stages=2, programs_per_sm=1),
)


@cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory one program may use)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- reference


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, query_pos: Tensor, key_pos: Tensor, scale: float, window: int
) -> Tensor:
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, N, D] whose key n stands at position key_pos[n] (< 0: nothing).

    Computed in float32 (float64 for float64 input), returned in q's dtype. Keys that no query sees never reach the
    result, whatever they hold.
    """
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask = (key_pos >= 0) & (key_pos <= query_pos[:, None])
    if window > 0:
        mask &= key_pos > query_pos[:, None] - window
    unseen = ~mask.any(0)
    k, v = (x.to(dtype).masked_fill(unseen[:, None], 0.0) for x in (k, v))
    rows = q.to(dtype).reshape(batch, kv_heads, -1, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask.repeat(q_heads // kv_heads, 1), scale=scale
    )
    return out.reshape(batch, q_heads, tokens, head_dim).to(q.dtype)


def slot_positions(newest: Tensor, length: int) -> Tensor:
    """Position held by each slot of a ring of `length` slots whose newest position is `newest`; < 0: empty."""
    slots = torch.arange(length, device=newest.device)
    return newest - (newest - slots) % length


def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Tensor:
    """The definition, over every slot of the cache: no value of `input_pos` is read on the host."""
    return masked_attention(q, k, v, input_pos, slot_positions(input_pos[-1], k.shape[2]), scale, window)


# ------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def split_range(first, T: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, GRAIN: tl.constexpr):
    """Of the keys that tokens first to first + T - 1 see, those of split program_id(1): positions [begin, end)."""
    end = first + T
    begin = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(end - begin, SPLITS), GRAIN) * GRAIN
    begin += tl.program_id(1) * share
    return begin, tl.minimum(begin + share, end)


@triton.jit
def softmax_step(scores, row_max, row_sum):
    """Takes one more tile of scores (units of log2) into a running softmax.

    Returns the tile's weights, the decay of what was summed before, and the new maxima and sums of the rows.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row may see none of the first keys
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def _decode_split_kernel(
    q_ptr,  # [B, Hkv * GROUP, T, D]
    k_ptr,  # [B, Hkv, L, D]
    v_ptr,  # [B, Hkv, L, D]
    input_pos_ptr,  # [T] int64
    acc_ptr,  # [B, Hkv, SPLITS, GROUP * T, D] float32, sums of exp2(score - max) * v
    max_ptr,  # [B, Hkv, SPLITS, GROUP * T] float32, largest score in units of log2
    sum_ptr,  # [B, Hkv, SPLITS, GROUP * T] float32, sums of exp2(score - max)
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    scale_log2,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,  # L where positions may exceed it, else 0
    SPLITS: tl.constexpr,
    GRAIN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = GROUP * T
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    head_index = tl.program_id(0) // ROW_TILES  # over B * Hkv
    batch, head = (head_index // KV_HEADS).to(tl.int64), (head_index % KV_HEADS).to(tl.int64)
    rows = (tl.program_id(0) % ROW_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < ROWS
    out_rows = (head_index * SPLITS + tl.program_id(1)).to(tl.int64) * ROWS + rows

    offs_d = tl.arange(0, D)
    first = tl.load(input_pos_ptr).to(tl.int32)
    q_rows = batch * stride_qb + (head * GROUP + rows // T) * stride_qh + (rows % T) * stride_qt
    # Loaded before the keys' range is known, so that the two loads wait together.
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask[:, None], other=0.0)
    begin, end = split_range(first, T, WINDOW, SPLITS, GRAIN)
    if begin >= end:
        tl.store(max_ptr + out_rows, float("-inf"), mask=row_mask)
        tl.store(sum_ptr + out_rows, 0.0, mask=row_mask)
        return

    row_pos = first + rows % T
    offs_n = tl.arange(0, BLOCK_N)
    k_base = k_ptr + batch * stride_kb + head * stride_kh
    v_base = v_ptr + batch * stride_vb + head * stride_vh

    scale_log2 = tl.cast(scale_log2, tl.float32)  # a compiler may hand it over as float64
    acc = tl.zeros([BLOCK_R, D], tl.float32)
    row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        key_pos = start + offs_n
        key_mask = key_pos < end
        slots = (key_pos % RING if RING > 0 else key_pos).to(tl.int64)
        k = tl.load(k_base + slots[:, None] * stride_kl + offs_d[None, :], mask=key_mask[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        seen = key_mask[None, :] & (key_pos[None, :] <= row_pos[:, None])
        if WINDOW > 0:
            seen = seen & (key_pos[None, :] > row_pos[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        weights, decay, row_max, row_sum = softmax_step(scores, row_max, row_sum)
        v = tl.load(v_base + slots[:, None] * stride_vl + offs_d[None, :], mask=key_mask[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")

    tl.store(acc_ptr + out_rows[:, None] * D + offs_d[None, :], acc, mask=row_mask[:, None])
    tl.store(max_ptr + out_rows, row_max, mask=row_mask)
    tl.store(sum_ptr + out_rows, row_sum, mask=row_mask)


# ----------------------------------------------------------------------------------------------------------- op


def check_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> None:
    """Raise ValueError unless q [B, Hq, T, D], k and v [B, Hkv, L, D] and input_pos [T] belong together."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must have 4 dimensions, got {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} does not fit k {list(k.shape)}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    head_dim = q.shape[3]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be a power of two from 16 on, got {head_dim}")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("q, k and v must be contiguous along head_dim")
    if input_pos.dim() != 1 or input_pos.shape[0] != q.shape[2] or input_pos.dtype != torch.int64:
        raise ValueError(f"input_pos must be int64 [{q.shape[2]}], got {input_pos.dtype} {list(input_pos.shape)}")
    if window < 0:
        raise ValueError(f"window must be 0 (unlimited) or more, got {window}")


def _check(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> None:
    check_attention(q, k, v, input_pos, window)
    if not 1 <= q.shape[2] <= MAX_TOKENS:
        raise ValueError(f"decode_attention takes 1 to {MAX_TOKENS} tokens, got {q.shape[2]}")
    if window > 0 and k.shape[2] < window + q.shape[2] - 1:
        raise ValueError(f"a window of {window} and {q.shape[2]} tokens do not fit a cache of {k.shape[2]} slots")


def check_planes(planes: int) -> None:
    if planes not in (1, 2):
        raise ValueError(f"decode_attention_quantize: planes must be 1 or 2, got {planes}")


def choose_config(
    configs: Sequence[DecodeConfig], rows: int, head_dim: int, columns: int, itemsize: int, shared_limit: int
) -> DecodeConfig:
    """The first of `configs` made for this many rows that fits the shared memory, else the smallest of them."""
    block_r = 16 if rows <= 16 else 32
    suited = [c for c in configs if c.block_r == block_r]
    return next((c for c in suited if c.shared_bytes(head_dim, columns, itemsize) <= shared_limit), suited[-1])


def split_count(config: DecodeConfig, heads: int, rows: int, max_keys: int, multiprocessors: int) -> int:
    """Programs that share the keys of one head, so that all heads together fill the device once."""
    programs = heads * -(-rows // config.block_r)
    filling = max(1, config.programs_per_sm * multiprocessors // programs)
    return min(filling, -(-max_keys // SPLIT_GRAIN))


def split_attention_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int,
    config: DecodeConfig,
    splits: int,
) -> Partials:
    """Run the kernel that divides the keys, with the given configuration."""
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    rows = q_heads // kv_heads * tokens
    partials = empty_partials(q, kv_heads, splits)
    wrap_triton(_decode_split_kernel)[(batch * kv_heads * triton.cdiv(rows, config.block_r), splits)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        input_pos_ptr=input_pos,
        acc_ptr=partials.acc,
        max_ptr=partials.largest,
        sum_ptr=partials.sums,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_qt=q.stride(2),
        stride_kb=k.stride(0),
        stride_kh=k.stride(1),
        stride_kl=k.stride(2),
        stride_vb=v.stride(0),
        stride_vh=v.stride(1),
        stride_vl=v.stride(2),
        scale_log2=scale * LOG2_E,
        T=tokens,
        GROUP=q_heads // kv_heads,
        KV_HEADS=kv_heads,
        WINDOW=window,
        RING=length if window > 0 else 0,
        SPLITS=splits,
        GRAIN=SPLIT_GRAIN,
        D=head_dim,
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return partials


def _split_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Partials:
    """Run it with the configuration and the number of splits that suit the device."""
    tokens, head_dim = q.shape[2], q.shape[3]
    rows = q.shape[1] // k.shape[1] * tokens
    multiprocessors, shared_limit = device_limits(q.device)
    config = choose_config(CONFIGS, rows, head_dim, 2 * head_dim, q.element_size(), shared_limit)
    max_keys = min(k.shape[2], window + tokens - 1) if window > 0 else k.shape[2]
    splits = split_count(config, k.shape[0] * k.shape[1], rows, max_keys, multiprocessors)
    return split_attention_launch(q, k, v, input_pos, scale, window, config, splits)


@triton_op("gemma4::decode_attention", mutates_args={})
def decode_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Tensor:
    """Attend from q [B, Hq, T, D], T = 1 to 8, to a cache k, v [B, Hkv, L, D] that holds these tokens already.

    `input_pos` [T] int64, consecutive; `window` 0 attends to everything before. Returns [B, Hq, T, D] in q's dtype.
    Raises ValueError on shapes, dtypes or strides that do not fit. Positions are not checked: they stay on the device.
    """
    _check(q, k, v, input_pos, window)
    if q.device.type == "cpu":
        return decode_attention_reference(q, k, v, input_pos, scale, window)
    return merge_heads(_split_attention(q, k, v, input_pos, scale, window), q)


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Tensor:
    _check(q, k, v, input_pos, window)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@decode_attention.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Tensor:
    _check(q, k, v, input_pos, window)
    first, last = int(input_pos[0]), int(input_pos[-1])
    key_pos = torch.arange(max(0, first - window + 1) if window > 0 else 0, last + 1)
    slots = key_pos % k.shape[2]
    return masked_attention(q, k[:, :, slots], v[:, :, slots], input_pos, key_pos, scale, window)


@triton_op("gemma4::decode_attention_quantize", mutates_args={})
def decode_attention_quantize(
    q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_attention`; returns what `quantize_activations` returns for its rows [B * T, Hq * D] in float32.

    The float32 result is quantized as it is, without being rounded to q's dtype first.
    """
    _check(q, k, v, input_pos, window)
    check_planes(planes)
    if q.device.type == "cpu":
        return _quantize_reference(q, k, v, input_pos, scale, window, planes)
    return merge_quantized(_split_attention(q, k, v, input_pos, scale, window), q, planes)


def _quantize_reference(
    q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int, planes: int
) -> tuple[Tensor, Tensor, Tensor]:
    heads = decode_attention_reference(q.float(), k.float(), v.float(), input_pos, scale, window)
    return quantize_activations_reference(head_rows(heads), planes)


@decode_attention_quantize.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, input_pos, window)
    check_planes(planes)
    return empty_quantized(q, planes)
