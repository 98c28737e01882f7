"""y = x @ W.T for packed weights: one op per format, `gemma4::<format>_linear(x, *planes) -> [..., N]`.

x: bfloat16 or float32 [..., K]; the planes of W [N, K] as in `gemma4.kernels.packed_planes`; y has x's dtype.

CPU                    rows of W are decoded exactly in bounded chunks, rounded to x's dtype and multiplied.
CUDA, bfloat16, M <= 8 x becomes int8 planes and the format's matvec kernel reads W packed.
CUDA otherwise         as on the CPU: W is decoded in bounded chunks and cuBLAS multiplies.

M is the number of rows of x. Where M is symbolic (an exported prefill), the decoding path is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from gemma4.kernels.packed_planes import PACKED_FORMATS, PackedFormat, check_planes

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

SCRATCH_BYTES = 256 << 20
"""Most bytes of decoded weights held at a time."""


@triton_op("gemma4::q4_k_linear", mutates_args={})
def q4_k_linear(x: Tensor, qs: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q4_K weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q4_k", x, (qs, codes, dm))


@triton_op("gemma4::q5_k_linear", mutates_args={})
def q5_k_linear(x: Tensor, qs: Tensor, qh: Tensor, codes: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q5_K weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q5_k", x, (qs, qh, codes, dm))


@triton_op("gemma4::q6_k_linear", mutates_args={})
def q6_k_linear(x: Tensor, qs: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q6_K weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q6_k", x, (qs, qh, scales, d))


@triton_op("gemma4::q8_0_linear", mutates_args={})
def q8_0_linear(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q8_0 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q8_0", x, (qs, d))


@triton_op("gemma4::q5_0_linear", mutates_args={})
def q5_0_linear(x: Tensor, qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q5_0 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q5_0", x, (qs, qh, d))


@triton_op("gemma4::q5_1_linear", mutates_args={})
def q5_1_linear(x: Tensor, qs: Tensor, qh: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q5_1 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q5_1", x, (qs, qh, dm))


@triton_op("gemma4::q4_0_linear", mutates_args={})
def q4_0_linear(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q4_0 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q4_0", x, (qs, d))


@triton_op("gemma4::q4_1_linear", mutates_args={})
def q4_1_linear(x: Tensor, qs: Tensor, dm: Tensor) -> Tensor:
    """x: [..., K]; planes of a Q4_1 weight [N, K]. Returns [..., N] in x's dtype."""
    return _linear("q4_1", x, (qs, dm))


def _linear(name: str, x: Tensor, planes: tuple[Tensor, ...]) -> Tensor:
    fmt = PACKED_FORMATS[name]
    n, k = check_planes(fmt, planes)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}_linear: x must be bfloat16 or float32, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{name}_linear: x must be [..., {k}], got {list(x.shape)}")
    if x.device != planes[0].device:
        raise ValueError(f"{name}_linear: x is on {x.device}, the weight on {planes[0].device}")
    return _decoded_linear(fmt, x.reshape(-1, k), planes).reshape(*x.shape[:-1], n)


def _decoded_linear(fmt: PackedFormat, x: Tensor, planes: tuple[Tensor, ...]) -> Tensor:
    """x: [M, K]. Returns [M, N], decoding at most SCRATCH_BYTES of weights (float32) at a time."""
    n, k = planes[0].shape[0], x.shape[1]
    step = max(1, SCRATCH_BYTES // (4 * k))
    parts = [
        x @ fmt.dequantize(*(plane[start : start + step] for plane in planes)).to(x.dtype).T
        for start in range(0, n, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _linear_fake(x: Tensor, qs: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], qs.shape[0])


for _op in (
    q4_k_linear,
    q5_k_linear,
    q6_k_linear,
    q8_0_linear,
    q5_0_linear,
    q5_1_linear,
    q4_0_linear,
    q4_1_linear,
):
    _op.register_fake(_linear_fake)
