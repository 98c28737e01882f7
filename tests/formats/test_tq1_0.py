"""TQ1_0 against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import TQ1_0Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestTQ1_0(BlockChecks):
    ggml_type = GGMLType.TQ1_0
    container = TQ1_0Tensor
    block = (256, 54)
    float16_at = (52,)
    encoding_error = 0.9
