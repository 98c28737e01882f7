"""Q4_0 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import Q4_0Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, legacy_place, nibble


class TestQ4_0(FormatChecks):
    ggml_type = GGMLType.Q4_0
    container = Q4_0Tensor
    block = (32, 18)
    float16_at = (0,)
    real_tensors = 0

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        q = nibble(planes, n, legacy_place(w)) - 8
        return np.float32(planes["d"][n, w // 32].astype(np.float32) * np.float32(q))
