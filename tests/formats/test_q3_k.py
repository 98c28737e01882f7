"""Q3_K against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import Q3KTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks


class TestQ3K(BlockChecks):
    ggml_type = GGMLType.Q3_K
    container = Q3KTensor
    block = (256, 110)
    float16_at = (108,)
    encoding_error = 0.2
