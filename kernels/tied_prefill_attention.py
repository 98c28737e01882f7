"""Attention of a chunk of new tokens over the tied rows before it, and causally over its own.

    out[b, h, t] = softmax_j(scale * q[b, h, t] . k_j) v_j,   0 <= j <= p_t = input_pos[t]
    k_j = [row_j[:R] | row_j[2R:]],  v_j = row_j[R:]
    row_j = kv_cache[b, h // G, j] for j < input_pos[0], else kv_new[b, h // G, j - input_pos[0]]

q [B, Hq, T, D], kv_new [B, Hkv, T, D + R] and kv_cache [B, Hkv, L, D + R] of one dtype, as
`gemma4.kernels.tied_rope_cache` makes them, R = D / 4; input_pos [T] int64, consecutive; T >= 1. The result has its
dimensions in their own order.

The kernel is that of `gemma4.kernels.prefill_attention`: prefill computes longer than it reads, so a tile of keys and
one of values are two overlapping views of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from gemma4.kernels.decode_attention import masked_attention
from gemma4.kernels.prefill_attention import choose_config, device_limits, prefill_attention_launch
from gemma4.kernels.split_merge import by_token, empty_heads
from gemma4.kernels.tied_decode_attention import check_tied
from gemma4.kernels.tied_rope_cache import keys_and_values, natural_order


def tied_prefill_attention_reference(
    q: Tensor, kv_new: Tensor, kv_cache: Tensor, input_pos: Tensor, scale: float
) -> Tensor:
    """The definition, over every slot of the cache: no value of `input_pos` is read on the host."""
    rotated = kv_new.shape[3] - q.shape[3]
    slots = torch.arange(kv_cache.shape[2], device=q.device)
    key_pos = torch.cat((torch.where(slots < input_pos[0], slots, -1), input_pos))
    k, v = keys_and_values(torch.cat((kv_cache, kv_new), 2), rotated)
    return natural_order(masked_attention(q, k, v, input_pos, key_pos, scale, 0), rotated)


def _check(q: Tensor, kv_new: Tensor, kv_cache: Tensor, input_pos: Tensor) -> None:
    check_tied(q, kv_new, input_pos)
    check_tied(q, kv_cache, input_pos)
    if kv_new.shape[2] != q.shape[2] or kv_new.shape[1] != kv_cache.shape[1]:
        found = f"{list(q.shape)} and kv_cache {list(kv_cache.shape)}"
        raise ValueError(f"kv_new {list(kv_new.shape)} does not fit q {found}")
    for name, x in (("kv_new", kv_new), ("kv_cache", kv_cache)):
        if x.stride(2) != x.shape[3]:
            raise ValueError(f"{name} must hold the rows of one head one after another, got strides {x.stride()}")


@triton_op("gemma4::tied_prefill_attention", mutates_args={})
def tied_prefill_attention(q: Tensor, kv_new: Tensor, kv_cache: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    """Attend from a chunk q [B, Hq, T, D] to the cache [B, Hkv, L, D + D/4] before it and to its own rows kv_new.

    The cache is only read. `input_pos` [T] int64, consecutive. Returns [B, Hq, T, D] in q's dtype, dimensions in
    natural order, in memory token by token. Raises ValueError on shapes, dtypes or strides that do not fit.
    """
    _check(q, kv_new, kv_cache, input_pos)
    if q.device.type == "cpu":
        return by_token(tied_prefill_attention_reference(q, kv_new, kv_cache, input_pos, scale))
    rotated = q.shape[3] // 4
    wgmma, shared_limit = device_limits(q.device)
    config = choose_config(q.shape[3], q.element_size(), wgmma and q.dtype != torch.float32, shared_limit)
    v_new, v_cache = kv_new[..., rotated:], kv_cache[..., rotated:]
    return prefill_attention_launch(q, kv_new, v_new, kv_cache, v_cache, input_pos, scale, 0, config, rotated)


@tied_prefill_attention.register_fake
def _(q: Tensor, kv_new: Tensor, kv_cache: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    _check(q, kv_new, kv_cache, input_pos)
    return empty_heads(q)


@tied_prefill_attention.register_kernel("cpu")
def _(q: Tensor, kv_new: Tensor, kv_cache: Tensor, input_pos: Tensor, scale: float) -> Tensor:
    _check(q, kv_new, kv_cache, input_pos)
    return by_token(tied_prefill_attention_reference(q, kv_new, kv_cache[:, :, : int(input_pos[0])], input_pos, scale))
