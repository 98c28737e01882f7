"""Write a file so that its path always holds either the old content or the new, whole.

The content goes to a temporary file beside the target, is synced to the disk, and then takes the target's name. A
writer that is killed leaves its temporary file behind; the next one for the same target removes it. Temporaries of
living writers are known by the lock they hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, ClassVar

from gemma4.quant.errors import FileUnreadableError, Gemma4Error

__all__ = ["FileUnwritableError", "atomic_write"]


class FileUnwritableError(FileUnreadableError):
    """The operating system refuses to write the file. `errno` holds its reason."""

    code: ClassVar[str] = "file_unwritable"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new binary file that becomes `path` when the block ends, and vanishes when the block raises.

    A symbolic link is followed, not replaced. Raises FileUnwritableError where the target is not a regular file, and
    for every OSError in the block; then an existing target is untouched.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FileUnwritableError("is not a regular file", path=path, os_errno=errno.EINVAL)
    try:
        _remove_orphans(target)
        with _create_locked(target) as file:
            temporary = Path(file.name)
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_directory(target.parent)
    except Gemma4Error:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileUnwritableError(f"cannot write: {reason}", path=path, os_errno=error.errno or errno.EIO) from error


def _create_locked(target: Path) -> BinaryIO:
    while True:
        file = open(_prefix(target) + secrets.token_hex(4) + _SUFFIX, "xb")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        # Before the lock was held another writer may have taken the file for an orphan.
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _remove_orphans(target: Path) -> None:
    with os.scandir(target.parent) as entries:
        paths = [os.path.join(target.parent, entry.name) for entry in entries]
    for path in paths:
        if path.startswith(_prefix(target)) and path.endswith(_SUFFIX):
            with open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.unlink(path)


def _prefix(target: Path) -> str:
    return os.path.join(target.parent, f".{target.name}.")


_SUFFIX = ".partial"


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
