"""Q5_1 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q5_1Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, fifth_bit, legacy_place, nibble


class TestQ5_1(FormatChecks):
    ggml_type = GGMLType.Q5_1
    container = Q5_1Tensor
    block = (32, 24)
    float16_at = (0, 2)
    real_tensors = 0

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        place = legacy_place(w)
        q = nibble(planes, n, place) + 16 * fifth_bit(planes, n, place)
        d, m = planes["dm"][n, w // 32].astype(np.float32)
        return np.float32(np.float32(d * np.float32(q)) + m)
