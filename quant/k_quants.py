"""K-quants: blocks of 256 weights whose groups have their own small integer scales under float16 super-scales.

Nibble order of `qs`, chosen for the kernels: a unit is 64 weights in 32 bytes; byte b of unit u holds weight
64u + b in its low nibble and 64u + 32 + b in its high nibble. A chunk is half a unit: 16 bytes, 32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gemma4.kernels.dequant import q4_k_dequantize, q5_k_dequantize, q6_k_dequantize
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.quant_tensor import Plane, QuantTensor, register_format
from gemma4.quant.repack import K_SCALES, Q5_K_FIFTH_BITS, Q6_K_LOW_BITS, Q6_K_TOP_BITS

__all__ = ["CudaCoalescedInt4Tensor", "Q5KTensor", "Q6KTensor"]


@register_format(GGMLType.Q4_K)
@dataclass(frozen=True, eq=False)
class CudaCoalescedInt4Tensor(QuantTensor):
    """Q4_K: w = (d * sc) * q - (dmin * m), with sc and m of each group of 32 weights.

    qs: uint8 [N, K/2], two 4-bit q in each.
    codes: uint8 [N, K/64, 4], 6-bit (sc of low nibbles, sc of high nibbles, m of low, m of high) of a unit.
    dm: float16 [N, K/256, 2], (d, dmin).
    """

    qs: Tensor
    codes: Tensor
    dm: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=16, stop=144),
        "codes": Plane(torch.uint8, 64, start=4, stop=16, items=4, order=K_SCALES),
        "dm": Plane(torch.float16, 256, start=0, stop=4, items=2),
    }
    decode = staticmethod(q4_k_dequantize)


@register_format(GGMLType.Q5_K)
@dataclass(frozen=True, eq=False)
class Q5KTensor(QuantTensor):
    """Q5_K: w = (d * sc) * q - (dmin * m), with sc and m of each group of 32 weights.

    qs: uint8 [N, K/2], low four bits of two 5-bit q in each.
    qh: int32 [N, K/32], fifth bits of a chunk: of its byte 4r+i, bit 8i+r (low nibble) and 8i+4+r (high).
    codes: uint8 [N, K/64, 4], 6-bit (sc of low nibbles, sc of high nibbles, m of low, m of high) of a unit.
    dm: float16 [N, K/256, 2], (d, dmin).
    """

    qs: Tensor
    qh: Tensor
    codes: Tensor
    dm: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=48, stop=176),
        "qh": Plane(torch.int32, 32, start=16, stop=48, order=Q5_K_FIFTH_BITS),
        "codes": Plane(torch.uint8, 64, start=4, stop=16, items=4, order=K_SCALES),
        "dm": Plane(torch.float16, 256, start=0, stop=4, items=2),
    }
    decode = staticmethod(q5_k_dequantize)


@register_format(GGMLType.Q6_K)
@dataclass(frozen=True, eq=False)
class Q6KTensor(QuantTensor):
    """Q6_K: w = (d * sc) * (q - 32), with sc of each group of 16 weights.

    qs: uint8 [N, K/2], low four bits of two 6-bit q in each.
    qh: int32 [N, K/32, 2], top two bits of a chunk's low nibbles and of its high nibbles: of byte 4r+i, bits
        8i+2r and 8i+2r+1.
    scales: int8 [N, K/16], sc in the order of the weights.
    d: float16 [N, K/256].
    """

    qs: Tensor
    qh: Tensor
    scales: Tensor
    d: Tensor

    planes: ClassVar[Mapping[str, Plane]] = {
        "qs": Plane(torch.uint8, 2, start=0, stop=128, order=Q6_K_LOW_BITS),
        "qh": Plane(torch.int32, 32, start=128, stop=192, items=2, order=Q6_K_TOP_BITS),
        "scales": Plane(torch.int8, 16, start=192, stop=208),
        "d": Plane(torch.float16, 256, start=208, stop=210),
    }
    decode = staticmethod(q6_k_dequantize)
