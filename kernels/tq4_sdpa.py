"""Attention over a TurboQuant cache, decompressed piece by piece inside the loop over keys.

    out[h, t] = softmax_j(scale * q[h, t] . k_j) v_j,   0 <= j <= input_pos[t],   k_j, v_j of KV head h // G

q [1, Hq, T, D] and the result are in the model's basis and dtype, input_pos [T] int64 is consecutive, and keys and
values of these positions are in the cache already (`gemma4::tq4_write`), so a chunk of a prompt sees of itself what
later tokens will see of it. The cache is as `gemma4.kernels.tq4_cache` describes it. Where k_weight [D] is given, the
values serve as keys, too: k_codes hold the dimensions that rotary embedding turns (`gemma4.kernels.tq4_rotation`).

Up to MAX_TOKENS tokens run as split-K decoding (`tq4_decode`): codes stay in their rotated basis, tile by tile, queries
are rotated once and the result back, and the scale of a vector multiplies its scores, or its weights. More tokens run
as `tq4_prefill`, which decodes a slice of keys for all of them at a time. The loops end at input_pos, read on the
device: a step costs what its context does. Both keep the G heads that share a KV head in one tile and sum in float32.
Products are float16 in decoding, whatever the dtype of q, and of that dtype in prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import triton_op

from gemma4.kernels.decode_attention import MAX_TOKENS
from gemma4.kernels.split_merge import by_token, empty_heads
from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_decode import tq4_decode
from gemma4.kernels.tq4_prefill import tq4_prefill
from gemma4.kernels.tq4_rotation import launch_rotate_queries, rotate_queries_reference
from gemma4.kernels.turboquant import decode, rotate_back


def tq4_sdpa_reference(q: Tensor, cache: TQ4Cache, k_weight: Tensor | None, input_pos: Tensor, scale: float) -> Tensor:
    """The definition, over every slot of the cache: no value of `input_pos` is read on the host."""
    head_dim, tokens = int(q.shape[3]), q.shape[2]
    _, turned = cache.widths(head_dim)
    slots = torch.arange(cache.length, device=q.device)
    written = slots <= input_pos[-1]
    values = decode(cache.v_codes, torch.where(written, cache.v_scale, 0.0), head_dim)
    keys = decode(cache.k_codes, torch.where(written, cache.k_scale, 0.0), turned)
    if k_weight is not None:
        keys = torch.cat((keys, values), -1)
    keys = torch.cat((cache.first_key[:, :, None], keys[:, :, 1:]), 2)
    queries = rotate_queries_reference(q, k_weight, turned).float()
    rows = queries.view(1, cache.kv_heads, -1, queries.shape[3])
    seen = (slots <= input_pos[:, None]).repeat(rows.shape[2] // tokens, 1)
    weights = torch.softmax((rows @ keys.mT * scale).masked_fill(~seen, float("-inf")), -1)
    return rotate_back(weights @ values).reshape(q.shape).to(q.dtype)


def _check(q: Tensor, cache: TQ4Cache, k_weight: Tensor | None, input_pos: Tensor) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or q.stride(3) != 1:
        raise ValueError(f"q must be [1, Hq, T, D], contiguous along D, got {list(q.shape)} strides {q.stride()}")
    head_dim = int(q.shape[3])
    if q.shape[1] % cache.kv_heads:
        raise ValueError(f"{q.shape[1]} query heads do not share {cache.kv_heads} KV heads")
    cache.check(head_dim, cache.kv_heads)
    if (k_weight is None) != (cache.k_codes.shape == cache.v_codes.shape):
        raise ValueError("k_weight must be given where, and only where, k_codes are narrower than v_codes")
    if k_weight is not None and (k_weight.shape != (head_dim,) or k_weight.dtype != torch.float32):
        raise ValueError(f"k_weight must be float32 [{head_dim}], got {k_weight.dtype} {list(k_weight.shape)}")
    if input_pos.dim() != 1 or input_pos.shape[0] != q.shape[2] or input_pos.dtype != torch.int64:
        raise ValueError(f"input_pos must be int64 [{q.shape[2]}], got {input_pos.dtype} {list(input_pos.shape)}")


@triton_op("gemma4::tq4_sdpa", mutates_args={})
def tq4_sdpa(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    first_key: Tensor,
    k_weight: Tensor | None,
    input_pos: Tensor,
    scale: float,
) -> Tensor:
    """Attend from q [1, Hq, T, D] to a TurboQuant cache that holds these tokens already; returns q's shape and dtype.

    In memory, the result lies token by token. Raises ValueError on shapes, dtypes or strides that do not fit. Positions
    are not checked: they stay on the device.
    """
    cache = TQ4Cache(k_codes, k_scale, v_codes, v_scale, first_key)
    _check(q, cache, k_weight, input_pos)
    if q.device.type == "cpu":
        return by_token(tq4_sdpa_reference(q, cache, k_weight, input_pos, scale))
    if not guard_or_false(q.shape[2] <= MAX_TOKENS):
        return tq4_prefill(q, cache, k_weight, input_pos, scale)
    out = empty_heads(q)
    _, turned = cache.widths(int(q.shape[3]))
    tq4_decode(launch_rotate_queries(q, k_weight, turned), cache, input_pos, scale, out)
    return out


@tq4_sdpa.register_fake
def _(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    first_key: Tensor,
    k_weight: Tensor | None,
    input_pos: Tensor,
    scale: float,
) -> Tensor:
    cache = TQ4Cache(k_codes, k_scale, v_codes, v_scale, first_key)
    _check(q, cache, k_weight, input_pos)
    return empty_heads(q)


@tq4_sdpa.register_kernel("cpu")
def _(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    first_key: Tensor,
    k_weight: Tensor | None,
    input_pos: Tensor,
    scale: float,
) -> Tensor:
    cache = TQ4Cache(k_codes, k_scale, v_codes, v_scale, first_key)
    _check(q, cache, k_weight, input_pos)
    seen = cache.first_slots(int(input_pos[-1]) + 1)
    return by_token(tq4_sdpa_reference(q, seen, k_weight, input_pos, scale))
