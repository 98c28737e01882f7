"""Infinities and NaNs in stored weights, found without decoding them.

A quantized weight is a small integer times a scale of its block, so a block is finite where its scales are. In every
floating-point format here what is not finite has all bits of its exponent set, or one code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType
from gemma4.quant.weight_file import WeightFile

__all__ = ["NonFinite", "find_non_finite"]

_SLICE_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A tensor with such values. blocks: those with any, of `total`; in types without blocks each value is one."""

    name: str
    type: GGMLType
    blocks: int
    total: int


@dataclass(frozen=True, slots=True)
class _Scales:
    """Where a block keeps its floating-point numbers. A number is not finite where all bits of `mask` are set.

    number: numpy's name of an unsigned integer as wide. offset: in bytes.
    """

    number: str
    mask: int
    offset: int = 0
    count: int = 1

    def dtype(self, kind: GGMLType) -> np.dtype[np.void]:
        """One block, with its numbers as the field `scales`."""
        size = BLOCK_FORMATS[kind].type_size
        formats, offsets = [(self.number, (self.count,))], [self.offset]
        return np.dtype({"names": ["scales"], "formats": formats, "offsets": offsets, "itemsize": size})


def _float16(offset: int = 0, count: int = 1) -> _Scales:
    return _Scales("<u2", 0x7C00, offset, count)


def _float32(count: int = 1) -> _Scales:
    return _Scales("<u4", 0x7F80_0000, 0, count)


# Integers are left out, and NVFP4, where the code of NaN stands for zero.
_SCALES: Final = {
    GGMLType.F64: _Scales("<u8", 0x7FF0 << 48),
    GGMLType.F32: _float32(),
    GGMLType.F16: _float16(),
    GGMLType.BF16: _Scales("<u2", 0x7F80),
    GGMLType.Q4_0: _float16(),
    GGMLType.Q4_1: _float16(count=2),
    GGMLType.Q5_0: _float16(),
    GGMLType.Q5_1: _float16(count=2),
    GGMLType.Q8_0: _float16(),
    GGMLType.Q8_1: _float32(count=2),
    GGMLType.Q2_K: _float16(80, count=2),
    GGMLType.Q3_K: _float16(108),
    GGMLType.Q4_K: _float16(count=2),
    GGMLType.Q5_K: _float16(count=2),
    GGMLType.Q6_K: _float16(208),
    GGMLType.Q8_K: _float32(),
    GGMLType.IQ4_NL: _float16(),
    GGMLType.IQ4_XS: _float16(),
    GGMLType.IQ3_XXS: _float16(),
    GGMLType.IQ3_S: _float16(),
    GGMLType.IQ2_XXS: _float16(),
    GGMLType.IQ2_XS: _float16(),
    GGMLType.IQ2_S: _float16(),
    GGMLType.IQ1_S: _float16(),
    # A float16 in the top four bits of four words, of which the last two hold the exponent.
    GGMLType.IQ1_M: _Scales("<u4", 0x7000_C000, 52),
    GGMLType.TQ1_0: _float16(52),
    GGMLType.TQ2_0: _float16(64),
    GGMLType.Q1_0: _float16(),
    GGMLType.MXFP4: _Scales("<u1", 0xFF),  # an exponent alone, whose last code is NaN
}


def find_non_finite(file: WeightFile, progress: Callable[[int], None] = lambda _: None) -> tuple[NonFinite, ...]:
    """The tensors of an open file that hold infinities or NaNs, in its order. Reads all once, a slice at a time.

    progress: called with the number of bytes just read. Raises TruncatedError where the file has been cut.
    """
    found = (_check(file, name, progress) for name in file.tensors)
    return tuple(tensor for tensor in found if tensor is not None)


def _check(file: WeightFile, name: str, progress: Callable[[int], None]) -> NonFinite | None:
    info = file.tensors[name]
    scales = _SCALES.get(info.type)
    if scales is None or not info.nbytes:
        progress(info.nbytes)
        return None
    blocks = np.frombuffer(file.data(name), scales.dtype(info.type))
    step = max(1, _SLICE_BYTES // blocks.itemsize)
    count = 0
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        count += int(np.count_nonzero(((piece["scales"] & scales.mask) == scales.mask).any(axis=1)))
        progress(piece.nbytes)
    return NonFinite(name, info.type, count, len(blocks)) if count else None
