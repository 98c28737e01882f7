"""Q6_K against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q6KTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, k_quant_place, nibble, top_bits


class TestQ6K(FormatChecks):
    ggml_type = GGMLType.Q6_K
    container = Q6KTensor
    block = (256, 210)
    float16_at = (208,)
    real_tensors = 9

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        place = k_quant_place(w)
        q = nibble(planes, n, place) + 16 * top_bits(planes, n, place) - 32
        scale = planes["d"][n, w // 256].astype(np.float32) * planes["scales"][n, w // 16].astype(np.float32)
        return np.float32(scale * np.float32(q))
