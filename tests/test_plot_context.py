"""The plots of the documentation can be made from its figures."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest

from benchmarks import plot_context
from benchmarks.headers import read_header
from gemma4.config import CacheKind
from gemma4.memory_plan import MemoryModel

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = sorted((DOCS / "data").glob("end_to_end_*.json"))


def lines(plot: Any) -> dict[str, dict[float, float]]:
    """What is drawn: label to points."""
    header = read_header("31B", "Q4_K_M")
    models = {kind: MemoryModel(*header, kind) for kind in CacheKind}
    figure, axes = plt.subplots()
    try:
        plot(axes, models, [json.loads(path.read_text()) for path in RESULTS])
        drawn = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}
        return {label: dict(points) for label, points in drawn.items()}
    finally:
        plt.close(figure)


def test_decoding_lies_between_llama_cpp_and_the_floor() -> None:
    drawn = lines(plot_context.plot_decode)
    for kind in (CacheKind.LOSSLESS, CacheKind.TURBOQUANT):
        ours, floor = drawn[f"gemma4-gguf, {kind} cache"], drawn[f"{kind}: every byte at copy bandwidth"]
        assert ours.keys() == floor.keys()
        for context, speed in ours.items():
            assert speed < floor[context]
            assert speed > drawn["llama.cpp, F16 cache"].get(context, 0)


def test_planned_memory_grows_and_meets_what_was_measured() -> None:
    drawn = lines(plot_context.plot_memory)
    for kind in CacheKind:
        planned = drawn[f"{kind} cache, planned"]
        assert all(a < b for a, b in pairwise(planned.values()))
        for context, used in drawn.get(f"{kind} cache, measured", {}).items():
            assert used == pytest.approx(planned[context], rel=0.01)


def test_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_context", str(tmp_path), *map(str, RESULTS)])
    plot_context.main()
    made = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in made] == ["decode_context.svg", "memory_context.svg"]
    assert all(ElementTree.parse(path).getroot().tag.endswith("}svg") for path in made)
