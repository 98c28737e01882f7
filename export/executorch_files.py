"""Reads ExecuTorch's files, mapped: programs (`.pte`) and data files (`.ptd`). Needs no ExecuTorch.

Both are a flatbuffer, with a header behind its file identifier that says where segments of raw data begin. Field
numbers are those of ExecuTorch's `program.fbs` and `flat_tensor.fbs`, whose fields are only ever added to.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma4.export.flatbuffer import Table
from gemma4.quant.errors import FileUnreadableError, MalformedError

_HEADER_OFFSET: Final = 8


@dataclass(frozen=True, slots=True)
class Delegate:
    """A part of a method that a backend runs. payload: what the backend is given."""

    backend: str
    payload: memoryview


@dataclass(frozen=True, slots=True)
class ProgramFile:
    """A `.pte`. delegates: by method, in order. named_data: blobs for backends, by key."""

    path: Path
    delegates: Mapping[str, Sequence[Delegate]]
    named_data: Mapping[str, memoryview]

    @classmethod
    def open(cls, path: str | Path) -> ProgramFile:
        """Raises FileUnreadableError or MalformedError."""
        path = Path(path)
        data = _mapped(path)
        _, segment_base = _header(path, data, b"eh00", "<QQ")
        try:
            program = Table.root(data)
            segments = _segments(data, program.tables(4), segment_base)
            inline = [table.bytes(0) for table in program.tables(3)]
            delegates = {
                plan.text(0): [_delegate(table, inline, segments) for table in plan.tables(7)]
                for plan in program.tables(1)
            }
            named_data = {table.text(0): segments[table.uint32(1)] for table in program.tables(7)}
        except (IndexError, struct.error, UnicodeDecodeError) as error:
            raise MalformedError(f"is no ExecuTorch program: {error}", path=path) from error
        return cls(path, delegates, named_data)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A `.ptd`: blobs by key."""

    path: Path
    blobs: Mapping[str, memoryview]

    @classmethod
    def open(cls, path: str | Path) -> DataFile:
        """Raises FileUnreadableError or MalformedError."""
        path = Path(path)
        data = _mapped(path)
        _, _, segment_base = _header(path, data, b"FH01", "<QQQ")
        try:
            root = Table.root(data)
            segments = _segments(data, root.tables(1), segment_base)
            blobs = {table.text(0): segments[table.uint32(1)] for table in root.tables(2)}
        except (IndexError, struct.error, UnicodeDecodeError) as error:
            raise MalformedError(f"is no ExecuTorch data file: {error}", path=path) from error
        return cls(path, blobs)


def _mapped(path: Path) -> memoryview:
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise FileUnreadableError(str(error.strerror), path=path, os_errno=error.errno or 0) from error
    except ValueError as error:
        raise MalformedError("the file is empty", path=path) from error


def _header(path: Path, data: memoryview, magic: bytes, fields: str) -> tuple[int, ...]:
    """The numbers that follow the header's magic and its length."""
    at = _HEADER_OFFSET
    found = bytes(data[at : at + len(magic)])
    if found != magic:
        raise MalformedError(f"found {found!r}, expected the header {magic!r}", path=path, offset=at)
    try:
        return struct.unpack_from(fields, data, at + len(magic) + 4)
    except struct.error as error:
        raise MalformedError("ends within its header", path=path, offset=at) from error


def _segments(data: memoryview, tables: Sequence[Table], base: int) -> list[memoryview]:
    spans = [(base + table.uint64(0), table.uint64(1)) for table in tables]
    for start, size in spans:
        if start + size > len(data):
            raise IndexError(f"a segment ends at byte {start + size} of {len(data)}")
    return [data[start : start + size] for start, size in spans]


def _delegate(table: Table, inline: Sequence[memoryview], segments: Sequence[memoryview]) -> Delegate:
    reference = table.table(1)
    is_segment, index = reference.int8(0), reference.uint32(1)
    return Delegate(table.text(0), (segments if is_segment else inline)[index])
