"""One safetensors file: its header checked against its size, its tensors as views on a private map.

The format: a little-endian uint64, that many bytes of JSON (name -> dtype, shape, byte range), then the data.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from gemma4.quant.errors import FileMissingError, FileUnreadableError, MalformedError, TruncatedError

__all__ = ["ITEM_BYTES", "SafetensorsFile", "StoredTensor", "header_bytes"]

ITEM_BYTES: Final[Mapping[str, int]] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_MAX_HEADER_BYTES: Final = 100_000_000
_ALIGNMENT: Final = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """dtype: its name in the format. start, stop: absolute bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open file. path: as given. tensors: by name, in the order of the header. file_bytes: its size."""

    def __init__(self, path: Path, data: mmap.mmap, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.tensors = tensors
        self.file_bytes = len(data)
        self._map = data

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Raises FileMissingError, FileUnreadableError, TruncatedError or MalformedError."""
        data = _map_file(path)
        return cls(path, data, _read_header(path, data))

    def data(self, name: str) -> memoryview:
        """A writable copy-on-write view of one tensor's bytes."""
        tensor = self.tensors[name]
        if self._map.size() < tensor.stop:
            raise TruncatedError("the file was cut while open", path=self.path, field=name, offset=tensor.start)
        return memoryview(self._map)[tensor.start : tensor.stop]


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Length and header of a file that holds `tensors` (name -> dtype, shape) one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _map_file(path: Path) -> mmap.mmap:
    try:
        # Opening a FIFO would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileUnreadableError("is not a regular file", path=path, os_errno=errno.EINVAL)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise TruncatedError("the file is too short for a safetensors header", path=path)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise FileMissingError("there is no file at this path", path=path) from error
    except FileUnreadableError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileUnreadableError(
            f"cannot open or map: {reason}", path=path, os_errno=error.errno or errno.EIO
        ) from error


def _read_header(path: Path, data: mmap.mmap) -> dict[str, StoredTensor]:
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise MalformedError(f"a header of {length} bytes is announced: not a safetensors file", path=path, offset=0)
    if 8 + length > len(data):
        raise TruncatedError(f"the header needs {8 + length} bytes, the file has {len(data)}", path=path, offset=0)
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"the header is not JSON: {error}", path=path, offset=8) from error
    if not isinstance(header, dict):
        raise MalformedError("the header is no JSON object", path=path, offset=8)
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    last = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start < last:
            raise MalformedError("the tensor overlaps another", path=path, field=name, offset=tensor.start)
        if tensor.stop > len(data):
            raise TruncatedError(
                f"the tensor ends at byte {tensor.stop}, the file has {len(data)}: fetch it again",
                path=path,
                field=name,
                offset=tensor.start,
            )
        last = tensor.stop
    return tensors


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (fields.get(key, "") for key in ("dtype", "shape", "data_offsets"))
    has_lists = isinstance(shape, list) and isinstance(span, list) and len(span) == 2
    if dtype not in ITEM_BYTES or not has_lists or not all(map(is_count, [*shape, *span])):
        raise MalformedError(f"found {entry!r:.120}, expected dtype, shape and data_offsets", path=path, field=name)
    if span[1] - span[0] != prod(shape) * ITEM_BYTES[dtype]:
        message = f"{span[1] - span[0]} bytes are announced for {dtype} {shape}"
        raise MalformedError(message, path=path, field=name, offset=data_start + span[0])
    return StoredTensor(dtype, tuple(shape), data_start + span[0], data_start + span[1])
