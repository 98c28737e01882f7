"""Q2_K against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import Q2KTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestQ2K(BlockChecks):
    ggml_type = GGMLType.Q2_K
    container = Q2KTensor
    block = (256, 84)
    float16_at = (80, 82)
    encoding_error = 0.35
