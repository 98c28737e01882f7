"""The storage types of GGML tensors: ids, and how many bytes hold how many weights.

Ids and block sizes are those of ggml's `enum ggml_type` and of gguf-py's `GGMLQuantizationType`. Ids ggml has
retired, and ids that only forks of llama.cpp write, are named so that a refusal can say what the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class GGMLType(IntEnum):
    """Type id of a tensor as stored in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """block_size: weights in one block. type_size: bytes of one block. A block never crosses a row."""

    block_size: int
    type_size: int


BLOCK_FORMATS: Final[dict[GGMLType, BlockFormat]] = {
    GGMLType.F32: BlockFormat(1, 4),
    GGMLType.F16: BlockFormat(1, 2),
    GGMLType.Q4_0: BlockFormat(32, 18),
    GGMLType.Q4_1: BlockFormat(32, 20),
    GGMLType.Q5_0: BlockFormat(32, 22),
    GGMLType.Q5_1: BlockFormat(32, 24),
    GGMLType.Q8_0: BlockFormat(32, 34),
    GGMLType.Q8_1: BlockFormat(32, 40),
    GGMLType.Q2_K: BlockFormat(256, 84),
    GGMLType.Q3_K: BlockFormat(256, 110),
    GGMLType.Q4_K: BlockFormat(256, 144),
    GGMLType.Q5_K: BlockFormat(256, 176),
    GGMLType.Q6_K: BlockFormat(256, 210),
    GGMLType.Q8_K: BlockFormat(256, 292),
    GGMLType.IQ2_XXS: BlockFormat(256, 66),
    GGMLType.IQ2_XS: BlockFormat(256, 74),
    GGMLType.IQ3_XXS: BlockFormat(256, 98),
    GGMLType.IQ1_S: BlockFormat(256, 50),
    GGMLType.IQ4_NL: BlockFormat(32, 18),
    GGMLType.IQ3_S: BlockFormat(256, 110),
    GGMLType.IQ2_S: BlockFormat(256, 82),
    GGMLType.IQ4_XS: BlockFormat(256, 136),
    GGMLType.I8: BlockFormat(1, 1),
    GGMLType.I16: BlockFormat(1, 2),
    GGMLType.I32: BlockFormat(1, 4),
    GGMLType.I64: BlockFormat(1, 8),
    GGMLType.F64: BlockFormat(1, 8),
    GGMLType.IQ1_M: BlockFormat(256, 56),
    GGMLType.BF16: BlockFormat(1, 2),
    GGMLType.TQ1_0: BlockFormat(256, 54),
    GGMLType.TQ2_0: BlockFormat(256, 66),
    GGMLType.MXFP4: BlockFormat(32, 17),
    GGMLType.NVFP4: BlockFormat(64, 36),
    GGMLType.Q1_0: BlockFormat(128, 18),
}

RETIRED_TYPES: Final[dict[int, str]] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Ids ggml once used and has removed, with their names."""

FORK_TYPES: Final[dict[int, str]] = {
    43: "MX46A or TurboQuant",
    44: "MX46A or TurboQuant",
    45: "TurboQuant TQ3_1S",
    46: "TurboQuant TQ4_1S",
    47: "TurboQuant",
    48: "TurboQuant",
    133: "ik_llama.cpp's Q6_0",
    134: "ik_llama.cpp's IQ1_BN",
    135: "ik_llama.cpp's IQ2_BN",
    137: "ik_llama.cpp's IQ2_K",
    138: "ik_llama.cpp's IQ3_K",
    139: "ik_llama.cpp's IQ4_K",
    140: "ik_llama.cpp's IQ5_K",
    141: "ik_llama.cpp's IQ6_K",
    142: "Prism",
    143: "Prism",
    144: "ik_llama.cpp's IQ4_KS",
    145: "ik_llama.cpp's IQ2_KS",
    146: "ik_llama.cpp's IQ4_KSS",
    152: "ik_llama.cpp's IQ5_KS",
    153: "ik_llama.cpp's IQ2_KT",
    154: "ik_llama.cpp's IQ3_KT",
    155: "ik_llama.cpp's IQ4_KT",
    156: "ik_llama.cpp's IQ3_KS",
    157: "ik_llama.cpp's IQ2_KL",
    158: "ik_llama.cpp's IQ1_KT",
}
"""Ids that only forks of llama.cpp write, with the name of the fork's format; forks share some of them."""


def row_bytes(t: GGMLType, k: int) -> int:
    """Bytes of one row of `k` weights. Raises ValueError where `k` is negative or not whole blocks."""
    block = BLOCK_FORMATS[t]
    if k < 0 or k % block.block_size:
        raise ValueError(f"a row of {t.name} holds a multiple of {block.block_size} weights, got {k}")
    return k // block.block_size * block.type_size


def describe_type(type_id: int) -> str:
    """One phrase naming a type id, known or not: "Q4_K (12)", "99 (unknown)"."""
    if type_id in GGMLType.__members__.values():
        return f"{GGMLType(type_id).name} ({type_id})"
    if type_id in RETIRED_TYPES:
        return f"{type_id} ({RETIRED_TYPES[type_id]}, retired by ggml)"
    if type_id in FORK_TYPES:
        return f"{type_id} ({FORK_TYPES[type_id]}, written only by a fork of llama.cpp)"
    return f"{type_id} (unknown)"
