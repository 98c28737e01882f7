"""RMS norm, alone or after closing a residual branch, emitting dense rows or int8 activations for the packed matvecs.

    rms_norm         x' = rms(x) * weight
    residual_norm    h' = (h + rms(y) * post_weight) * scale;  x' = rms(h') * weight

with rms(x) = x / sqrt(mean(x^2) + eps) (arXiv 1910.07467), all in float32. The second is everything between two matrix
products of a decoder layer: the norm after a branch, the residual sum, the layer's output scale and the norm before the
next branch. The forms `*_quantize` go on to quantize x' as `gemma4.kernels.activations` does.

Few rows leave most of the chip idle, so each is then shared by several programs: every one of them sums the squares of
the whole row, which is cheap, and finishes only its own piece, which is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.activations import (
    GROUP,
    UNIT,
    empty_activations,
    quantize_activations_reference,
    store_quantized,
)
from gemma4.kernels.dependent_launch import await_inputs, dependent_launch_options

__all__ = [
    "residual_norm",
    "residual_norm_",
    "residual_norm_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "rms_norm_reference",
]

SHARED_ROWS = 8
"""Up to this many rows are each shared by several programs."""
SHARED_GROUPS = 16
"""Groups of 32 that one program of a shared row finishes."""


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K] of any float dtype, weight float32 [K]. Returns float32 [..., K]."""
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, eps)


