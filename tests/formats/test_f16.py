"""F16 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import F16Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes


class TestF16(FormatChecks):
    ggml_type = GGMLType.F16
    container = F16Tensor
    block = (1, 2)
    float16_at = (0,)
    real_tensors = 0

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        return np.float32(planes["weight"][n, w])
