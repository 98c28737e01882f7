"""Q4_K against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import CudaCoalescedInt4Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import FormatChecks, Planes, k_quant_place, nibble, scale_and_min


class TestQ4K(FormatChecks):
    ggml_type = GGMLType.Q4_K
    container = CudaCoalescedInt4Tensor
    block = (256, 144)
    float16_at = (0, 2)
    real_tensors = 27

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        return scale_and_min(planes, n, w, nibble(planes, n, k_quant_place(w)))
