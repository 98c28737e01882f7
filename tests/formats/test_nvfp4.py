"""NVFP4 against the checklist."""

from __future__ import annotations

import numpy as np

from gemma4.quant.formats import NVFP4Tensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import BlockChecks, assert_same_bits


class TestNVFP4(BlockChecks):
    ggml_type = GGMLType.NVFP4
    container = NVFP4Tensor
    block = (64, 36)

    def test_nan_and_infinite_scales_stay_visible(self) -> None:
        """All scales with all codes; the code of NaN is zero."""
        blocks = np.empty((256, 36), np.uint8)
        blocks[:, :4] = np.arange(256)[:, None]
        blocks[:, 4:] = np.resize(np.arange(16) * 17, 32)
        expected = self._oracle(blocks)
        assert not expected[0x7F].any()
        assert_same_bits(self._from_blocks(blocks).dequantize(), expected)
