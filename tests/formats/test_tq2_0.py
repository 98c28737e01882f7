"""TQ2_0 against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import TQ2_0Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestTQ2_0(BlockChecks):
    ggml_type = GGMLType.TQ2_0
    container = TQ2_0Tensor
    block = (256, 66)
    float16_at = (64,)
    encoding_error = 0.9
