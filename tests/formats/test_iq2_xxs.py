"""IQ2_XXS against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ2XXSTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import RecordedChecks


class TestIQ2XXS(RecordedChecks):
    ggml_type = GGMLType.IQ2_XXS
    container = IQ2XXSTensor
    block = (256, 66)
    float16_at = (0,)
    encoding_error = 0.4
