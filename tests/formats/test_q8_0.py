"""Q8_0 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q8_0Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes


class TestQ8_0(FormatChecks):
    ggml_type = GGMLType.Q8_0
    container = Q8_0Tensor
    block = (32, 34)
    float16_at = (0,)
    real_tensors = 10

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        return np.float32(planes["qs"][n, w].astype(np.float32) * planes["d"][n, w // 32].astype(np.float32))
