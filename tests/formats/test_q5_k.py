"""Q5_K against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q5KTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, fifth_bit, k_quant_place, nibble, scale_and_min


class TestQ5K(FormatChecks):
    ggml_type = GGMLType.Q5_K
    container = Q5KTensor
    block = (256, 176)
    float16_at = (0, 2)
    real_tensors = 0

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        place = k_quant_place(w)
        return scale_and_min(planes, n, w, nibble(planes, n, place) + 16 * fifth_bit(planes, n, place))
