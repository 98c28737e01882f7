"""The progress bar: nothing for a pipe, a bar for a terminal, whatever the file is called."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from gemma4.progress import progress_bar

SHOW = """
import sys
from concurrent.futures import ThreadPoolExecutor
from gemma4.progress import progress_bar
with progress_bar(sys.argv[1], 50_000_000) as progress, ThreadPoolExecutor(4) as pool:
    list(pool.map(progress, [2_000_000] * 25))
"""


def on_a_terminal(title: str) -> str:
    """What a terminal of 100 columns is sent on stderr."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, title], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    out, _ = process.communicate(timeout=30)
    text = b"".join(chunks).decode()
    assert process.returncode == 0, text
    assert out == b""
    return text


def test_a_pipe_is_sent_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW, "loading x"], capture_output=True, check=True)
    assert done.stdout == b""
    assert done.stderr == b""


def test_a_terminal_is_shown_a_bar() -> None:
    text = on_a_terminal("loading model.gguf")
    assert "loading model.gguf" in text
    assert "50.0/50.0 MB" in text
    assert text.count("\x1b[2K") > 1, "the bar is wiped in the end"


@pytest.mark.parametrize("name", ["a[/b].gguf", "a[red].gguf"])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(name: str) -> None:
    assert f"loading {name}" in on_a_terminal(f"loading {name}")


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    assert "loading a\\x1b]0;title\\x07" in on_a_terminal("loading a\x1b]0;title\x07")


def test_without_a_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar("loading", 10) as progress:
        progress(10)


def test_an_error_inside_passes_through() -> None:
    with pytest.raises(KeyError), progress_bar("loading", 10):
        raise KeyError("inside")
