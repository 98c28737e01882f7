"""The type table against gguf-py's, and row sizes against libgguf's."""

from __future__ import annotations

import gguf
import libgguf
import pytest
from gguf.constants import GGML_QUANT_SIZES

from gemma4.quant.ggml_types import (
    BLOCK_FORMATS,
    FORK_TYPES,
    RETIRED_TYPES,
    GGMLType,
    describe_type,
    row_bytes,
)


def test_ids_and_names_are_those_of_gguf_py() -> None:
    assert {t.name: int(t) for t in GGMLType} == {t.name: int(t) for t in gguf.GGMLQuantizationType}


def test_block_sizes_are_those_of_gguf_py() -> None:
    ours = {int(t): (block.block_size, block.type_size) for t, block in BLOCK_FORMATS.items()}
    assert ours == {int(t): sizes for t, sizes in GGML_QUANT_SIZES.items()}
    assert set(BLOCK_FORMATS) == set(GGMLType)


STORED = [t for t in GGMLType if t.name[0] == "Q" and t.name not in ("Q8_1", "Q8_K")]


@pytest.mark.parametrize("t", STORED, ids=lambda t: t.name)
def test_row_bytes_are_those_of_libgguf(t: GGMLType) -> None:
    assert row_bytes(t, 1024) == libgguf.row_size(gguf.GGMLQuantizationType(int(t)), 1024)


@pytest.mark.parametrize(("t", "k"), [(GGMLType.Q4_K, 255), (GGMLType.Q8_0, 33), (GGMLType.F32, -1)])
def test_a_row_of_partial_blocks_is_refused(t: GGMLType, k: int) -> None:
    with pytest.raises(ValueError, match=f"{t.name} .* got {k}"):
        row_bytes(t, k)


def test_row_bytes_of_odd_and_empty_rows() -> None:
    assert row_bytes(GGMLType.BF16, 7) == 14
    assert row_bytes(GGMLType.Q6_K, 0) == 0


@pytest.mark.parametrize(
    ("type_id", "text"),
    [
        (12, "Q4_K (12)"),
        (33, "33 (Q4_0_8_8, retired by ggml)"),
        (43, "43 (MX46A or TurboQuant, written only by a fork of llama.cpp)"),
        (144, "144 (ik_llama.cpp's IQ4_KS, written only by a fork of llama.cpp)"),
        (143, "143 (Prism, written only by a fork of llama.cpp)"),
        (4294967295, "4294967295 (unknown)"),
    ],
)
def test_every_id_has_a_phrase(type_id: int, text: str) -> None:
    assert describe_type(type_id) == text


def test_known_retired_and_fork_ids_are_disjoint() -> None:
    known = {int(t) for t in GGMLType}
    assert not known & set(RETIRED_TYPES)
    assert not known & set(FORK_TYPES)
    assert not set(RETIRED_TYPES) & set(FORK_TYPES)
