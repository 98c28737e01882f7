"""Make a directory so that its path either does not exist or holds all of it.

The content goes to a temporary directory beside the target, is synced to the disk, and then takes the target's name. A
writer that is killed leaves its temporary directory behind; the next one for the same target removes it. Temporaries
of living writers are known by the lock they hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma4.quant.atomic_write import FileUnwritableError
from gemma4.quant.errors import Gemma4Error

__all__ = ["atomic_directory"]

_SUFFIX = ".partial"


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to fill, which becomes `path` when the block ends and vanishes when the block raises.

    Raises FileUnwritableError where `path` exists and is not an empty directory, and for every OSError in the block.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            message = "exists already; name a directory that does not, or is empty"
            raise FileUnwritableError(message, path=path, os_errno=errno.EEXIST)
        _remove_orphans(target)
        temporary, lock = _create_locked(target)
        try:
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(lock)
        _sync(target.parent)
    except Gemma4Error:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileUnwritableError(f"cannot write: {reason}", path=path, os_errno=error.errno or errno.EIO) from error


def _create_locked(target: Path) -> tuple[Path, int]:
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Before the lock was held another writer may have taken the directory for an orphan.
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_orphans(target: Path) -> None:
    for folder in target.parent.iterdir():
        if not folder.name.startswith(f".{target.name}.") or not folder.name.endswith(_SUFFIX) or not folder.is_dir():
            continue
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
