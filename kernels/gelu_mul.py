"""gelu_tanh(gate) * up as dense rows, or as int8 activations for the packed matvec of the down projection.

gelu_tanh(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)), the tanh approximation of GELU (arXiv 1606.08415),
in float32. gate and up are rows [M, K], strided where they are halves of one fused product.
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
from gemma4.kernels.packed_matvec import MAX_ROWS

__all__ = ["gelu_mul", "gelu_mul_quantize", "gelu_mul_reference"]

BLOCK_GROUPS = 16
"""Groups handled by one program."""


def gelu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up in the dtype of gate.

    Few rows are taken one by one: where threads divide a tensor, the last elements of a share get other last bits.
    """
    rows = gate.shape[0]
    if isinstance(rows, int) and 1 < rows <= MAX_ROWS:
        return torch.cat([gelu_mul_reference(*pair) for pair in zip(gate.split(1), up.split(1), strict=True)])
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


@triton.jit
def gelu_mul_kernel(
    gate_ptr,  # [M, K], row stride stride_m
    up_ptr,  # [M, K], row stride stride_m
    x_ptr,  # [M, K], row stride stride_x, or with PLANES the int8 planes of activations
    xs_ptr,  # [M, K//32] float32, written only with PLANES
    xsum_ptr,  # [M, K//16] float32, written only with PLANES
    M,
    stride_m,
    stride_x,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = group < K // 32
    at = group[:, None, None] * 32 + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    inside = live[:, None, None]
    gate = tl.load(gate_ptr + row * stride_m + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_m + at, mask=inside, other=0.0).to(tl.float32)
    x = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    if PLANES == 0:
        tl.store(x_ptr + row * stride_x + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    else:
        store_quantized(x, group, live, row, M, x_ptr, xs_ptr, xsum_ptr, K, PLANES)


def _check(name: str, gate: Tensor, up: Tensor, *, is_grouped: bool) -> None:
    if gate.dim() != 2 or gate.shape[1] == 0 or (gate.shape[1] % GROUP and (is_grouped or gate.device.type != "cpu")):
        raise ValueError(f"{name}: gate must be [M, K] with K a multiple of 32, got {list(gate.shape)}")
    is_strided_alike = gate.stride(1) == up.stride(1) == 1 and (up.stride(0) == gate.stride(0) or gate.shape[0] == 1)
    if up.shape != gate.shape or not is_strided_alike or up.dtype != gate.dtype:
        found = f"{list(up.shape)}, strides {up.stride()} and {gate.stride()}"
        raise ValueError(f"{name}: gate and up must agree in dtype, shape and row stride, got {found}")


def launch_gelu_mul(gate: Tensor, up: Tensor, out: tuple[Tensor, ...]) -> None:
    """Run the kernel; on CPU tensors only where Triton interprets. Fills `out`: dense rows, which may be strided,
    or activations.
    """
    m, k = gate.shape
    wrap_triton(gelu_mul_kernel)[(triton.cdiv(k, UNIT * BLOCK_GROUPS // 2), m)](
        gate_ptr=gate,
        up_ptr=up,
        x_ptr=out[0],
        xs_ptr=out[1] if len(out) > 1 else out[0],
        xsum_ptr=out[2] if len(out) > 1 else out[0],
        M=m,
        stride_m=gate.stride(0),
        stride_x=out[0].stride(0),
        K=k,
        PLANES=out[0].shape[0] if len(out) > 1 else 0,
        BLOCK=BLOCK_GROUPS,
        num_warps=4,
        **dependent_launch_options(gate.device),
    )


@triton_op("gemma4::gelu_mul", mutates_args={})
def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: [M, K] with one row stride. Returns gelu(gate) * up, [M, K] in their dtype."""
    _check("gelu_mul", gate, up, is_grouped=False)
    if gate.device.type == "cpu":
        return gelu_mul_reference(gate, up)
    out = gate.new_empty(gate.shape)
    launch_gelu_mul(gate, up, (out,))
    return out


@gelu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@triton_op("gemma4::gelu_mul_quantize", mutates_args={})
def gelu_mul_quantize(gate: Tensor, up: Tensor, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up: [M, K] with one row stride. Returns what `quantize_activations` returns for gelu(gate) * up."""
    _check("gelu_mul_quantize", gate, up, is_grouped=True)
    if planes not in (1, 2):
        raise ValueError(f"gelu_mul_quantize: planes must be 1 or 2, got {planes}")
    if gate.device.type == "cpu":
        return quantize_activations_reference(gelu_mul_reference(gate.float(), up.float()), planes)
    out = empty_activations(gate, planes)
    launch_gelu_mul(gate, up, out)
    return out


@gelu_mul_quantize.register_fake
def _(gate: Tensor, up: Tensor, planes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return empty_activations(gate, planes)
