"""Modules that hold one packed weight: a linear layer and an embedding.

The planes of a container are parameters without gradient, so that they move, save and export like any weight; ahead of
time compilation copies buffers but not parameters. The weight's format is fixed when the module is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from gemma4.kernels import linear as ops
from gemma4.kernels.q4_0_matvec import q4_0_matvec
from gemma4.kernels.q4_1_matvec import q4_1_matvec
from gemma4.kernels.q4_k_matvec import q4_k_matvec
from gemma4.kernels.q5_0_matvec import q5_0_matvec
from gemma4.kernels.q5_1_matvec import q5_1_matvec
from gemma4.kernels.q5_k_matvec import q5_k_matvec
from gemma4.kernels.q6_k_matvec import q6_k_matvec
from gemma4.kernels.q8_0_matvec import q8_0_matvec
from gemma4.quant.errors import ShapeError
from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.host_memory import empty_in_host_memory

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


class PackedWeight(nn.Module):
    """The planes of one container [N, K] as parameters; on the meta device until `allocate`.

    in_host_memory: planes for a GPU are allocated in host memory, where the GPU reads them over the bus.
    """

    def __init__(self, ggml_type: GGMLType, shape: tuple[int, int], *, in_host_memory: bool = False) -> None:
        super().__init__()
        self.ggml_type = ggml_type
        self.shape = shape
        self.in_host_memory = in_host_memory
        self._container: type[QuantTensor] = container_for(ggml_type)
        self.allocate("meta")

    def allocate(self, device: torch.device | str) -> None:
        """Gives the planes uninitialised storage for `device`."""
        device = torch.device(device)
        if not self.in_host_memory or device.type != "cuda":
            self.assign(self._container.empty(*self.shape, device))
            return
        shapes = self._container.empty(*self.shape, "meta").planes_dict()
        planes = {name: empty_in_host_memory(tuple(p.shape), p.dtype, device) for name, p in shapes.items()}
        self.assign(self._container.from_planes(planes))

    def assign(self, tensor: QuantTensor) -> None:
        """Takes over the planes of a container of this type and shape. Raises ShapeError."""
        if type(tensor) is not self._container or tensor.shape != self.shape:
            found = f"{tensor.ggml_type.name} {list(tensor.shape)}"
            raise ShapeError(f"found {found}, expected {self.ggml_type.name} {list(self.shape)}")
        for name, plane in tensor.planes_dict().items():
            self.register_parameter(name, nn.Parameter(plane, requires_grad=False))

    def take(self, tensor: QuantTensor, device: torch.device) -> None:
        """As `assign`, after moving the planes to where a weight for `device` belongs. Raises ShapeError."""
        if self.in_host_memory and device.type == "cuda":
            self.assign(tensor)
            self.allocate(device)
            for plane, source in zip(self.planes, tensor.planes_dict().values(), strict=True):
                plane.copy_(source)
        else:
            self.assign(tensor.to(device))

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """The planes in the container's order."""
        return tuple(self._parameters[name] for name in self._container.planes)  # type: ignore[misc]

    @property
    def tensor(self) -> QuantTensor:
        """The weight as a container that shares this module's storage."""
        return self.wrap(self.planes)

    def wrap(self, planes: tuple[Tensor, ...]) -> QuantTensor:
        """Planes of some of the rows as a container."""
        return self._container.from_planes(dict(zip(self._container.planes, planes, strict=True)))

    def extra_repr(self) -> str:
        return f"{self.ggml_type.name} {list(self.shape)}"


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
        return self.weight.tensor.dequantize(ids)
