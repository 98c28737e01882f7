"""y = x @ W.T for packed weights: one op per format, `gemma4::<format>_linear(x, *planes) -> [..., N]`.

x: bfloat16 or float32 [..., K]; the planes of W [N, K] as in `gemma4.kernels.packed_planes`; y has x's dtype.

CPU                    rows of W are decoded exactly in bounded chunks, rounded to x's dtype and multiplied.
CUDA, bfloat16, M <= 8 x becomes int8 planes and the format's matvec kernel reads W packed.
CUDA otherwise         as on the CPU: W is decoded in bounded chunks and cuBLAS multiplies.

M is the number of rows of x. Where M is symbolic (an exported prefill), the decoding path is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op

from gemma4.kernels.activations import launch_quantize_activations
from gemma4.kernels.dequantize_planes import dequantize_planes
from gemma4.kernels.packed_matvec import MAX_ROWS, launch_packed_matvec
from gemma4.kernels.packed_planes import PACKED_FORMATS, check_planes
from gemma4.kernels.pieces import COMPILED_PIECES, SCRATCH_BYTES, piece_rows
from gemma4.kernels.q4_0_matvec import q4_0_matvec_kernel
from gemma4.kernels.q4_1_matvec import q4_1_matvec_kernel
from gemma4.kernels.q4_k_matvec import q4_k_matvec_kernel
from gemma4.kernels.q5_0_matvec import q5_0_matvec_kernel
from gemma4.kernels.q5_1_matvec import q5_1_matvec_kernel
from gemma4.kernels.q5_k_matvec import q5_k_matvec_kernel
from gemma4.kernels.q6_k_matvec import q6_k_matvec_kernel
from gemma4.kernels.q8_0_matvec import q8_0_matvec_kernel

__all__ = [
    "q4_0_linear",
    "q4_1_linear",
    "q4_k_linear",
    "q5_0_linear",
    "q5_1_linear",
    "q5_k_linear",
    "q6_k_linear",
    "q8_0_linear",
]


@triton_op("gemma4::q4_k_linear", mutates_args={})
def q4_k_linear(x: Tensor, qs: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q4_K weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q4_k", q4_k_matvec_kernel, x, (qs, codes, dm))


@triton_op("gemma4::q5_k_linear", mutates_args={})
def q5_k_linear(x: Tensor, qs: Tensor, qh: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q5_K weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q5_k", q5_k_matvec_kernel, x, (qs, qh, codes, dm))


@triton_op("gemma4::q6_k_linear", mutates_args={})
def q6_k_linear(x: Tensor, qs: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q6_K weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q6_k", q6_k_matvec_kernel, x, (qs, qh, scales, d))


@triton_op("gemma4::q8_0_linear", mutates_args={})
def q8_0_linear(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q8_0 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q8_0", q8_0_matvec_kernel, x, (qs, d))


@triton_op("gemma4::q5_0_linear", mutates_args={})
def q5_0_linear(x: Tensor, qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q5_0 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q5_0", q5_0_matvec_kernel, x, (qs, qh, d))


@triton_op("gemma4::q5_1_linear", mutates_args={})
def q5_1_linear(x: Tensor, qs: Tensor, qh: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q5_1 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q5_1", q5_1_matvec_kernel, x, (qs, qh, dm))


@triton_op("gemma4::q4_0_linear", mutates_args={})
def q4_0_linear(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q4_0 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q4_0", q4_0_matvec_kernel, x, (qs, d))


@triton_op("gemma4::q4_1_linear", mutates_args={})
def q4_1_linear(x: Tensor, qs: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q4_1 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q4_1", q4_1_matvec_kernel, x, (qs, dm))


def _linear(name: str, kernel: Any, x: Tensor, planes: tuple[Tensor, ...]) -> Tensor:
    n, k = _check(name, x, planes)
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and statically_known_true(m <= MAX_ROWS) and m > 0:
        y = launch_packed_matvec(kernel, name, launch_quantize_activations(rows, 2), planes, x.dtype)
    else:
        y = _decoded_linear(name, rows, planes)
    return y.reshape(*x.shape[:-1], n)


def _check(name: str, x: Tensor, planes: tuple[Tensor, ...]) -> tuple[int, int]:
    """Return (N, K) of the weight."""
    n, k = check_planes(PACKED_FORMATS[name], planes)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}_linear: x must be bfloat16 or float32, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{name}_linear: x must be [..., {k}], got {list(x.shape)}")
    if x.device != planes[0].device:
        raise ValueError(f"{name}_linear: x is on {x.device}, the weight on {planes[0].device}")
    return n, k


def _decoded_linear(name: str, x: Tensor, planes: tuple[Tensor, ...]) -> Tensor:
    """x: [M, K]. Returns [M, N], holding a bounded slice of decoded weights at a time."""
    n, k = planes[0].shape[0], x.shape[1]
    step = piece_rows(n, k * x.element_size(), SCRATCH_BYTES.get(x.device.type, SCRATCH_BYTES["cuda"]))
    if step == n:
        return dense_linear(x, dequantize_planes(name, planes, x.dtype))
    if torch.compiler.is_compiling():
        return compiled_linear(name, x, planes, step)
    parts = zip(*(plane.split(step) for plane in planes), strict=True)
    y = x.new_empty((x.shape[0], n))
    for part, columns in zip(parts, y.split(step, dim=1), strict=True):
        dense_linear(x, dequantize_planes(name, part, x.dtype), out=columns)
    return y


def compiled_linear(name: str, x: Tensor, planes: Sequence[Tensor], step: int) -> Tensor:
    """The same products of `step` rows each, for a compiler: kernels cost it time, so more rows are decoded at a time.

    It lets products write their part of the whole by itself.
    """
    parts = zip(*(plane.split(COMPILED_PIECES * step) for plane in planes), strict=True)
    decoded = (dequantize_planes(name, part, x.dtype) for part in parts)
    return torch.cat([dense_linear(x, piece) for part in decoded for piece in part.split(step)], dim=1)


def dense_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T, in `out` where it is given.

    Up to MAX_ROWS rows are multiplied one by one, so that each gets the bits it has alone, as in the packed matvecs: a
    BLAS sums in another order where there are others.
    """
    rows = x.shape[0] if x.dim() == 2 else 0
    if isinstance(rows, int) and 1 < rows <= MAX_ROWS:
        return torch.cat([row @ weight.T for row in x.split(1)], out=out)
    return torch.matmul(x, weight.T, out=out)


def _fake(name: str) -> Callable[..., Tensor]:
    def linear(x: Tensor, *planes: Tensor) -> Tensor:
        n, _ = _check(name, x, planes)
        return x.new_empty(*x.shape[:-1], n)

    return linear


for _name, _op in {
    "q4_k": q4_k_linear,
    "q5_k": q5_k_linear,
    "q6_k": q6_k_linear,
    "q8_0": q8_0_linear,
    "q5_0": q5_0_linear,
    "q5_1": q5_1_linear,
    "q4_0": q4_0_linear,
    "q4_1": q4_1_linear,
}.items():
    _op.register_fake(_fake(_name))
