"""One GGUF file mapped into memory, or a typed error that says what lies at the path instead."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from gemma4.quant.errors import FileMissingError, FileUnreadableError, Gemma4Error, NotGGUFError, TruncatedError
from gemma4.quant.gguf_header import MAGIC, Header, Limits, parse_header

_log = logging.getLogger(__name__)

_HEAD_BYTES: Final = 4096
_PIECE_NAME: Final = re.compile(r"\.part\d+of\d+|\.part-?[a-z0-9]+$|-split-[a-z]+$")
# Without reserving swap, a file larger than the memory can still be mapped.
_MAP_FLAGS: Final = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)

_KNOWN_HEADS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"version https://git-lfs", "this is a git-LFS pointer, not the model it stands for: run `git lfs pull`"),
    (b"\x1f\x8b", "this is a gzip file: decompress it first"),
    (b"\xfd7zXZ\0", "this is an xz file: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "this is a zstandard file: decompress it first"),
    (b"BZh", "this is a bzip2 file: decompress it first"),
    (b"PK\3\4", "this is a zip archive or a PyTorch checkpoint: unpack it, or convert the model to GGUF"),
    (b"tjgg", "this is a GGJT file, from before GGUF: convert the model again with a current llama.cpp"),
    (b"fmgg", "this is a GGMF file, from before GGUF: convert the model again with a current llama.cpp"),
    (b"lmgg", "this is a GGML file, from before GGUF: convert the model again with a current llama.cpp"),
    (b"FUGG", "the magic is byte-swapped: this is a big-endian file, expected little-endian"),
    (b"{", "this is JSON text, often a server's error message saved as a file: download the model again"),
)


@dataclass(frozen=True, slots=True)
class GGUFPart:
    """A mapped file with its parsed header."""

    path: Path
    map: mmap.mmap
    header: Header

    @classmethod
    def open(cls, path: Path, limits: Limits) -> Self:
        """Map the file and parse its header. Raises as `GGUFFile.open` does, and never blocks."""
        mapped = _map_file(path)
        try:
            return cls(path, mapped, parse_header(mapped, path, limits))
        except Gemma4Error:
            mapped.close()
            raise

    @property
    def size(self) -> int:
        return len(self.map)

    @property
    def data_start(self) -> int:
        """Absolute byte where the tensor data begins."""
        return self.align(self.header.end_bytes)

    def align(self, offset: int) -> int:
        """The first multiple of the file's alignment at or after `offset`."""
        return -(-offset // self.header.alignment) * self.header.alignment

    def view(self, name: str, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes), which belong to tensor `name`, without a copy."""
        size = self.map.size()
        if size < offset + nbytes:
            raise TruncatedError(
                f"the file was cut to {size} bytes while open, but the tensor ends at byte {offset + nbytes}",
                path=self.path,
                field=name,
                offset=offset,
            )
        return memoryview(self.map)[offset : offset + nbytes]

    def close(self) -> None:
        """Unmap the file, or leave that to the last view when some are in use."""
        try:
            self.map.close()
        except BufferError:
            _log.debug("%s: closed while views on it exist", self.path)


def _map_file(path: Path) -> mmap.mmap:
    try:
        # Looking before opening: opening a device can have effects.
        _check_regular(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            _check_regular(path, status)
            _check_magic(path, os.pread(fd, _HEAD_BYTES, 0), status.st_size)
            return mmap.mmap(fd, status.st_size, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
    except Gemma4Error:
        raise
    except FileNotFoundError as error:
        raise FileMissingError("there is no file at this path", path=path) from error
    except OSError as error:
        message = f"cannot open or map the file: {error.strerror}"
        raise FileUnreadableError(message, path=path, os_errno=error.errno or errno.EIO) from error
    except ValueError as error:
        # A path no file can have (NUL, lone surrogate), or a file that shrank before it was mapped.
        raise FileUnreadableError(f"cannot open or map the file: {error}", path=path, os_errno=errno.EINVAL) from error


def _check_regular(path: Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    raise NotGGUFError(f"this is {kinds.get(stat.S_IFMT(mode), 'no regular file')}, expected a GGUF file", path=path)


def _check_magic(path: Path, head: bytes, size: int) -> None:
    if head.startswith(MAGIC):
        return
    if MAGIC.startswith(head):
        raise TruncatedError(
            f"the file has {size} bytes, a GGUF header needs at least 24: fetch the file again",
            path=path,
            field="magic",
            offset=0,
        )
    raise NotGGUFError(f"not a GGUF file: {_name_format(path, head, size)}", path=path, field="magic", offset=0)


def _name_format(path: Path, head: bytes, size: int) -> str:
    if not head.strip(b"\0"):
        return f"it begins with {len(head)} zero bytes, as a download does that never completed: fetch it again"
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<!--)", head.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE):
        return "this is an HTML page, often a login or error page saved in place of the model: download it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "this is a safetensors file: open its directory with Gemma4.from_pretrained"
    for start, cause in _KNOWN_HEADS:
        if head.startswith(start):
            return cause
    if _PIECE_NAME.search(path.name):
        return f"it starts with {head[:4]!r}, and its name is that of a raw piece: join all pieces in order first"
    return f"it starts with {head[:4]!r}, expected {MAGIC!r}"
