"""Atomic writing: a path holds the old content or the new, through errors, signals and concurrent writers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma4.quant.atomic_write import FileUnwritableError, atomic_write
from gemma4.quant.errors import Gemma4Error, MetadataError

REPOSITORY = Path(__file__).parents[1]

STUCK_WRITER = """
import sys, time
from gemma4.quant.atomic_write import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stuck_writer(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_WRITER, str(target)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_new_content_appears_at_the_end_of_the_block(target: Path) -> None:
    with atomic_write(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["weights.bin"]


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), MetadataError("x")])
def test_an_exception_in_the_block_leaves_everything_as_it_was(target: Path, error: BaseException) -> None:
    def fail() -> None:
        with atomic_write(target) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["weights.bin"]


def test_a_full_disk_is_a_typed_error(target: Path) -> None:
    with pytest.raises(FileUnwritableError, match="No space left") as caught, atomic_write(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert isinstance(caught.value, Gemma4Error)
    assert (caught.value.errno, caught.value.path, caught.value.code) == (errno.ENOSPC, target, "file_unwritable")
    assert target.read_bytes() == b"old"
    assert names(target.parent) == ["weights.bin"]


def test_a_missing_folder_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(FileUnwritableError, match="No such file"), atomic_write(tmp_path / "absent" / "a"):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_only_regular_files_are_replaced(tmp_path: Path, make: object) -> None:
    make(tmp_path / "a")  # type: ignore[operator]
    with pytest.raises(FileUnwritableError, match="not a regular file"), atomic_write(tmp_path / "a"):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["a"]


def test_a_symbolic_link_stays_one(target: Path) -> None:
    link = target.parent / "link"
    link.symlink_to(target.name)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_file_and_folder_are_synced_around_the_rename(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        calls.append("fsync folder" if is_folder else "fsync file")
        fsync(descriptor)

    def recording_replace(source: str, destination: str) -> None:
        calls.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    with atomic_write(target) as file:
        file.write(b"new")
    assert calls == ["fsync file", "replace", "fsync folder"]


def test_a_killed_writer_leaves_the_old_content_and_the_next_one_cleans_up(target: Path) -> None:
    with stuck_writer(target) as process:
        process.send_signal(signal.SIGKILL)
    assert target.read_bytes() == b"old"
    assert len(names(target.parent)) == 2
    with atomic_write(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["weights.bin"]


def test_the_temporary_file_of_a_living_writer_is_left_alone(target: Path) -> None:
    (target.parent / ".other.bin.12345678.partial").touch()
    with stuck_writer(target) as process:
        with atomic_write(target) as file:
            file.write(b"new")
        assert len(names(target.parent)) == 3
        process.kill()
    with atomic_write(target) as file:
        file.write(b"newer")
    assert names(target.parent) == [".other.bin.12345678.partial", "weights.bin"]
