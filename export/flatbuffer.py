"""Reads tables of a flatbuffer by field number (flatbuffers.dev, "Internals"): offsets only, no schema."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Table:
    """A table that starts at byte `start` of `data`. Broken offsets raise struct.error or IndexError."""

    data: memoryview
    start: int

    @classmethod
    def root(cls, data: memoryview) -> Self:
        return cls(data, _uint32(data, 0))

    def text(self, field: int) -> str:
        """A string; "" where the field is absent."""
        return str(self.bytes(field), "utf-8")

    def bytes(self, field: int) -> memoryview:
        """A string or a vector of bytes; empty where the field is absent."""
        at = self._reference(field)
        if at is None:
            return self.data[:0]
        size = _uint32(self.data, at)
        if at + 4 + size > len(self.data):
            raise IndexError(f"a vector ends at byte {at + 4 + size} of {len(self.data)}")
        return self.data[at + 4 : at + 4 + size]

    def table(self, field: int) -> Table:
        at = self._reference(field)
        if at is None:
            raise IndexError(f"field {field} of the table at byte {self.start} is absent")
        return Table(self.data, at)

    def tables(self, field: int) -> list[Table]:
        """A vector of tables; empty where the field is absent."""
        at = self._reference(field)
        if at is None:
            return []
        items = range(at + 4, at + 4 + 4 * _uint32(self.data, at), 4)
        return [Table(self.data, item + _uint32(self.data, item)) for item in items]

    def int8(self, field: int) -> int:
        return self._number(field, "<b")

    def uint32(self, field: int) -> int:
        return self._number(field, "<I")

    def uint64(self, field: int) -> int:
        return self._number(field, "<Q")

    def _number(self, field: int, kind: str) -> int:
        """0, the default of every number this library reads, where the field is absent."""
        at = self._field(field)
        return 0 if at is None else int(struct.unpack_from(kind, self.data, at)[0])

    def _reference(self, field: int) -> int | None:
        at = self._field(field)
        return None if at is None else at + _uint32(self.data, at)

    def _field(self, field: int) -> int | None:
        vtable = self.start - struct.unpack_from("<i", self.data, self.start)[0]
        entry = 4 + 2 * field
        if entry >= struct.unpack_from("<H", self.data, vtable)[0]:
            return None
        offset: int = struct.unpack_from("<H", self.data, vtable + entry)[0]
        return self.start + offset if offset else None


def _uint32(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])
