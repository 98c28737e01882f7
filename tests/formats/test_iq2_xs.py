"""IQ2_XS against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ2XSTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import RecordedChecks


class TestIQ2XS(RecordedChecks):
    ggml_type = GGMLType.IQ2_XS
    container = IQ2XSTensor
    block = (256, 74)
    float16_at = (0,)
    encoding_error = 0.35
