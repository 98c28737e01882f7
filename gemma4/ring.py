"""How many positions a sliding layer keeps, and how many tokens a pass takes: plain numbers, no torch.

A sliding layer keeps a ring, position p in slot p % length. A chunk attends to the ring and to itself before it is
written, so it may be longer than the ring, which then takes its last positions only.
"""

from __future__ import annotations

from typing import Final

_SLACK: Final = 64
_LEAST_SLACK: Final = 8  # a pass of a few tokens writes them before they attend


def chunk_size(window: int, max_seq_len: int) -> int:
    """The most tokens of one pass, for layers that see `window` tokens and a context of `max_seq_len`."""
    return min(2 * window, max_seq_len)


def ring_length(window: int, max_seq_len: int) -> int:
    """Positions that a layer keeps which sees `window` tokens: some more, so that one can go back a little.

    For windows of 512 and 1024 it is a multiple of every tile of keys.
    """
    return min(window + min(_SLACK, max(_LEAST_SLACK, window // 8)), max_seq_len)
