"""Packed weights from random GGUF blocks with their exact decode, and activations, for the tests of packed kernels."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from torch import Tensor

from gemma4.kernels.packed_planes import PACKED_FORMATS
from gemma4.quant.formats import container_for
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType

NAMES = list(PACKED_FORMATS)
# Byte offsets of the float16 numbers in a block.
_HALVES = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2)}


@dataclass(frozen=True)
class Weight:
    """Planes of a packed weight [N, K] and the float64 [N, K] that gguf-py decodes from the same blocks."""

    planes: tuple[Tensor, ...]
    exact: Tensor

    def rows(self, start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(plane[start:stop].contiguous() for plane in self.planes)


def make_weight(name: str, n: int, k: int, device: str = "cpu", seed: int = 0) -> Weight:
    """Every bit of the blocks is random but the scales, which are small and of both signs."""
    rng = np.random.default_rng(seed)
    ggml_type = GGMLType[name.upper()]
    fmt = BLOCK_FORMATS[ggml_type]
    blocks = rng.integers(0, 256, (n * k // fmt.block_size, fmt.type_size), dtype=np.uint8)
    for at in _HALVES.get(name, (0,)):
        scales = rng.normal(0, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    exact = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(ggml_type))).reshape(n, k)
    packed = container_for(ggml_type).from_blocks(torch.from_numpy(blocks.reshape(n, -1)), k)
    planes = tuple(_with_garbage_behind(packed.planes_dict()[name].to(device)) for name in packed.planes)
    return Weight(planes, torch.from_numpy(exact).double().to(device))


def make_rows(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """[M, K] with a few large activations, as a model has them."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k))
    x[:, 5::97] *= 30
    return _with_garbage_behind(x.to(dtype).to(device))


def assert_product(y: Tensor, x: Tensor, weight: Tensor, tolerance: float) -> None:
    """y is x @ weight.T but for `tolerance` times what the products sum to without their signs."""
    x = x.double()
    bound = tolerance * (x.abs() @ weight.abs().T)
    error = (y.double() - x @ weight.T).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max()} times the tolerance"


def meta(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to("meta") for tensor in tensors)


def _with_garbage_behind(tensor: Tensor) -> Tensor:
    """The same values in a longer allocation whose end is all ones: NaN, or the largest unsigned integer."""
    count = tensor.numel() * tensor.element_size()
    storage = torch.full((count + 4096,), 255, dtype=torch.uint8, device=tensor.device)
    inside = storage[:count].view(tensor.dtype).view(tensor.shape)
    inside.copy_(tensor)
    return inside
