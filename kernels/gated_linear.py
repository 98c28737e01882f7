"""gelu_tanh(x @ gate.T) * (x @ up.T) for gate and up as one packed matrix, for more rows than a matvec kernel takes.

The two products are the widest tensors of a pass, so columns are taken a piece at a time: decode the piece's rows of
gate and multiply, the same for up, and write their gated product into its columns of the result. Beside that there are
two pieces of products and one of decoded weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from gemma4.kernels.activations import GROUP
from gemma4.kernels.dequantize_planes import dequantize_planes
from gemma4.kernels.gelu_mul import gelu_mul_reference, launch_gelu_mul
from gemma4.kernels.linear import compiled_linear, dense_linear
from gemma4.kernels.packed_planes import PACKED_FORMATS, check_planes
from gemma4.kernels.pieces import SCRATCH_BYTES, piece_rows


@triton_op("gemma4::gated_linear", mutates_args={})
def gated_linear(x: Tensor, planes: Sequence[Tensor], format_name: str) -> Tensor:
    """x: bfloat16 or float32 [M, K]; planes of gate | up [2N, K] in a format of `PACKED_FORMATS`. Returns [M, N]."""
    n, k = _check(x, planes, format_name)
    scratch_bytes = SCRATCH_BYTES.get(x.device.type, SCRATCH_BYTES["cuda"])
    step = piece_rows(n, 2 * k * x.element_size(), scratch_bytes)  # as if gate's and up's rows were there at once
    pieces = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    gate, up = zip(*(plane.split(n) for plane in planes), strict=True)

    def product(weight: Sequence[Tensor], rows: slice) -> Tensor:
        return dense_linear(x, dequantize_planes(format_name, tuple(plane[rows] for plane in weight), x.dtype))

    if torch.compiler.is_compiling():
        return _gated(*(compiled_linear(format_name, x, weight, step) for weight in (gate, up)))
    y = x.new_empty((x.shape[0], n))
    for rows in pieces:
        _gated(product(gate, rows), product(up, rows), y[:, rows])
    return y


def _gated(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu_tanh(gate) * up, in `out` where it is given."""
    if gate.device.type == "cpu":
        y = gelu_mul_reference(gate, up)
        return y if out is None else out.copy_(y)
    out = gate.new_empty(gate.shape) if out is None else out
    launch_gelu_mul(gate, up, (out,))
    return out


@gated_linear.register_fake
def _(x: Tensor, planes: Sequence[Tensor], format_name: str) -> Tensor:
    n, _ = _check(x, planes, format_name)
    return x.new_empty((x.shape[0], n))


def _check(x: Tensor, planes: Sequence[Tensor], format_name: str) -> tuple[int, int]:
    """Return (N, K) of the gate."""
    n, k = check_planes(PACKED_FORMATS[format_name], tuple(planes))
    if x.dim() != 2 or x.shape[1] != k or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"gated_linear: x must be bfloat16 or float32 [M, {k}], got {x.dtype} {list(x.shape)}")
    if n % 2 or (n % (2 * GROUP) and x.device.type != "cpu"):
        raise ValueError(f"gated_linear: gate and up must be as many rows, a multiple of {GROUP}, got {n} in all")
    if x.device != planes[0].device:
        raise ValueError(f"gated_linear: x is on {x.device}, the weight on {planes[0].device}")
    return n // 2, k
