"""IQ3_S against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ3STensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestIQ3S(BlockChecks):
    ggml_type = GGMLType.IQ3_S
    container = IQ3STensor
    block = (256, 110)
    float16_at = (0,)
    encoding_error = 0.2
