"""Unquantized weights, held like the packed ones: one plane `weight` [N, K] in the type of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gemma4.kernels.dequant import dense_dequantize
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.quant_tensor import Plane, QuantTensor, register_format

__all__ = ["BF16Tensor", "F16Tensor", "F32Tensor"]


@register_format(GGMLType.F32)
@dataclass(frozen=True, eq=False)
class F32Tensor(QuantTensor):
    """weight: float32 [N, K]."""

    weight: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {"weight": Plane(torch.float32, 1, start=0, stop=4)}
    decode = staticmethod(dense_dequantize)


@register_format(GGMLType.F16)
@dataclass(frozen=True, eq=False)
class F16Tensor(QuantTensor):
    """weight: float16 [N, K]."""

    weight: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {"weight": Plane(torch.float16, 1, start=0, stop=2)}
    decode = staticmethod(dense_dequantize)


@register_format(GGMLType.BF16)
@dataclass(frozen=True, eq=False)
class BF16Tensor(QuantTensor):
    """weight: bfloat16 [N, K]."""

    weight: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {"weight": Plane(torch.bfloat16, 1, start=0, stop=2)}
    decode = staticmethod(dense_dequantize)
