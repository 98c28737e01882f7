"""How much of a pass is held at a time where all of it is not needed at once. Plain numbers, no torch."""

from __future__ import annotations

from typing import Final

SCRATCH_BYTES: Final = {"cuda": 85 << 20, "cpu": 16 << 20}
"""About the most bytes of decoded weights held at a time, by device, save for the smallest piece."""
ALIGNED_ROWS: Final = 128
"""Pieces are multiples of this many rows: cuBLAS is slow on outputs that do not start at whole tiles."""
COMPILED_PIECES: Final = 3
"""Pieces decoded at a time in a compiled program."""
ROTATED_BYTES: Final = 24 << 20
"""Most bytes of rotated queries held at a time in a TurboQuant cache's attention, save for those of one KV head."""


def piece_rows(n: int, row_bytes: int, scratch_bytes: int) -> int:
    """How many of a weight's n rows, of `row_bytes` each when decoded, make a piece; the last one may have fewer."""
    pieces = -(-n * row_bytes // scratch_bytes)
    return n if pieces <= 1 else -(-n // pieces // ALIGNED_ROWS) * ALIGNED_ROWS
