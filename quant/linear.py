"""Modules that hold one packed weight: a linear layer and an embedding.

The planes of a container are parameters without gradient, so that they move, save and export like any weight; ahead of
time compilation copies buffers but not parameters. The weight's format is fixed when the module is built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType

# Decoded weights in flight at once; bounds what a product of a vocabulary-sized matrix materializes.
_CHUNK_BYTES = 64 << 20


class PackedWeight(nn.Module):
    """The planes of one container [N, K] as parameters; on the meta device until `allocate`."""

    def __init__(self, ggml_type: GGMLType, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.ggml_type = ggml_type
        self.shape = shape
        self._container: type[QuantTensor] = container_for(ggml_type)
        self.allocate("meta")

    def allocate(self, device: torch.device | str) -> None:
        """Gives the planes uninitialised storage on `device`."""
        n, k = self.shape
        for name, plane in self._container.empty(n, k, device).planes_dict().items():
            self.register_parameter(name, nn.Parameter(plane, requires_grad=False))

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """The planes in the container's order."""
        return tuple(self._parameters[name] for name in self._container.planes)  # type: ignore[misc]

    @property
    def tensor(self) -> QuantTensor:
        """The weight as a container that shares this module's storage."""
        return self._container.from_planes(dict(zip(self._container.planes, self.planes, strict=True)))

    def extra_repr(self) -> str:
        return f"{self.ggml_type.name} {list(self.shape)}"


class Linear(nn.Module):
    """y = x @ W.T for a packed W [N, K]; x [..., K] and y [..., N] in x's dtype."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.ggml_type in LINEAR_OPS:
            return LINEAR_OPS[weight.ggml_type](x, *weight.planes)
        return decoded_linear(x, weight.tensor)


def decoded_linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] @ weight [N, K].T in x's dtype, decoding a bounded number of rows at a time."""
    n, k = weight.shape
    rows = max(1, _CHUNK_BYTES // (4 * k))
    if weight.ggml_type in _DENSE and getattr(weight, "weight").dtype == x.dtype:
        return F.linear(x, getattr(weight, "weight"))
    chunks = [F.linear(x, weight.slice_rows(i, min(i + rows, n)).dequantize().to(x.dtype)) for i in range(0, n, rows)]
    return torch.cat(chunks, dim=-1) if len(chunks) > 1 else chunks[0]


class Embedding(nn.Module):
    """Rows of a packed table [N, K] by id; only the chosen rows are decoded."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] int64 -> float32 [T, K]."""
        return self.weight.tensor.dequantize(ids)
