"""IQ1_S against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ1STensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import RecordedChecks


class TestIQ1S(RecordedChecks):
    ggml_type = GGMLType.IQ1_S
    container = IQ1STensor
    block = (256, 50)
    float16_at = (0,)
    encoding_error = 0.6
