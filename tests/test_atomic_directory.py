"""A directory is there whole or not at all; what killed writers leave is removed by the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4.quant.atomic_directory import atomic_directory
from gemma4.quant.atomic_write import FileUnwritableError

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(target: Path) -> None:
    with atomic_directory(target) as folder:
        (folder / "a").write_text("whole")
        assert not target.exists() or not names(target)


def test_the_directory_appears_at_the_end(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "whole"
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert names(tmp_path / "empty") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "a").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_what_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for name in ("file", "full"):
        with pytest.raises(FileUnwritableError, match="exists already") as caught:
            make(tmp_path / name)
        assert caught.value.path == tmp_path / name
    assert names(tmp_path / "full") == ["mine"]


def test_errors_of_the_system_are_typed(tmp_path: Path) -> None:
    with pytest.raises(FileUnwritableError, match="cannot write"):
        make(tmp_path / "absent" / "out")
    with pytest.raises(FileUnwritableError, match="cannot write"), atomic_directory(tmp_path / "out"):
        raise OSError(28, os.strerror(28))
    assert names(tmp_path) == []


def test_a_killed_writers_directory_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom gemma4.quant.atomic_directory import atomic_directory\n"
        f"with atomic_directory({str(tmp_path / 'out')!r}) as folder:\n"
        "    (folder / 'half').touch()\n    print('begun', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        (left,) = names(tmp_path)
        make(tmp_path / "out")  # the other one is alive, so its directory stays
        assert names(tmp_path) == [left, "out"]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert names(tmp_path) == [left, "out"]
    (tmp_path / "out" / "a").unlink()
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]
