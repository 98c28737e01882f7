"""BF16 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import BF16Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes


class TestBF16(FormatChecks):
    ggml_type = GGMLType.BF16
    container = BF16Tensor
    block = (1, 2)
    bfloat16_at = (0,)
    real_tensors = 0

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        return (planes["weight"][n, w].astype(np.uint32) << np.uint32(16)).view(np.float32)
