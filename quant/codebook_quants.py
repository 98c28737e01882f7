"""Types whose numbers index a codebook: as `gemma4.quant.block_quants`, with the codebook looked up at each decode."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gemma4.kernels.dequant_codebooks import (
    iq1_m_dequantize,
    iq1_s_dequantize,
    iq2_s_dequantize,
    iq2_xs_dequantize,
    iq2_xxs_dequantize,
    iq3_s_dequantize,
    iq3_xxs_dequantize,
    iq4_nl_dequantize,
    iq4_xs_dequantize,
)
from gemma4.quant.block_quants import BlockTensor, block_planes
from gemma4.quant.codebooks import codebook
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.quant_tensor import register_format

__all__ = [
    "IQ1MTensor",
    "IQ1STensor",
    "IQ2STensor",
    "IQ2XSTensor",
    "IQ2XXSTensor",
    "IQ3STensor",
    "IQ3XXSTensor",
    "IQ4NLTensor",
    "IQ4XSTensor",
]


def _with_codebook(ggml_type: GGMLType, decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda blocks: decode(blocks, codebook(ggml_type, blocks))


@register_format(GGMLType.IQ4_NL)
class IQ4NLTensor(BlockTensor):
    """IQ4_NL: 4-bit indices; d of each 32 weights."""

    planes = block_planes(GGMLType.IQ4_NL)
    decode = staticmethod(_with_codebook(GGMLType.IQ4_NL, iq4_nl_dequantize))


@register_format(GGMLType.IQ4_XS)
class IQ4XSTensor(BlockTensor):
    """IQ4_XS: 4-bit indices; a 6-bit scale of each 32 weights."""

    planes = block_planes(GGMLType.IQ4_XS)
    decode = staticmethod(_with_codebook(GGMLType.IQ4_XS, iq4_xs_dequantize))


@register_format(GGMLType.IQ3_XXS)
class IQ3XXSTensor(BlockTensor):
    """IQ3_XXS: 8-bit indices of four weights, and their signs; a scale of each 32 weights."""

    planes = block_planes(GGMLType.IQ3_XXS)
    decode = staticmethod(_with_codebook(GGMLType.IQ3_XXS, iq3_xxs_dequantize))


@register_format(GGMLType.IQ3_S)
class IQ3STensor(BlockTensor):
    """IQ3_S: 9-bit indices of four weights, and their signs; a scale of each 32 weights."""

    planes = block_planes(GGMLType.IQ3_S)
    decode = staticmethod(_with_codebook(GGMLType.IQ3_S, iq3_s_dequantize))


@register_format(GGMLType.IQ2_XXS)
class IQ2XXSTensor(BlockTensor):
    """IQ2_XXS: 8-bit indices of eight weights, and their signs; a scale of each 32 weights."""

    planes = block_planes(GGMLType.IQ2_XXS)
    decode = staticmethod(_with_codebook(GGMLType.IQ2_XXS, iq2_xxs_dequantize))


@register_format(GGMLType.IQ2_XS)
class IQ2XSTensor(BlockTensor):
    """IQ2_XS: 9-bit indices of eight weights, and their signs; a scale of each 16 weights."""

    planes = block_planes(GGMLType.IQ2_XS)
    decode = staticmethod(_with_codebook(GGMLType.IQ2_XS, iq2_xs_dequantize))


@register_format(GGMLType.IQ2_S)
class IQ2STensor(BlockTensor):
    """IQ2_S: 10-bit indices of eight weights, and their signs; a scale of each 16 weights."""

    planes = block_planes(GGMLType.IQ2_S)
    decode = staticmethod(_with_codebook(GGMLType.IQ2_S, iq2_s_dequantize))


@register_format(GGMLType.IQ1_S)
class IQ1STensor(BlockTensor):
    """IQ1_S: 11-bit indices of eight weights; a scale and an offset of each 32 weights."""

    planes = block_planes(GGMLType.IQ1_S)
    decode = staticmethod(_with_codebook(GGMLType.IQ1_S, iq1_s_dequantize))


@register_format(GGMLType.IQ1_M)
class IQ1MTensor(BlockTensor):
    """IQ1_M: 11-bit indices of eight weights, an offset of them; a scale of each 16 weights."""

    planes = block_planes(GGMLType.IQ1_M)
    decode = staticmethod(_with_codebook(GGMLType.IQ1_M, iq1_m_dequantize))
