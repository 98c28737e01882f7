"""MXFP4 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import MXFP4Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks, Bytes, assert_same_bits


class TestMXFP4(BlockChecks):
    ggml_type = GGMLType.MXFP4
    container = MXFP4Tensor
    block = (32, 17)
    encoding_error = 0.15

    def test_nan_and_infinite_scales_stay_visible(self) -> None:
        """All scales, of which the largest overflow, with all codes; there is no NaN."""
        blocks = np.tile(np.arange(17, dtype=np.uint8) * 16 + np.arange(17, dtype=np.uint8)[::-1], (256, 1))
        blocks[:, 0] = np.arange(256)
        expected = self._oracle(blocks)
        assert np.isinf(expected).any(axis=1).nonzero()[0].tolist() == [253, 254, 255]
        assert_same_bits(self._from_blocks(blocks).dequantize(), expected)

    def _random_blocks(self, rows: int, blocks_in_row: int) -> Bytes:
        blocks = super()._random_blocks(rows, blocks_in_row)
        scales = blocks.reshape(rows, blocks_in_row, 17)[..., 0]
        scales[scales > 252] -= 3  # finite
        return blocks
