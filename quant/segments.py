"""What PyTorch takes of a GPU for tensors: sizes only, no torch. It follows CUDACachingAllocator's default settings.

Tensors are blocks of segments. Small ones share segments of 2 MiB. A large one is cut from a free block, and where
there is none it gets a segment of its own, of which up to 2 MiB, or the rest of 20 MiB, stay unused: see
`gemma4.quant.reserve`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_ALIGNMENT: Final = 512
_SMALL: Final = 1 << 20
_STEP: Final = 2 << 20
_LARGE: Final = 10 << 20
_LEAST_LARGE: Final = 20 << 20


def block_bytes(sizes: Iterable[int]) -> int:
    """Bytes that tensors take of their segments."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def large_block_bytes(sizes: Iterable[int]) -> int:
    """Of those, the bytes of large tensors: one free block of this size holds them all."""
    return block_bytes(size for size in sizes if size > _SMALL)


def segment_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the segments for tensors that are allocated after `gemma4.quant.reserve`."""
    sizes = list(sizes)
    large = large_block_bytes(sizes)
    small = block_bytes(sizes) - large
    if 0 < large < _LARGE:
        large = _LEAST_LARGE
    return sum(-(-part // _STEP) * _STEP for part in (large, small))
