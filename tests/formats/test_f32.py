"""F32 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import F32Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes


class TestF32(FormatChecks):
    ggml_type = GGMLType.F32
    container = F32Tensor
    block = (1, 4)
    bfloat16_at = (2,)
    real_tensors = 109

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        return np.float32(planes["weight"][n, w])
