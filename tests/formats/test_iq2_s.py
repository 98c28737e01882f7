"""IQ2_S against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ2STensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import RecordedChecks


class TestIQ2S(RecordedChecks):
    ggml_type = GGMLType.IQ2_S
    container = IQ2STensor
    block = (256, 82)
    float16_at = (0,)
    encoding_error = 0.3
