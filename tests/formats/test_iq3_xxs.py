"""IQ3_XXS against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ3XXSTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestIQ3XXS(BlockChecks):
    ggml_type = GGMLType.IQ3_XXS
    container = IQ3XXSTensor
    block = (256, 98)
    float16_at = (0,)
    encoding_error = 0.25
