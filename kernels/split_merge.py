"""Merges the partial results of a split attention: dense heads, or the int8 activations of the next matrix product.

    out = sum_s exp2(m_s - m) acc_s / sum_s exp2(m_s - m) l_s,   m = max_s m_s

over the splits s of the keys, in a fixed order and in float32: m_s is the largest score of a split (units of log2),
l_s the sum of exp2(score - m_s) and acc_s that of exp2(score - m_s) * v (Flash-Decoding, Dao et al., 2023). Activations
are quantized from the float32 sums as `gemma4.kernels.activations` does; a dense result rounds them to its dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.activations import (
    UNIT,
    empty_activations,
    launch_quantize_activations,
    store_quantized,
)
from gemma4.kernels.dependent_launch import await_inputs, dependent_launch_options

__all__ = [
    "Partials",
    "by_token",
    "empty_heads",
    "empty_partials",
    "empty_quantized",
    "head_rows",
    "launch_merge",
    "merge_heads",
    "merge_quantized",
]


class Partials(NamedTuple):
    """Attention of B sequences over SPLITS pieces of their keys; R = query heads of a KV head * T, head major."""

    acc: Tensor  # float32 [B, Hkv, SPLITS, R, D], unwritten where a split has no keys
    largest: Tensor  # float32 [B, Hkv, SPLITS, R], -inf where a split has no keys
    sums: Tensor  # float32 [B, Hkv, SPLITS, R], 0 where a split has no keys


def empty_partials(q: Tensor, kv_heads: int, splits: int) -> Partials:
    """Unwritten partial results for q [B, Hq, T, D]."""
    batch, q_heads, tokens, head_dim = q.shape
    rows = (batch, kv_heads, splits, q_heads // kv_heads * tokens)
    acc, largest, sums = (q.new_empty(shape, dtype=torch.float32) for shape in ((*rows, head_dim), rows, rows))
    return Partials(acc, largest, sums)


@triton.jit
def split_merge_kernel(
    acc_ptr,  # [B, Hkv, SPLITS, ROWS, D] float32
    largest_ptr,  # [B, Hkv, SPLITS, ROWS] float32
    sums_ptr,  # [B, Hkv, SPLITS, ROWS] float32
    out_ptr,  # [B, Hq, T, D], or with PLANES the int8 planes of activations
    xs_ptr,  # [B * T, Hq * D / 32] float32, written only with PLANES
    xsum_ptr,  # [B * T, Hq * D / 16] float32, written only with PLANES
    M,  # B * T
    T: tl.constexpr,
    Q_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PLANES: tl.constexpr,
    PDL: tl.constexpr,
):
    K: tl.constexpr = Q_HEADS * D
    out_row = tl.program_id(0)  # over B, Hkv and ROWS, which is over B, Hq and T
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    splits = tl.arange(0, SPLITS_PADDED)
    mask = splits < SPLITS
    await_inputs(PDL)
    part_rows = (out_row // ROWS * SPLITS + splits).to(tl.int64) * ROWS + out_row % ROWS
    largest = tl.load(largest_ptr + part_rows, mask=mask, other=float("-inf"))
    sums = tl.load(sums_ptr + part_rows, mask=mask, other=0.0)
    acc = tl.load(acc_ptr + part_rows[:, None] * D + offs_d[None, :], mask=mask[:, None], other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    weighted = tl.where(weight[:, None] > 0.0, acc * weight[:, None], 0.0)
    out = tl.sum(weighted, 0) / tl.sum(sums * weight, 0)
    if PLANES == 0:
        tl.store(out_ptr + out_row.to(tl.int64) * D + offs_d, out.to(out_ptr.dtype.element_ty))
    else:
        head, token = out_row // T % Q_HEADS, out_row // (T * Q_HEADS) * T + out_row % T
        group = (head * D + tl.program_id(1) * BLOCK_D) // 32 + tl.arange(0, BLOCK_D // 32)
        token = token.to(tl.int64)
        store_quantized(
            tl.reshape(out, (BLOCK_D // 32, 2, 16)), group, group < K // 32,
            token, M, out_ptr, xs_ptr, xsum_ptr, K, PLANES,
        )  # fmt: skip


def launch_merge(partials: Partials, tokens: int, out: tuple[Tensor, ...]) -> None:
    """Run the kernel. Fills `out`: heads [B, Hq, T, D], or activations of D * Hq, where D is a multiple of 64."""
    batch, kv_heads, splits, rows, head_dim = partials.acc.shape
    q_heads = kv_heads * rows // tokens
    block_d = min(UNIT, head_dim)
    wrap_triton(split_merge_kernel)[(batch * kv_heads * rows, head_dim // block_d)](
        acc_ptr=partials.acc,
        largest_ptr=partials.largest,
        sums_ptr=partials.sums,
        out_ptr=out[0],
        xs_ptr=out[1] if len(out) > 1 else partials.sums,
        xsum_ptr=out[2] if len(out) > 1 else partials.sums,
        M=batch * tokens,
        T=tokens,
        Q_HEADS=q_heads,
        ROWS=rows,
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        D=head_dim,
        BLOCK_D=block_d,
        PLANES=out[0].shape[0] if len(out) > 1 else 0,
        num_warps=4,
        **dependent_launch_options(partials.acc.device),
    )


def merge_heads(partials: Partials, q: Tensor) -> Tensor:
    """The attention [B, Hq, T, D] of q, in its dtype."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch_merge(partials, q.shape[2], (out,))
    return out


def head_rows(heads: Tensor) -> Tensor:
    """Heads [B, Hq, T, D] side by side: [B * T, Hq * D]; a view where they lie token by token."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


def by_token(heads: Tensor) -> Tensor:
    """Heads [B, Hq, T, D] whose memory holds one token after another."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def empty_heads(q: Tensor) -> Tensor:
    """Unwritten heads like q [B, Hq, T, D], whose memory holds one token after another."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def merge_quantized(partials: Partials, q: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize_activations` returns for the float32 attention of q, the heads of a token side by side."""
    if q.shape[3] % UNIT:  # groups of two heads would share a unit
        return launch_quantize_activations(head_rows(merge_heads(partials, q.float())), planes)
    out = empty_quantized(q, planes)
    launch_merge(partials, q.shape[2], out)
    return out


def empty_quantized(q: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten activations for the heads of q [B, Hq, T, D], side by side."""
    batch, q_heads, tokens, head_dim = q.shape
    return empty_activations(q[:1, 0, :1, 0].expand(batch * tokens, q_heads * head_dim), planes)
