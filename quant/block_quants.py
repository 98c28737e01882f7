"""Types without a kernel of their own: one plane holds the blocks of the file, decoded whenever rows are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4.kernels.dequant_blocks import (
    mxfp4_dequantize,
    nvfp4_dequantize,
    q1_0_dequantize,
    q2_k_dequantize,
    q3_k_dequantize,
    q8_k_dequantize,
    tq1_0_dequantize,
    tq2_0_dequantize,
)
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType
from gemma4.quant.quant_tensor import Plane, QuantTensor, register_format

__all__ = [
    "BlockTensor",
    "MXFP4Tensor",
    "NVFP4Tensor",
    "Q1_0Tensor",
    "Q2KTensor",
    "Q3KTensor",
    "Q8KTensor",
    "TQ1_0Tensor",
    "TQ2_0Tensor",
    "block_planes",
]


@dataclass(frozen=True, eq=False)
class BlockTensor(QuantTensor):
    """blocks: uint8 [N, row_bytes], the bytes of the file."""

    blocks: Tensor


def block_planes(ggml_type: GGMLType) -> Mapping[str, Plane]:
    """The one plane of a `BlockTensor` of this type."""
    size = BLOCK_FORMATS[ggml_type].type_size
    return {"blocks": Plane(torch.uint8, BLOCK_FORMATS[ggml_type].block_size, start=0, stop=size, columns=size)}


@register_format(GGMLType.Q2_K)
class Q2KTensor(BlockTensor):
    """Q2_K: w = (d * sc) * q - (dmin * m), with 2-bit q; sc and m of each group of 16 weights."""

    planes = block_planes(GGMLType.Q2_K)
    decode = staticmethod(q2_k_dequantize)


@register_format(GGMLType.Q3_K)
class Q3KTensor(BlockTensor):
    """Q3_K: w = (d * sc) * q, with 3-bit q; sc of each group of 16 weights."""

    planes = block_planes(GGMLType.Q3_K)
    decode = staticmethod(q3_k_dequantize)


@register_format(GGMLType.Q8_K)
class Q8KTensor(BlockTensor):
    """Q8_K: w = d * q, with 8-bit q; a float32 d of each 256 weights."""

    planes = block_planes(GGMLType.Q8_K)
    decode = staticmethod(q8_k_dequantize)


@register_format(GGMLType.Q1_0)
class Q1_0Tensor(BlockTensor):
    """Q1_0: w = d or -d; d of each 128 weights."""

    planes = block_planes(GGMLType.Q1_0)
    decode = staticmethod(q1_0_dequantize)


@register_format(GGMLType.MXFP4)
class MXFP4Tensor(BlockTensor):
    """MXFP4: w = d * q, with q an E2M1 number; d, a power of two, of each 32 weights."""

    planes = block_planes(GGMLType.MXFP4)
    decode = staticmethod(mxfp4_dequantize)


@register_format(GGMLType.NVFP4)
class NVFP4Tensor(BlockTensor):
    """NVFP4: w = d * q, with q an E2M1 number; d, an E4M3 number, of each 16 weights."""

    planes = block_planes(GGMLType.NVFP4)
    decode = staticmethod(nvfp4_dequantize)


@register_format(GGMLType.TQ1_0)
class TQ1_0Tensor(BlockTensor):
    """TQ1_0: w = d * q, with q of -1, 0 and 1, five in a byte."""

    planes = block_planes(GGMLType.TQ1_0)
    decode = staticmethod(tq1_0_dequantize)


@register_format(GGMLType.TQ2_0)
class TQ2_0Tensor(BlockTensor):
    """TQ2_0: w = d * q, with q of -1, 0 and 1, four in a byte."""

    planes = block_planes(GGMLType.TQ2_0)
    decode = staticmethod(tq2_0_dequantize)
