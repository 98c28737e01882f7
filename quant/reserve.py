"""One piece of GPU memory for many tensors, each of which still has a storage of its own.

PyTorch cuts tensors from free memory that it holds, and only where there is none takes more from the GPU, in steps of 2
or 20 MiB. So memory for many tensors is taken and given back to PyTorch as a whole before they are allocated.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.segments import large_block_bytes

__all__ = ["reserve", "reserve_blocks", "reserve_weights"]


def reserve_blocks(sizes: Iterable[int], device: torch.device) -> None:
    """Has PyTorch hold a free block of each of these sizes, in bytes, for this stream. On a CPU does nothing.

    A tensor is cut from the smallest block that has room for it: what is small and lives long does not scatter over
    the largest where there is a smaller one.
    """
    if device.type == "cuda":
        # All at a time: two of them are not the same memory.
        _ = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]


def reserve(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Has PyTorch hold free memory for tensors like these, to be allocated next in this stream.

    tensors: on any device, also "meta". On a CPU does nothing.
    """
    if device.type == "cuda":
        reserve_blocks([large_block_bytes(tensor.nbytes for tensor in tensors)], device)


def reserve_weights(model: nn.Module, device: torch.device) -> None:
    """As `reserve`, for those weights of a model on the meta device that will stand in the memory of `device`."""
    hosted = [module for module in model.modules() if isinstance(module, PackedWeight) and module.in_host_memory]
    elsewhere = {id(plane) for module in hosted for plane in module.planes}
    reserve((weight for weight in model.parameters() if weight.is_meta and id(weight) not in elsewhere), device)
