"""IQ1_M against the checklist."""

from __future__ import annotations

from gemma4.quant.formats import IQ1MTensor
from gemma4.quant.ggml_types import GGMLType
from tests.format_checks import Bytes, RecordedChecks


class TestIQ1M(RecordedChecks):
    ggml_type = GGMLType.IQ1_M
    container = IQ1MTensor
    block = (256, 56)
    float16_at = (48,)
    encoding_error = 0.65

    def _put_number(self, blocks: Bytes, at: int, number: Bytes) -> None:
        """Four bits of the float16 stand at the top of each of four words."""
        for word, nibble in enumerate(
            (number[..., 0] & 15, number[..., 0] >> 4, number[..., 1] & 15, number[..., 1] >> 4)
        ):
            high = blocks[..., at + 2 * word + 1]
            high[...] = high & 15 | nibble << 4
