"""Infinities and NaNs in stored weights: every type against gguf-py's decoder, and `gemma4 inspect --check`."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma4.cli import main
from gemma4.hf_export import export_hf
from gemma4.quant import non_finite
from gemma4.quant.errors import TruncatedError
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType
from gemma4.quant.gguf_file import GGUFFile, TensorInfo
from gemma4.quant.non_finite import NonFinite, find_non_finite
from gemma4.quant.plan import LOADABLE_TYPES
from tests.tiny_gguf import gemma4

BLOCKS = 1024
# gguf-py does not decode these. Bytes of a block's scale, and what makes it infinite.
UNKNOWN_TO_GGUF = {GGMLType.Q8_K: (slice(4), b"\0\0\x80\x7f"), GGMLType.Q1_0: (slice(2), b"\0\x7c")}


@dataclass
class OneTensor:
    """A file with one tensor `w`."""

    kind: GGMLType
    blocks: np.ndarray
    path: Path = Path("one.gguf")
    metadata: Mapping[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        shape = (1, len(self.blocks) * BLOCK_FORMATS[self.kind].block_size)
        return {"w": TensorInfo("w", shape, self.kind, self.blocks.nbytes, 0, 0)}

    def data(self, name: str) -> memoryview:
        return memoryview(self.blocks.reshape(-1))


def random_blocks(kind: GGMLType) -> np.ndarray:
    """uint8 [BLOCKS, type_size]."""
    return np.random.default_rng(kind).integers(0, 256, (BLOCKS, BLOCK_FORMATS[kind].type_size), np.uint8)


@pytest.mark.parametrize("kind", sorted(LOADABLE_TYPES - UNKNOWN_TO_GGUF.keys()), ids=lambda kind: kind.name)
def test_every_type_against_its_decoder(kind: GGMLType) -> None:
    blocks = random_blocks(kind)
    if kind is GGMLType.MXFP4:  # the largest scales overflow in products with some codes only
        blocks[(blocks[:, 0] >= 253) & (blocks[:, 0] < 255), 0] = 0
        blocks[:, 1] = 0x77
    with np.errstate(all="ignore"):
        weights = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    expected = int((~np.isfinite(weights.reshape(BLOCKS, -1))).any(axis=1).sum())
    assert (expected > 0) == (kind is not GGMLType.NVFP4)
    found = find_non_finite(OneTensor(kind, blocks))
    assert found == ((NonFinite("w", kind, expected, BLOCKS),) if expected else ())


@pytest.mark.parametrize("kind", UNKNOWN_TO_GGUF, ids=lambda kind: kind.name)
def test_types_unknown_to_gguf(kind: GGMLType) -> None:
    blocks, (where, infinite) = random_blocks(kind), UNKNOWN_TO_GGUF[kind]
    blocks[:, where] = 0
    assert find_non_finite(OneTensor(kind, blocks)) == ()
    blocks[::100, where] = np.frombuffer(infinite, np.uint8)
    assert find_non_finite(OneTensor(kind, blocks)) == (NonFinite("w", kind, 11, BLOCKS),)


def test_other_numbers() -> None:
    double = np.zeros((BLOCKS, 8), np.uint8)
    double.view(np.float64)[3:5, 0] = np.inf, np.nan
    assert find_non_finite(OneTensor(GGMLType.F64, double)) == (NonFinite("w", GGMLType.F64, 2, BLOCKS),)
    assert find_non_finite(OneTensor(GGMLType.I32, np.full((BLOCKS, 4), 255, np.uint8))) == ()
    assert find_non_finite(OneTensor(GGMLType.F32, np.zeros((0, 4), np.uint8))) == ()


def test_a_slice_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite, "_SLICE_BYTES", 1 << 16)
    values = np.zeros((1 << 20, 4), np.uint8)
    values.view(np.float32)[[0, 70_000, (1 << 20) - 1], 0] = np.nan
    done: list[int] = []
    tracemalloc.start()
    found = find_non_finite(OneTensor(GGMLType.F32, values), done.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == (NonFinite("w", GGMLType.F32, 3, 1 << 20),)
    assert (sum(done), len(done)) == (values.nbytes, 64)
    assert peak < 1 << 19


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, args)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_inspect_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gemma4(types={"matrix": "Q8_0"})
    path = model.write(tmp_path / "good.gguf")
    code, out, err = run(capsys, path, "--check")
    assert (code, err) == (0, "")
    assert out.endswith("All weights are finite.\n")
    assert json.loads(run(capsys, path, "--check", "--json")[1])["non_finite"] == []
    assert "non_finite" not in json.loads(run(capsys, path, "--json")[1])
    data = bytearray(path.read_bytes())
    with GGUFFile.open(path) as file:
        norm, matrix = file.tensors["blk.0.attn_norm.weight"], file.tensors["blk.1.ffn_up.weight"]
    data[norm.offset + 8 : norm.offset + 12] = np.float32(np.nan).tobytes()
    for block in (0, 7):
        data[matrix.offset + 34 * block : matrix.offset + 34 * block + 2] = np.float16(-np.inf).tobytes()
    path.write_bytes(data)
    code, out, _ = run(capsys, path, "--check")
    assert code == 1
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows[norm.name] == ["F32", "1", "of", "256", "values"]
    assert rows[matrix.name] == ["Q8_0", "2", "of", f"{matrix.nbytes // 34:,}", "blocks"]
    code, out, _ = run(capsys, path, "--check", "--json")
    assert code == 1
    assert [(t["name"], t["blocks"]) for t in json.loads(out)["non_finite"]] == [(norm.name, 1), (matrix.name, 2)]
    assert run(capsys, path)[0] == 0


def test_inspect_check_of_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gemma4()
    model.values["blk.1.attn_norm.weight"] = np.full(256, np.inf, np.float32)
    export_hf(model.write(tmp_path / "model.gguf"), tmp_path / "checkpoint")
    code, out, _ = run(capsys, tmp_path / "checkpoint", "--check", "--json")
    expected = {"name": "blk.1.attn_norm.weight", "type": "BF16", "blocks": 256, "total": 256}
    assert (code, json.loads(out)["non_finite"]) == (1, [expected])


def test_a_file_cut_while_it_is_checked(tmp_path: Path) -> None:
    path = gemma4().write(tmp_path / "model.gguf")
    with GGUFFile.open(path) as file:
        with path.open("r+b") as out:
            out.truncate(path.stat().st_size // 2)
        with pytest.raises(TruncatedError):
            find_non_finite(file)
