"""What one generation leaves to the next: the decode loop on a KV cache, and the tokens that the cache holds.

The next one, if it begins with the same tokens, runs only those after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4.ring_snapshot import RingSnapshot

if TYPE_CHECKING:
    from gemma4.decode_loop import DecodeLoop


class TokenHistory:
    """The tokens at positions 0, 1, … of a cache, and how far back its rings still hold them.

    window: positions a query of a sliding layer sees, its own included. ring: those that the layer keeps, p in slot
    p % ring. snapshot: of the rings, taken at the end of a prompt where the answer may overwrite what is needed there.
    """

    def __init__(self, window: int, ring: int, snapshot: RingSnapshot) -> None:
        self.window = window
        self.ring = ring
        self.snapshot = snapshot
        self.ids: list[int] = []
        self._oldest = 0  # the first position that is in every ring, and so are all from there on
        self._saved_oldest, self._saved_end = 0, 0  # the positions in the snapshot that are still those of `ids`

    def resume(self, ids: Sequence[int]) -> int:
        """How many of the first tokens of `ids` need not run again; forgets all others. Less than len(ids).

        Whatever has been written since past the end of the ring took the place of older positions. Where a query after
        the shared tokens would see one of those, the rings are put back as the snapshot has them and it goes on from
        there; where that does not help either, it is 0.
        """
        most = min(len(self.ids), len(ids) - 1)
        start = next((i for i in range(most) if self.ids[i] != ids[i]), most)
        if self._oldest > self._seen_from(start):
            start = min(start, self._saved_end)
            if self._saved_oldest > self._seen_from(start):
                start = 0
            if start > 0:
                self.snapshot.restore()
                self._oldest = self._saved_oldest
        if start == 0:
            self._oldest = 0
        self._saved_end = min(self._saved_end, start)
        del self.ids[start:]
        return start

    def will_write(self, end: int) -> None:
        """To be called before anything is written at positions up to `end`, exclusive."""
        self._oldest = max(self._oldest, end - self.ring)

    def end_prompt(self, ids: Sequence[int], end: int) -> None:
        """To be called when the last tokens of the prompt `ids` have run. end: past what its answer may write.

        A prompt so short that it hardly takes time to run again needs no snapshot.
        """
        self.ids += ids[len(self.ids) :]
        may_lose = end - self.ring > self._seen_from(len(ids) - 1)
        if may_lose and len(ids) > self.ring - self.window:
            self.snapshot.take()
            self._saved_oldest, self._saved_end = self._oldest, len(ids)

    def _seen_from(self, position: int) -> int:
        """The first position that a query there sees."""
        return max(0, position - self.window + 1)


@dataclass(frozen=True, slots=True)
class Session:
    """One generation's own decode loop, and what its cache holds."""

    loop: DecodeLoop
    history: TokenHistory
