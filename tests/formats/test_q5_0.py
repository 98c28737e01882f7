"""Q5_0 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q5_0Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, fifth_bit, legacy_place, nibble


class TestQ5_0(FormatChecks):
    ggml_type = GGMLType.Q5_0
    container = Q5_0Tensor
    block = (32, 22)
    float16_at = (0,)
    real_tensors = 81

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        place = legacy_place(w)
        q = nibble(planes, n, place) + 16 * fifth_bit(planes, n, place) - 16
        return np.float32(planes["d"][n, w // 32].astype(np.float32) * np.float32(q))
