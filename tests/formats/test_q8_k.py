"""Q8_K against the checklist, with the formula of the format as oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma4.quant.formats import Q8KTensor
from gemma4.quant.ggml_types import GGMLType
from tests import q8_k_blocks
from tests.format_checks import BlockChecks, Bytes


class TestQ8_K(BlockChecks):
    ggml_type = GGMLType.Q8_K
    container = Q8KTensor
    block = (256, 292)
    bfloat16_at = (2,)  # the upper half of d
    encoding_error = 0.01
    has_native_decoder = False

    def _random_blocks(self, rows: int, blocks_in_row: int) -> Bytes:
        blocks = super()._random_blocks(rows, blocks_in_row)
        blocks.reshape(rows, blocks_in_row, 292)[..., 3] &= 0xBF  # d below 2, so that no weight overflows
        return blocks

    def _encode(self, weights: NDArray[np.float32]) -> Any:
        return q8_k_blocks.encode(weights)

    def _oracle(self, blocks: Bytes) -> NDArray[np.float32]:
        return q8_k_blocks.decode(blocks)