def close_branch_reference(h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """h' of the formula above, float32."""
    h = h + rms_norm_reference(y, post_weight, eps)
    return h if scale is None else h * scale


@triton.jit
def _load_row(ptr, offs, K: tl.constexpr):
    """float32 values at offs, zeros past K."""
    return tl.load(ptr + offs, mask=offs < K, other=0.0).to(tl.float32)


@triton.jit
def _close_branch(h_ptr, y_ptr, post_weight, y_scale, scale, offs, K: tl.constexpr, HAS_BRANCH: tl.constexpr):
    """h' of the formula above at offs of one row; h itself without a branch."""
    h = _load_row(h_ptr, offs, K)
    if HAS_BRANCH:
        h = (h + _load_row(y_ptr, offs, K) * y_scale * post_weight) * scale
    return h


@triton.jit
def fused_norm_kernel(
    h_ptr,  # [M, K]
    y_ptr,  # [M, K], read only with HAS_BRANCH
    post_weight_ptr,  # [K] float32, read only with HAS_BRANCH
    scale_ptr,  # [1] float32, read only with HAS_SCALE
    weight_ptr,  # [K] float32
    h_out_ptr,  # [M, K] float32, written only with HAS_BRANCH
    x_ptr,  # [M, K], or with PLANES the int8 planes of activations
    xs_ptr,  # [M, K//32] float32, written only with PLANES
    xsum_ptr,  # [M, K//16] float32, written only with PLANES
    M,
    eps,
    K: tl.constexpr,
    ROW: tl.constexpr,  # power of two of at least K
    GROUPS: tl.constexpr,  # power of two of groups that this program finishes
    PLANES: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IN_PLACE: tl.constexpr,  # h_out is h
    PDL: tl.constexpr,
):
    eps = tl.cast(eps, tl.float32)  # a compiler may hand it over as float64
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    live = group < K // 32
    at = group[:, None, None] * 32 + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    inside = live[:, None, None]
    offs = tl.arange(0, ROW)
    h_ptr += row * K
    y_ptr += row * K
    weight = _load_row(weight_ptr, at, K)
    y_scale, scale = 1.0, 1.0
    post_weight, post_weight_piece = weight, weight
    if HAS_BRANCH:
        post_weight, post_weight_piece = _load_row(post_weight_ptr, offs, K), _load_row(post_weight_ptr, at, K)
        if HAS_SCALE:
            scale = tl.load(scale_ptr)
    await_inputs(PDL)
    if HAS_BRANCH:
        y = _load_row(y_ptr, offs, K)
        y_scale = tl.rsqrt(tl.sum(y * y, axis=0) / K + eps)
    h = _close_branch(h_ptr, y_ptr, post_weight, y_scale, scale, offs, K, HAS_BRANCH)
    h_scale = tl.rsqrt(tl.sum(h * h, axis=0) / K + eps)
    piece = _close_branch(h_ptr, y_ptr, post_weight_piece, y_scale, scale, at, K, HAS_BRANCH)
    if IN_PLACE:
        tl.debug_barrier()  # where a row is shorter than the program, several threads read an element
    if HAS_BRANCH:
        tl.store(h_out_ptr + row * K + at, piece, mask=inside)
    x = piece * h_scale * weight
    if PLANES == 0:
        tl.store(x_ptr + row * K + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    else:
        store_quantized(x, group, live, row, M, x_ptr, xs_ptr, xsum_ptr, K, PLANES)


def _check(name: str, h: Tensor, y: Tensor | None, weights: tuple[Tensor, ...]) -> None:
    if h.dim() != 2 or h.shape[1] == 0 or h.shape[1] % GROUP or not h.is_contiguous():
        raise ValueError(f"{name}: the rows must be contiguous [M, K] with K a multiple of 32, got {list(h.shape)}")
    if y is not None and (y.shape != h.shape or not y.is_contiguous()):
        raise ValueError(f"{name}: y must be contiguous {list(h.shape)}, got {list(y.shape)}")
    for weight in weights:
        if weight.shape != h.shape[1:] or weight.dtype != torch.float32:
            expected = f"float32 {list(h.shape[1:])}"
            raise ValueError(f"{name}: a weight must be {expected}, got {weight.dtype} {list(weight.shape)}")


def _check_planes(name: str, planes: int) -> None:
    if planes not in (1, 2):
        raise ValueError(f"{name}: planes must be 1 or 2, got {planes}")


def launch_fused_norm(
    h: Tensor,
    y: Tensor | None,
    post_weight: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
    out: tuple[Tensor, ...],
    *,
    in_place: bool = False,
) -> Tensor:
    """Run the kernel; on CPU tensors only where Triton interprets. Fills `out`: dense rows, or activations.

    in_place: write h' over h; then no row is shared. Returns h', or h itself where there is no branch y.
    """
    m, k = h.shape
    h_out = h if y is None or in_place else torch.empty_like(h, dtype=torch.float32)
    padded_groups = triton.cdiv(k, UNIT) * (UNIT // GROUP)
    is_shared = m <= SHARED_ROWS and not in_place
    groups = min(SHARED_GROUPS, padded_groups) if is_shared else padded_groups
    wrap_triton(fused_norm_kernel)[(m, triton.cdiv(padded_groups, groups))](
        h_ptr=h,
        y_ptr=h if y is None else y,
        post_weight_ptr=weight if post_weight is None else post_weight,
        scale_ptr=weight if scale is None else scale,
        weight_ptr=weight,
        h_out_ptr=h_out,
        x_ptr=out[0],
        xs_ptr=out[1] if len(out) > 1 else weight,
        xsum_ptr=out[2] if len(out) > 1 else weight,
        M=m,
        eps=eps,
        K=k,
        ROW=triton.next_power_of_2(k),
        GROUPS=triton.next_power_of_2(groups),
        PLANES=out[0].shape[0] if len(out) > 1 else 0,
        HAS_BRANCH=y is not None,
        HAS_SCALE=scale is not None,
        IN_PLACE=in_place,
        num_warps=16 if k > 1024 else 4,
        **dependent_launch_options(h.device),
    )
    return h_out


@triton_op("gemma4::rms_norm", mutates_args={})
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x: [M, K], weight: float32 [K]. Returns the normalised rows in `dtype`."""
    _check("rms_norm", x, None, (weight,))
    if x.device.type == "cpu":
        return rms_norm_reference(x, weight, eps).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    launch_fused_norm(x, None, None, None, weight, eps, (out,))
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@triton_op("gemma4::rms_norm_quantize", mutates_args={})
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x: [M, K], weight: float32 [K]. Returns what `quantize_activations` returns for the normalised rows."""
    _check("rms_norm_quantize", x, None, (weight,))
    _check_planes("rms_norm_quantize", planes)
    if x.device.type == "cpu":
        return quantize_activations_reference(rms_norm_reference(x, weight, eps), planes)
    out = empty_activations(x, planes)
    launch_fused_norm(x, None, None, None, weight, eps, out)
    return out


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return empty_activations(x, planes)


@triton_op("gemma4::residual_norm", mutates_args={})
def residual_norm(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """h: float32 [M, K]; y: [M, K]; post_weight, weight: float32 [K]; scale: float32 [1] or None.

    Returns h' float32 [M, K] and its normalised rows in `dtype`.
    """
    _check("residual_norm", h, y, (post_weight, weight))
    if h.device.type == "cpu":
        h = close_branch_reference(h, y, post_weight, scale, eps)
        return h, rms_norm_reference(h, weight, eps).to(dtype)
    out = torch.empty_like(h, dtype=dtype)
    return launch_fused_norm(h, y, post_weight, scale, weight, eps, (out,)), out


@residual_norm.register_fake
def _(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h, dtype=torch.float32), torch.empty_like(h, dtype=dtype)


@triton_op("gemma4::residual_norm_", mutates_args={"h"})
def residual_norm_(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """As `residual_norm`, with h' in the place of h. Returns the normalised rows."""
    _check("residual_norm_", h, y, (post_weight, weight))
    if h.device.type == "cpu":
        h.copy_(close_branch_reference(h, y, post_weight, scale, eps))
        return rms_norm_reference(h, weight, eps).to(dtype)
    out = torch.empty_like(h, dtype=dtype)
    launch_fused_norm(h, y, post_weight, scale, weight, eps, (out,), in_place=True)
    return out


@residual_norm_.register_fake
def _(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(h, dtype=dtype)


@triton_op("gemma4::residual_norm_quantize", mutates_args={})
def residual_norm_quantize(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `residual_norm`; returns h' and what `quantize_activations` returns for its normalised rows."""
    _check("residual_norm_quantize", h, y, (post_weight, weight))
    _check_planes("residual_norm_quantize", planes)
    if h.device.type == "cpu":
        h = close_branch_reference(h, y, post_weight, scale, eps)
        return h, *quantize_activations_reference(rms_norm_reference(h, weight, eps), planes)
    out = empty_activations(h, planes)
    return launch_fused_norm(h, y, post_weight, scale, weight, eps, out), *out


@residual_norm_quantize.register_fake
def _(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(h, dtype=torch.float32), *empty_activations(h, planes)
