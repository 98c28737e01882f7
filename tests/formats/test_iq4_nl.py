"""IQ4_NL against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ4NLTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestIQ4NL(BlockChecks):
    ggml_type = GGMLType.IQ4_NL
    container = IQ4NLTensor
    block = (32, 18)
    float16_at = (0,)
