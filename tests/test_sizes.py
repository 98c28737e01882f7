"""The measured table of sizes: whole files of random weights, one result for each, and the rows made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmarks.size_runs import measure_pairs
from benchmarks.sizes import TABLE, describe, measure, read_measured, row
from benchmarks.synthesize import write, write_header, write_random_bytes
from tests.family_gguf import SHRUNKEN, quantize
from tests.tiny_gguf import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("size", "recipe"), [("26B-A4B", "MXFP4_MOE"), ("E2B", "Q4_K_S")])
def test_a_written_file_holds_sane_weights(size: str, recipe: str, tmp_path: Path) -> None:
    """Over an old file, longer than the new one."""
    model, path = quantize(SHRUNKEN[size](), recipe), tmp_path / "model.gguf"
    path.write_bytes(b"\xff" * 16_000_000)
    write(path, model)
    assert path.stat().st_size == model.write_sparse(tmp_path / "sparse.gguf").stat().st_size
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == model.tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.tensor_type.name == model.tensors[name].type
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        if model.tensors[name].type == "F32":
            np.testing.assert_array_equal(weights, model.weights(name))
        else:
            assert 64 * weights.std() == pytest.approx(1, abs=0.05)
            assert np.abs(64 * weights).max() < 8


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.pwritev", lambda fd, pieces, offset: 100)
    with pytest.raises(OSError, match="no room for"):
        write(tmp_path / "model.gguf", quantize(SHRUNKEN["12B"](), "Q8_0"))


def test_a_header_over_random_bytes(tmp_path: Path) -> None:
    """What is random is finite in every type, and no more is left than the model has."""
    body = write_random_bytes(tmp_path / "model.gguf", 40_000_000)
    for recipe in ("Q8_0", "IQ4_XS"):
        model = quantize(SHRUNKEN["E2B"](), recipe)
        write_header(body, model)
        assert body.stat().st_size == model.write_sparse(tmp_path / "sparse.gguf").stat().st_size
        for tensor in gguf.GGUFReader(body).tensors:
            assert np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all()
    with pytest.raises(ValueError, match=r"model\.gguf: found .* bytes, expected .* or more"):
        write_header(body, quantize(SHRUNKEN["E2B"](), "Q8_0"))


def damaged() -> Model:
    model = SHRUNKEN["12B"]()
    model.metadata["gemma4.rope.freq_base"] = 0.0
    return model


def test_measuring_goes_on_after_a_failure(tmp_path: Path) -> None:
    pairs = [("E2B", "Q4_0"), ("12B", "IQ4_XS"), ("26B-A4B", "MXFP4_MOE")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    results = list(measure_pairs(pairs, scratch, torch.device("cpu"), {**SHRUNKEN, "12B": damaged}))
    assert not list(scratch.iterdir())
    assert {(result["size"], result["recipe"]) for result in results} == {*pairs}
    assert [result.get("file_bytes") for result in results] == sorted(
        [result.get("file_bytes") for result in results], key=lambda n: -(n or 0)
    )
    lines = tmp_path / "measured.json"
    lines.write_text("".join(json.dumps({**result, "commit": "abc"}) + "\n" for result in results))
    measured = read_measured([lines])
    assert list(measured) == [pairs[0], pairs[2]]
    for found in measured.values():
        assert found["context"] == 512
        assert found["load_s"] > 0
        assert found["decode_s"] > 0
        assert found["planned_total_bytes"] > found["planned_allocated_bytes"] > found["file_bytes"] / 2


def test_results_are_lines_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pairs = [("E2B", "Q8_0"), ("31B", "Q6_K")]
    figures = [{"load_s": 2.0, "decode_s": 0.01}, {"error": "OutOfMemoryError: no"}]

    def measured(pairs: list[tuple[str, str]], *_: object, **__: object) -> Iterator[dict[str, object]]:
        for (size, recipe), found in zip(pairs, figures, strict=True):
            yield {"size": size, "recipe": recipe, **found}

    monkeypatch.setattr("benchmarks.size_runs.measure_pairs", measured)
    measure(pairs, tmp_path, "abc")
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"size": size, "recipe": recipe, **found, "commit": "abc"}
        for (size, recipe), found in zip(pairs, figures, strict=True)
    ]
    assert "E2B Q8_0: loaded in 2.00 s, 100.0 tokens/s" in err
    assert "31B Q6_K: OutOfMemoryError: no" in err


def test_rows_with_and_without_measured_figures(tmp_path: Path) -> None:
    figures = {"load_s": 1.234, "decode_s": 0.0125, "gpu_peak_bytes": 4.56 * 2**30}
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    origin = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
    pair = {"size": "E2B", "recipe": "Q4_0"}
    old.write_text(json.dumps({**pair, **origin, **figures, "load_s": 9.0}) + "\n")
    new.write_text(json.dumps({**pair, **origin, **figures}) + "\n" + json.dumps({**pair, "error": "out of memory"}))
    measured = read_measured([old, new])
    columns = [cell.strip() for cell in TABLE.strip().splitlines()[0].split("|")]
    found, planned = (
        dict(zip(columns, (cell.strip() for cell in row("E2B", "Q4_0", m).split("|")), strict=True))
        for m in (measured, {})
    )
    changed = {key: (planned[key], found[key]) for key in columns if planned[key] != found[key]}
    assert changed == {"load s": ("-", "1.23"), "measured": ("-", "4.6"), "tok/s": ("-", "80")}
    assert (found["GB"], found["GiB at 8,192"], found["full context"]) == ("3.35", "4.2", "131,072")
    assert describe(measured) == "- Measured on one a GPU, torch 2, Triton 3, commit abc.\n"
    assert describe({}) == ""


@pytest.mark.gpu
def test_measuring_on_a_gpu(tmp_path: Path) -> None:
    results = list(measure_pairs([("E2B", "Q4_K_M"), ("12B", "IQ4_XS")], tmp_path, torch.device("cuda"), SHRUNKEN))
    for result in results:
        assert "error" not in result, result["error"]
        assert result["gpu_peak_bytes"] > result["gpu_before_bytes"]
        assert result["gpu_peak_bytes"] > result["peak_allocated_bytes"] > result["file_bytes"] / 2
