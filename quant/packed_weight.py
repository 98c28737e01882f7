"""The module that holds one packed weight. It does not know how weights are multiplied, and imports no kernel.

The planes of a container are parameters without gradient, so that they move, save and export like any weight; ahead of
time compilation copies buffers but not parameters. The weight's format is fixed when the module is built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma4.quant.errors import ShapeError
from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.host_memory import empty_in_host_memory


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
