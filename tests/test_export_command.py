"""`gemma4 export`: what reaches the exporter, and what is printed. The exporter itself is replaced here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemma4.export
from gemma4.cli import main
from gemma4.export import aoti
from gemma4.export.report import ExportError, ExportReport
from gemma4.quant.errors import FileMissingError

FUSION = "fused gate+up on 60 of 60 MLP layers (0 left)"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def export_aoti(gguf: Path, out: Path, *, on_phase: Callable[[str], None], **options: Any) -> ExportReport:
        made.append({"gguf": gguf, "out": out, **options})
        on_phase("compile decode")
        return ExportReport(out, {"model.pt2": 3_000_000}, {"compile decode": 1.5}, 2_000_000_000, None, (FUSION,))

    monkeypatch.setattr(aoti, "export_aoti", export_aoti)
    return made


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    return ended.value.code


def test_options_reach_the_exporter(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--format", "pt2", "--max-seq-len", "131072", "--kv-cache", "turboquant", "--target", "sm_90")
    assert run("model.gguf", "--out", "dir", *options) == 0
    expected = {"max_seq_len": 131072, "kv_cache": "turboquant", "target": "sm_90"}
    assert calls == [{"gguf": Path("model.gguf"), "out": Path("dir"), **expected}]
    printed = capsys.readouterr()
    assert printed.err == ""  # phases are for terminals
    for part in ("dir", "model.pt2", "3.0 MB", "compile decode", "1.5 s", "peak memory, host", "2.0 GB", FUSION):
        assert part in printed.out
    assert "device" not in printed.out


@pytest.mark.usefixtures("calls")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model.gguf", "--out", "dir", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": "dir",
        "bytes": {"model.pt2": 3_000_000},
        "seconds": {"compile decode": 1.5},
        "peak_host_anonymous_bytes": 2_000_000_000,
        "peak_device_bytes": None,
        "fusions": [FUSION],
    }


def test_phases_on_a_terminal(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run("model.gguf", "--out", "dir") == 0
    assert capsys.readouterr().err.endswith("0.0 s  compile decode\n")


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ExportError("the C++ compiler failed", path="dir")

    monkeypatch.setattr(aoti, "export_aoti", fail)
    assert run("model.gguf", "--out", "dir") == 3
    assert capsys.readouterr().err == "error [export]: dir: the C++ compiler failed\n"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError):
        aoti.export_aoti(tmp_path / "none.gguf", tmp_path / "out", target="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_the_package() -> None:
    assert gemma4.export.export_aoti is aoti.export_aoti  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"module 'gemma4\.export' has no attribute 'nothing'"):
        _ = gemma4.export.nothing  # type: ignore[attr-defined]
