"""Q4_1 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q4_1Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, legacy_place, nibble


class TestQ4_1(FormatChecks):
    ggml_type = GGMLType.Q4_1
    container = Q4_1Tensor
    block = (32, 20)
    float16_at = (0, 2)
    real_tensors = 0

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        d, m = planes["dm"][n, w // 32].astype(np.float32)
        return np.float32(np.float32(d * np.float32(nibble(planes, n, legacy_place(w)))) + m)
