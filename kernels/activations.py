"""Activations as int8 planes with one scale per 32: what the packed matvec kernels multiply.

A group of 32 activations x with largest magnitude a is stored as integers q and one float32 scale s:

    planes = 2    s = a / 32512,  q = round(x / s) = 256 * high + low     (high, low: int8)
    planes = 1    s = a / 127,    q = round(x / s) = high

and `sums` holds s * sum(q) of every 16, which the formats with an offset per group need. Two planes keep a
relative error near 2e-5, below bfloat16's; one plane keeps 5e-3 to 9e-3.

Fewer than FRAGMENT_ROWS rows are stored as [planes, M, 4, ceil(K/64), 16]: [p, m, s, u, b] is activation 64u + 16s + b
of row m, so that neighbouring threads of a matvec, each working on one unit u of 64, read neighbouring 16 bytes. More
rows are stored as [planes, ceil(K/64), M, 4, 16], as the lanes of matrix instructions take them: [p, u, m, t, 8h + b]
is activation 64u + 32h + 8t + b. Past K the planes hold zeros.

The int8 idea is that of llama.cpp's `quantize_q8_1`; the second plane is this library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.dependent_launch import await_inputs, dependent_launch_options

__all__ = [
    "activation_runs",
    "activation_shape",
    "dequantize_activations",
    "empty_activations",
    "quantize_activations",
    "quantize_activations_reference",
    "store_quantized",
]

GROUP = 32
UNIT = 64
FRAGMENT_ROWS = tl.constexpr(4)
"""From this many rows on, planes are stored for matrix instructions."""
BLOCK_GROUPS = 32
"""Groups handled by one program."""
TINY = 1e-30
"""A group whose largest magnitude is below this is stored as zeros: its scale would not be a normal number."""


def quantize_activations_reference(x: Tensor, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Torch form of `quantize_activations`."""
    _check(x, planes)
    m, k = x.shape
    groups = x.float().reshape(m, k // GROUP, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    levels = 32512.0 if planes == 2 else 127.0
    inverse = torch.where(largest > TINY, levels / largest, 0.0)
    scale = largest / levels + 0.0 * groups.sum(-1, keepdim=True)
    q = torch.floor(groups * inverse + 0.5).clamp(-levels, levels).nan_to_num(0.0).to(torch.int32)
    sums = scale.reshape(m, -1, 1) * q.reshape(m, -1, 2, GROUP // 2).sum(-1)
    high = (q + 128) >> 8 if planes == 2 else q
    parts = [high, q - (high << 8)] if planes == 2 else [high]
    packed = torch.stack(parts).to(torch.int8).reshape(planes, m, k)
    padded = torch.nn.functional.pad(packed, (0, -k % UNIT))
    if m < FRAGMENT_ROWS.value:
        padded = padded.reshape(planes, m, -1, 4, 16).transpose(2, 3)
    else:
        padded = padded.reshape(planes, m, -1, 2, 4, 8).permute(0, 2, 1, 4, 3, 5).flatten(4)
    return padded.contiguous(), scale.reshape(m, -1), sums.reshape(m, -1)


def dequantize_activations(xq: Tensor, xs: Tensor) -> Tensor:
    """The float32 [M, K] that int8 planes of `activation_shape` and scales [M, K/32] stand for."""
    q = xq[0].float() if xq.shape[0] == 1 else xq[0].float() * 256.0 + xq[1].float()
    is_by_row = xs.shape[0] < FRAGMENT_ROWS.value
    q = q.transpose(1, 2) if is_by_row else q.unflatten(-1, (2, 8)).permute(1, 0, 3, 2, 4)
    q = q.flatten(1)[:, : xs.shape[1] * GROUP]
    x: Tensor = (q.unflatten(-1, (-1, GROUP)) * xs[..., None]).flatten(-2)
    return x


def activation_shape(planes: int, m: int, k: int) -> tuple[int, ...]:
    """Shape of the int8 planes of m rows of k activations."""
    if m < FRAGMENT_ROWS.value:
        return (planes, m, 4, triton.cdiv(k, UNIT), 16)
    return (planes, triton.cdiv(k, UNIT), m, 4, 16)


@triton.jit
def activation_runs(plane, row, sixteenth, M, K: tl.constexpr):
    """Where activations 16 * sixteenth + 0 to 7 of a row are, and 8 to 15, counted in runs of 8 of all M rows."""
    UNITS: tl.constexpr = (K + 63) // 64
    if M < FRAGMENT_ROWS:
        first = (((plane * M + row) * 4 + (sixteenth & 3)) * UNITS + (sixteenth >> 2)) * 2
        second = first + 1
    else:
        unit = (plane * UNITS + (sixteenth >> 2)) * M + row
        first = unit * 8 + (sixteenth & 1) * 4 + ((sixteenth >> 1) & 1)
        second = first + 2
    return first, second


@triton.jit
def _store_plane(xq_ptr, q, plane, row, sixteenth, inside, M, K: tl.constexpr):
    byte = tl.arange(0, 16)[None, None, :]
    first, second = activation_runs(plane, row, sixteenth, M, K)
    at = tl.where(byte < 8, first[:, :, None], second[:, :, None]) * 8 + byte % 8
    tl.store(xq_ptr + at, q.to(tl.int8), mask=inside)


@triton.jit
def store_quantized(
    x,  # [groups, 2, 16] float32
    group,  # [groups] index of each group in its row
    live,  # [groups] whether the group exists
    row,  # int64
    M,
    xq_ptr,  # int8 planes of M rows
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    K: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Quantize groups of 32 held in registers and store planes, scales and sums of one row.

    The planes are also written for the group that pads K to a multiple of 64, where x must be zero.
    """
    UNITS: tl.constexpr = (K + 63) // 64
    LEVELS: tl.constexpr = 32512.0 if PLANES == 2 else 127.0
    largest = tl.max(tl.max(tl.abs(x), axis=2), axis=1)
    inverse = tl.where(largest > 1e-30, LEVELS / tl.maximum(largest, 1e-30), 0.0)
    scale = largest / LEVELS + 0.0 * tl.sum(tl.sum(x, axis=2), axis=1)
    q = tl.floor(x * inverse[:, None, None] + 0.5)
    q = tl.minimum(tl.maximum(q, -LEVELS), LEVELS).to(tl.int32)
    half = tl.arange(0, 2)
    sixteenth = group[:, None] * 2 + half[None, :]
    inside = (group < UNITS * 2)[:, None, None]
    if PLANES == 2:
        high = (q + 128) >> 8
        _store_plane(xq_ptr, q - (high << 8), 1, row, sixteenth, inside, M, K)
    else:
        high = q
    _store_plane(xq_ptr, high, 0, row, sixteenth, inside, M, K)
    tl.store(xs_ptr + row * (K // 32) + group, scale, mask=live)
    sums = scale[:, None] * tl.sum(q, axis=2).to(tl.float32)
    tl.store(xsum_ptr + row * (K // 16) + sixteenth, sums, mask=live[:, None])


@triton.jit
def quantize_activations_kernel(
    x_ptr,  # [M, K]
    xq_ptr,  # int8 planes, of `activation_shape`
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    M,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    live = group < K // 32
    at = group[:, None, None] * 32 + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    x = tl.load(x_ptr + row * K + at, mask=live[:, None, None], other=0.0).to(tl.float32)
    store_quantized(x, group, live, row, M, xq_ptr, xs_ptr, xsum_ptr, K, PLANES)


def _check(x: Tensor, planes: int) -> None:
    if planes not in (1, 2):
        raise ValueError(f"quantize_activations: planes must be 1 or 2, got {planes}")
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % GROUP != 0:
        raise ValueError(f"quantize_activations: x must be [M, K] with K a multiple of 32, got {list(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"quantize_activations: x must be bfloat16 or float32, got {x.dtype}")


def empty_activations(x: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten planes, scales and sums for rows like x [M, K]."""
    m, k = x.shape
    return (
        x.new_empty(activation_shape(planes, m, k), dtype=torch.int8),
        x.new_empty((m, k // GROUP), dtype=torch.float32),
        x.new_empty((m, k // (GROUP // 2)), dtype=torch.float32),
    )


def launch_quantize_activations(x: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel on x [M, K]; on CPU tensors only where Triton interprets."""
    _check(x, planes)
    x = x.contiguous()
    m, k = x.shape
    xq, xs, xsum = empty_activations(x, planes)
    grid = (triton.cdiv(k, UNIT * BLOCK_GROUPS // 2), m)
    wrap_triton(quantize_activations_kernel)[grid](
        x_ptr=x,
        xq_ptr=xq,
        xs_ptr=xs,
        xsum_ptr=xsum,
        M=m,
        K=k,
        PLANES=planes,
        BLOCK_GROUPS=BLOCK_GROUPS,
        num_warps=4,
        **dependent_launch_options(x.device),
    )
    return xq, xs, xsum


@triton_op("gemma4::quantize_activations", mutates_args={})
def quantize_activations(x: Tensor, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x: bfloat16 or float32 [M, K], K a multiple of 32.

    Returns int8 planes of `activation_shape`, float32 scales [M, K/32] and float32 sums [M, K/16]. A NaN or infinite
    activation makes the scale and the sums of its group NaN. Raises ValueError for another shape or dtype.
    """
    if x.device.type == "cpu":
        return quantize_activations_reference(x, planes)
    return launch_quantize_activations(x, planes)


@quantize_activations.register_fake
def _(x: Tensor, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, planes)
    return empty_activations(x, planes)
