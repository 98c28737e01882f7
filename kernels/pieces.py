"""How a packed weight is decoded for a product: so many of its rows at a time. Plain numbers, no torch."""

from __future__ import annotations

from typing import Final

SCRATCH_BYTES: Final = {"cuda": 80 << 20, "cpu": 16 << 20}
"""About the most bytes of decoded weights held at a time, by device, save for the smallest piece."""
ALIGNED_ROWS: Final = 128
"""Pieces are multiples of this many rows: cuBLAS is slow on outputs that do not start at whole tiles."""


def piece_rows(n: int, row_bytes: int, scratch_bytes: int) -> int:
    """How many of a weight's n rows, of `row_bytes` each when decoded, make a piece; the last one may have fewer."""
    pieces = -(-n * row_bytes // scratch_bytes)
    return n if pieces <= 1 else -(-n // pieces // ALIGNED_ROWS) * ALIGNED_ROWS
