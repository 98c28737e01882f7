"""PyTorch's caching allocator for a GPU with its default settings, without a GPU: how much it takes for tensors.

A tensor is cut from the smallest free block of its pool that has room, neighbours that are free become one block, and
where no block has room a segment is taken from the GPU. It follows c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from tests.live_memory import Event

MIB: Final = 1 << 20


class Block(NamedTuple):
    """In the order in which free blocks are tried."""

    size: int
    segment: int
    offset: int


class CachingAllocator:
    """segments: bytes of each, in the order they were taken."""

    def __init__(self) -> None:
        self.segments: list[int] = []
        self._free: dict[bool, list[Block]] = {False: [], True: []}
        self._used: dict[object, tuple[bool, Block]] = {}

    def allocate(self, key: object, size: int) -> None:
        size = max(512, -(-size // 512) * 512)
        is_large = size > MIB
        free = self._free[is_large]
        block = min((block for block in free if block.size >= size), default=None)
        if block is None:
            step = 2 * MIB
            least = step if not is_large else 20 * MIB if size < 10 * MIB else size
            self.segments.append(-(-least // step) * step)
            block = Block(self.segments[-1], len(self.segments) - 1, 0)
        else:
            free.remove(block)
        rest = block.size - size
        if rest > MIB if is_large else rest >= 512:
            free.append(Block(rest, block.segment, block.offset + size))
            block = Block(size, block.segment, block.offset)
        self._used[key] = is_large, block

    def free(self, key: object) -> None:
        is_large, (size, segment, offset) = self._used.pop(key)
        free = self._free[is_large]
        for other in list(free):
            if other.segment == segment and (other.offset + other.size == offset or offset + size == other.offset):
                free.remove(other)
                size, offset = size + other.size, min(offset, other.offset)
        free.append(Block(size, segment, offset))

    def reserve(self, sizes: Iterable[int]) -> None:
        """As `gemma4.quant.reserve.reserve_blocks`."""
        sizes = list(sizes)
        for i, size in enumerate(sizes):
            self.allocate(("reserved", i), size)
        for i in range(len(sizes)):
            self.free(("reserved", i))

    def run(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.size is None:
                self.free(event.storage)
            else:
                self.allocate(event.storage, event.size)
