"""Q1_0 against the checklist, with libgguf's decoder as oracle: gguf-py has none."""

from __future__ import annotations

import libgguf
import numpy as np
from numpy.typing import NDArray

from gemma4.quant.formats import Q1_0Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks, Bytes


class TestQ1_0(BlockChecks):
    ggml_type = GGMLType.Q1_0
    container = Q1_0Tensor
    block = (128, 18)
    float16_at = (0,)
    encoding_error = 0.7

    def _oracle(self, blocks: Bytes) -> NDArray[np.float32]:
        k = blocks.shape[1] // 18 * 128
        weights: NDArray[np.float32] = libgguf.dequantize_rows(
            np.ascontiguousarray(blocks), libgguf.GGMLQuantizationType.Q1_0, n_per_row=k
        )
        return weights.reshape(len(blocks), k)
