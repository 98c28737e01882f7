"""A copy of a cache's rings in host memory, as they were at the end of a prompt.

An answer takes the place of positions in the rings that are needed to go on from the end of its prompt: to ask again,
or to go on with a conversation from which the answer's thoughts were left out. Full layers keep every position, so with
the rings put back the whole cache is as it was. The copy takes as much host memory as the rings: 0.94 GB for 31B, for a
GPU pinned, which PyTorch rounds up to a power of two. It is allocated when it is first taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RingSnapshot:
    """One copy, taken again and again in the same memory. rings: tensors of one device, which is not waited for."""

    def __init__(self, rings: Sequence[Tensor]) -> None:
        self.rings = rings
        self._copies: list[Tensor] = []

    def take(self) -> None:
        if not self._copies:
            sizes = [ring.nbytes for ring in self.rings]
            memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=any(ring.is_cuda for ring in self.rings))
            pieces = zip(torch.split(memory, sizes), self.rings, strict=True)
            self._copies = [piece.view(ring.dtype).view(ring.shape) for piece, ring in pieces]
        for copy, ring in zip(self._copies, self.rings, strict=True):
            copy.copy_(ring, non_blocking=True)

    def restore(self) -> None:
        """Writes the copy back into the rings. It must have been taken."""
        for ring, copy in zip(self.rings, self._copies, strict=True):
            ring.copy_(copy, non_blocking=True)
