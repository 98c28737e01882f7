"""How much of a pass is held at a time where all of it is not needed at once. Plain numbers, no torch."""

from __future__ import annotations

from typing import Final, NamedTuple

SCRATCH_BYTES: Final = {"cuda": 85 << 20, "cpu": 16 << 20}
"""About the most bytes of decoded weights held at a time, by device, save for the smallest piece."""
ALIGNED_ROWS: Final = 128
"""Pieces are multiples of this many rows: cuBLAS is slow on outputs that do not start at whole tiles."""
COMPILED_PIECES: Final = 3
"""Pieces decoded at a time in a compiled program."""
SLICED_BYTES: Final = 29 << 20
"""Most bytes of decoded keys and values, and of what their softmax carries along, in a TurboQuant cache's prefill."""
SOFTMAX_BYTES: Final = 18 << 20
"""Most bytes of the latter."""
SLICE_KEYS: Final = 128
"""Slices are multiples of this many keys, of which every attention tile has a whole fraction."""


def piece_rows(n: int, row_bytes: int, scratch_bytes: int) -> int:
    """How many of a weight's n rows, of `row_bytes` each when decoded, make a piece; the last one may have fewer."""
    pieces = -(-n * row_bytes // scratch_bytes)
    return n if pieces <= 1 else -(-n // pieces // ALIGNED_ROWS) * ALIGNED_ROWS


class SliceShape(NamedTuple):
    """What attends to a decoded slice of keys at a time: tokens, KV heads, and the keys of the slice."""

    tokens: int
    heads: int
    keys: int

    @classmethod
    def of(cls, tokens: int, kv_heads: int, state_bytes: int, key_bytes: int) -> SliceShape:
        """state_bytes: of a token in the softmax of one KV head; key_bytes: of a key and its value, decoded."""
        pieces = -(-tokens * state_bytes // SOFTMAX_BYTES)
        # Kernels have a form of their own for addresses that are no multiples of 16 bytes.
        at_once = min(tokens, -(-tokens // pieces // 16) * 16)
        heads = max(1, min(kv_heads, SOFTMAX_BYTES // (at_once * state_bytes)))
        left = SLICED_BYTES - heads * at_once * state_bytes
        return cls(at_once, heads, max(1, left // (heads * key_bytes * SLICE_KEYS)) * SLICE_KEYS)
