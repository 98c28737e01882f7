"""Legacy quants: blocks of 32 weights under one float16 scale, some with a float16 offset.

Nibble order of `qs`, as in the file: a chunk is 32 weights in 16 bytes; byte b of chunk c holds weight 32c + b
in its low nibble and 32c + 16 + b in its high nibble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gemma4.kernels.dequant import (
    q4_0_dequantize,
    q4_1_dequantize,
    q5_0_dequantize,
    q5_1_dequantize,
    q8_0_dequantize,
)
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.quant_tensor import Plane, QuantTensor, register_format
from gemma4.quant.repack import LEGACY_FIFTH_BITS

__all__ = ["Q4_0Tensor", "Q4_1Tensor", "Q5_0Tensor", "Q5_1Tensor", "Q8_0Tensor"]


@register_format(GGMLType.Q8_0)
@dataclass(frozen=True, eq=False)
class Q8_0Tensor(QuantTensor):
    """Q8_0: w = q * d.

    qs: int8 [N, K], q in the order of the weights.
    d: float16 [N, K/32].
    """

    qs: Tensor
    d: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.int8, 1, start=2, stop=34),
        "d": Plane(torch.float16, 32, start=0, stop=2),
    }
    decode = staticmethod(q8_0_dequantize)


@register_format(GGMLType.Q5_0)
@dataclass(frozen=True, eq=False)
class Q5_0Tensor(QuantTensor):
    """Q5_0: w = d * (q - 16).

    qs: uint8 [N, K/2], low four bits of two 5-bit q in each.
    qh: int32 [N, K/32], fifth bits of a chunk: of its byte 4r+i, bit 8i+r (low nibble) and 8i+4+r (high).
    d: float16 [N, K/32].
    """

    qs: Tensor
    qh: Tensor
    d: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=6, stop=22),
        "qh": Plane(torch.int32, 32, start=2, stop=6, order=LEGACY_FIFTH_BITS),
        "d": Plane(torch.float16, 32, start=0, stop=2),
    }
    decode = staticmethod(q5_0_dequantize)


@register_format(GGMLType.Q5_1)
@dataclass(frozen=True, eq=False)
class Q5_1Tensor(QuantTensor):
    """Q5_1: w = d * q + m.

    qs: uint8 [N, K/2], low four bits of two 5-bit q in each.
    qh: int32 [N, K/32], fifth bits of a chunk: of its byte 4r+i, bit 8i+r (low nibble) and 8i+4+r (high).
    dm: float16 [N, K/32, 2], (d, m).
    """

    qs: Tensor
    qh: Tensor
    dm: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=8, stop=24),
        "qh": Plane(torch.int32, 32, start=4, stop=8, order=LEGACY_FIFTH_BITS),
        "dm": Plane(torch.float16, 32, start=0, stop=4, items=2),
    }
    decode = staticmethod(q5_1_dequantize)


@register_format(GGMLType.Q4_0)
@dataclass(frozen=True, eq=False)
class Q4_0Tensor(QuantTensor):
    """Q4_0: w = d * (q - 8).

    qs: uint8 [N, K/2], two 4-bit q in each.
    d: float16 [N, K/32].
    """

    qs: Tensor
    d: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=2, stop=18),
        "d": Plane(torch.float16, 32, start=0, stop=2),
    }
    decode = staticmethod(q4_0_dequantize)


@register_format(GGMLType.Q4_1)
@dataclass(frozen=True, eq=False)
class Q4_1Tensor(QuantTensor):
    """Q4_1: w = d * q + m.

    qs: uint8 [N, K/2], two 4-bit q in each.
    dm: float16 [N, K/32, 2], (d, m).
    """

    qs: Tensor
    dm: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=4, stop=20),
        "dm": Plane(torch.float16, 32, start=0, stop=4, items=2),
    }
    decode = staticmethod(q4_1_dequantize)
