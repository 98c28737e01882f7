"""GPU tensors that stand in host memory: a kernel reads them over the bus, and a CUDA graph may hold them.

Pinned host memory has one address for host and GPU (CUDA's unified virtual addressing), so a tensor that claims to be
on the GPU can stand on it. Reading a few rows of a large table this way takes no GPU memory and no word from the host.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

__all__ = ["empty_in_host_memory"]


def empty_in_host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor on the GPU `device` whose bytes are pinned host memory, held as long as the tensor.

    PyTorch rounds pinned memory up to a power of two.
    """
    with torch.cuda.device(device):
        pinned = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
        return torch.as_tensor(_OnDevice(pinned), device=device).view(dtype).view(shape)


class _OnDevice:
    """Hands a pinned tensor [bytes] to PyTorch as an array of the GPU (CUDA array interface, version 2)."""

    def __init__(self, pinned: Tensor) -> None:
        self.pinned = pinned
        self.__cuda_array_interface__ = {
            "shape": tuple(pinned.shape),
            "typestr": "|u1",
            "data": (pinned.data_ptr(), False),
            "version": 2,
        }
