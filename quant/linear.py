"""Modules that multiply with a packed weight or look rows of it up: a linear layer and an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gemma4.kernels import linear as ops
from gemma4.kernels.dequantize_planes import packed_embedding
from gemma4.kernels.gated_linear import gated_linear as _gated_linear
from gemma4.kernels.gelu_mul import gelu_mul
from gemma4.kernels.packed_matvec import MAX_ROWS
from gemma4.kernels.q4_0_matvec import q4_0_matvec
from gemma4.kernels.q4_1_matvec import q4_1_matvec
from gemma4.kernels.q4_k_matvec import q4_k_matvec
from gemma4.kernels.q5_0_matvec import q5_0_matvec
from gemma4.kernels.q5_1_matvec import q5_1_matvec
from gemma4.kernels.q5_k_matvec import q5_k_matvec
from gemma4.kernels.q6_k_matvec import q6_k_matvec
from gemma4.kernels.q8_0_matvec import q8_0_matvec
from gemma4.quant.formats import QuantTensor
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.packed_weight import PackedWeight

Rows: TypeAlias = tuple[Tensor, ...]
"""Rows [M, K] of activations: (x,), or what `gemma4.kernels.activations.quantize_activations` returns for x."""

# y = x @ W.T straight from the planes of W, in the container's order.
LINEAR_OPS: Final[Mapping[GGMLType, Callable[..., Tensor]]] = {
    GGMLType.Q4_K: ops.q4_k_linear,
    GGMLType.Q5_K: ops.q5_k_linear,
    GGMLType.Q6_K: ops.q6_k_linear,
    GGMLType.Q8_0: ops.q8_0_linear,
    GGMLType.Q5_0: ops.q5_0_linear,
    GGMLType.Q5_1: ops.q5_1_linear,
    GGMLType.Q4_0: ops.q4_0_linear,
    GGMLType.Q4_1: ops.q4_1_linear,
}
# The same for at most MAX_ROWS quantized rows of x.
MATVEC_OPS: Final[Mapping[GGMLType, Callable[..., Tensor]]] = {
    GGMLType.Q4_K: q4_k_matvec,
    GGMLType.Q5_K: q5_k_matvec,
    GGMLType.Q6_K: q6_k_matvec,
    GGMLType.Q8_0: q8_0_matvec,
    GGMLType.Q5_0: q5_0_matvec,
    GGMLType.Q5_1: q5_1_matvec,
    GGMLType.Q4_0: q4_0_matvec,
    GGMLType.Q4_1: q4_1_matvec,
}
# Decoded weights in flight at once; bounds what a product of a vocabulary-sized matrix materializes.
_CHUNK_BYTES = 64 << 20


class Linear(nn.Module):
    """y = x @ W.T for a packed W [N, K]: x [M, K], y [M, N].

    out_dtype: of y where a kernel sums in float32 and may keep it; elsewhere y has the dtype of x.
    num_scales: of numbers float32 that multiply y, of which row groups of W may have one each; 0 for none.
    """

    def __init__(self, weight: PackedWeight, out_dtype: torch.dtype, num_scales: int = 0) -> None:
        super().__init__()
        self.weight = weight
        self.out_dtype = out_dtype
        scale = torch.empty(num_scales, dtype=torch.float32, device="meta") if num_scales else None
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Rows) -> Tensor:
        if len(x) > 1:
            y: Tensor = MATVEC_OPS[self.weight.ggml_type](*x, *self.weight.planes, out_dtype=self.out_dtype)
        else:
            y = packed_linear(x[0], self.weight)
        return y if self.scale is None else (y.float() * self.scale).to(y.dtype)


def gated_linear(x: Tensor, gate_up: Linear) -> Tensor:
    """gelu_tanh(gate) * up [M, N] for x [M, K] and gate | up as one matrix [2N, K]."""
    kind = gate_up.weight.ggml_type
    if kind not in LINEAR_OPS or gate_up.scale is not None or statically_known_true(x.shape[0] <= MAX_ROWS):
        gate, up = gate_up((x,)).chunk(2, dim=-1)
        y: Tensor = gelu_mul(gate, up)
    else:
        y = _gated_linear(x, gate_up.weight.planes, kind.name.lower())
    return y


def packed_linear(x: Tensor, weight: PackedWeight, rows: slice | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T in x's dtype; rows: of weight, None for all."""
    planes = weight.planes if rows is None else tuple(plane[rows] for plane in weight.planes)
    if weight.ggml_type in LINEAR_OPS:
        return LINEAR_OPS[weight.ggml_type](x, *planes)
    return decoded_linear(x, weight.wrap(planes))


def decoded_linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] @ weight [N, K].T in x's dtype, decoding a bounded number of rows at a time."""
    n, k = weight.shape
    stored = next(iter(weight.planes_dict().values()))
    if stored.dtype == x.dtype:
        return ops.dense_linear(x, stored)
    rows = max(1, _CHUNK_BYTES // (4 * k))
    parts = (weight.slice_rows(i, min(i + rows, n)).dequantize().to(x.dtype) for i in range(0, n, rows))
    chunks = [ops.dense_linear(x, part) for part in parts]
    return torch.cat(chunks, dim=-1) if len(chunks) > 1 else chunks[0]


class Embedding(nn.Module):
    """Rows of a packed table [N, K] by id; only the chosen rows are decoded."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> float32 [T, K]."""
        weight = self.weight
        if weight.ggml_type in LINEAR_OPS and ids.is_cuda:
            rows: Tensor = packed_embedding(ids, weight.planes, weight.ggml_type.name.lower())
            return rows
        return weight.tensor.dequantize(ids)
