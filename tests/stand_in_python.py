"""A shell script in place of Python, for what this library starts in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def stand_in_python(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> Path:
    """Returns where in `folder` the script is written."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path
