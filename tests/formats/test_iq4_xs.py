"""IQ4_XS against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ4XSTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestIQ4XS(BlockChecks):
    ggml_type = GGMLType.IQ4_XS
    container = IQ4XSTensor
    block = (256, 136)
    float16_at = (0,)
