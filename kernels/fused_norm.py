"""RMS norm that emits int8 activations for the packed matvecs, alone or after closing a residual branch.

    rms_norm_quantize           x' = quantize(rms(x) * weight)
    residual_norm_quantize      h' = (h + rms(y) * post_weight) * scale;  x' = quantize(rms(h') * weight)

with rms(x) = x / sqrt(mean(x^2) + eps) (arXiv 1910.07467), all in float32. The second is everything between two matrix
products of a decoder layer: the norm after a branch, the residual sum, the layer's output scale, the norm before the
next branch and the quantization of `gemma4.kernels.activations`. One program handles one row; for decoding, M <= 8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.activations import GROUP, UNIT, quantize_activations_reference, store_quantized

__all__ = ["residual_norm_quantize", "residual_norm_quantize_reference", "rms_norm", "rms_norm_quantize"]

_MAX_WARPS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K] of any float dtype, weight float32 [K]. Returns float32 [..., K]."""
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight, eps)


def residual_norm_quantize_reference(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, planes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Torch form of `residual_norm_quantize`."""
    h = h + rms_norm(y, post_weight, eps)
    h = h if scale is None else h * scale
    return h, *quantize_activations_reference(rms_norm(h, weight, eps), planes)


@triton.jit
def _rms_scale(x, K: tl.constexpr, eps):
    """1 / rms of a row held as [groups, 2, 16], zeros past K."""
    return tl.rsqrt(tl.sum(tl.sum(tl.sum(x * x, axis=2), axis=1), axis=0) / K + eps)


@triton.jit
def fused_norm_kernel(
    h_ptr,  # [M, K] float32
    y_ptr,  # [M, K], read only with HAS_BRANCH
    post_weight_ptr,  # [K] float32, read only with HAS_BRANCH
    scale_ptr,  # [1] float32, read only with HAS_SCALE
    weight_ptr,  # [K] float32
    h_out_ptr,  # [M, K] float32, written only with HAS_BRANCH
    xq_ptr,  # [PLANES, M, 4, ceil(K/64), 16] int8
    xs_ptr,  # [M, K//32] float32
    xsum_ptr,  # [M, K//16] float32
    M,
    eps,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    UNITS: tl.constexpr = (K + 63) // 64
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    live = group < K // 32
    at = group[:, None, None] * 32 + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    inside = live[:, None, None]
    h = tl.load(h_ptr + row * K + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if HAS_BRANCH:
        y = tl.load(y_ptr + row * K + at, mask=inside, other=0.0).to(tl.float32)
        h += y * _rms_scale(y, K, eps) * tl.load(post_weight_ptr + at, mask=inside, other=0.0)
        if HAS_SCALE:
            h *= tl.load(scale_ptr)
        tl.store(h_out_ptr + row * K + at, h, mask=inside)
    x = h * _rms_scale(h, K, eps) * weight
    store_quantized(
        x, group, live,
        xq_ptr + row * (UNITS * 64), M * (UNITS * 64), xs_ptr + row * (K // 32), xsum_ptr + row * (K // 16),
        K, PLANES,
    )  # fmt: skip


def _check(name: str, h: Tensor, y: Tensor | None, weights: tuple[Tensor | None, ...], planes: int) -> None:
    if planes not in (1, 2):
        raise ValueError(f"{name}: planes must be 1 or 2, got {planes}")
    if h.dim() != 2 or h.shape[1] == 0 or h.shape[1] % GROUP or not h.is_contiguous():
        raise ValueError(f"{name}: the rows must be contiguous [M, K] with K a multiple of 32, got {list(h.shape)}")
    if y is not None and (y.shape != h.shape or not y.is_contiguous()):
        raise ValueError(f"{name}: y must be contiguous {list(h.shape)}, got {list(y.shape)}")
    for weight in weights:
        if weight is not None and (weight.shape != h.shape[1:] or weight.dtype != torch.float32):
            expected = f"float32 {list(h.shape[1:])}"
            raise ValueError(f"{name}: a weight must be {expected}, got {weight.dtype} {list(weight.shape)}")


def _empty_outputs(h: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    m, k = h.shape
    return (
        h.new_empty((planes, m, 4, triton.cdiv(k, UNIT), 16), dtype=torch.int8),
        h.new_empty((m, k // GROUP), dtype=torch.float32),
        h.new_empty((m, k // (GROUP // 2)), dtype=torch.float32),
    )


def launch_fused_norm(
    h: Tensor,
    y: Tensor | None,
    post_weight: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
    planes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel; on CPU tensors only where Triton interprets. Returns h' (h itself without y) and activations."""
    m, k = h.shape
    h_out = h if y is None else torch.empty_like(h, dtype=torch.float32)
    xq, xs, xsum = _empty_outputs(h, planes)
    groups = triton.next_power_of_2(triton.cdiv(k, UNIT) * 2)
    wrap_triton(fused_norm_kernel)[(m,)](
        h_ptr=h,
        y_ptr=h if y is None else y,
        post_weight_ptr=weight if post_weight is None else post_weight,
        scale_ptr=weight if scale is None else scale,
        weight_ptr=weight,
        h_out_ptr=h_out,
        xq_ptr=xq,
        xs_ptr=xs,
        xsum_ptr=xsum,
        M=m,
        eps=eps,
        K=k,
        GROUPS=groups,
        PLANES=planes,
        HAS_BRANCH=y is not None,
        HAS_SCALE=scale is not None,
        num_warps=min(_MAX_WARPS, max(1, groups // 16)),
    )
    return h_out, xq, xs, xsum


@triton_op("gemma4::rms_norm_quantize", mutates_args={})
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x: [M, K], weight: float32 [K]. Returns what `quantize_activations` returns for the normalised rows."""
    _check("rms_norm_quantize", x, None, (weight,), planes)
    if x.device.type == "cpu":
        return quantize_activations_reference(rms_norm(x, weight, eps), planes)
    return launch_fused_norm(x, None, None, None, weight, eps, planes)[1:]


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, planes)


@triton_op("gemma4::residual_norm_quantize", mutates_args={})
def residual_norm_quantize(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h: float32 [M, K]; y: [M, K]; post_weight, weight: float32 [K]; scale: float32 [1] or None.

    Returns h' float32 [M, K] and what `quantize_activations` returns for its normalised rows.
    """
    _check("residual_norm_quantize", h, y, (post_weight, weight), planes)
    if h.device.type == "cpu":
        return residual_norm_quantize_reference(h, y, post_weight, scale, weight, eps, planes)
    return launch_fused_norm(h, y, post_weight, scale, weight, eps, planes)


@residual_norm_quantize.register_fake
def _(
    h: Tensor, y: Tensor, post_weight: Tensor, scale: Tensor | None, weight: Tensor, eps: float, planes: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(h, dtype=torch.float32), *_empty_outputs(h, planes)
