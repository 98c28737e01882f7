"""Metadata arrays of a GGUF file, decoded when read.

A vocabulary holds hundreds of thousands of strings, so opening a file only finds where each one ends. Both classes
own a copy of their bytes: they stay valid after the file is closed, truncated or replaced.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar, overload

from gemma4.quant.errors import MalformedError

T = TypeVar("T")

LENGTH_BYTES: Final = 8
"""A stored string is its length as uint64, then that many bytes."""


class LazyArray(Sequence[T], Generic[T]):
    """Read-only array, equal to any sequence that is no string and has the same items."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class LazyNumbers(LazyArray[T]):
    """Numbers of one struct code (`b B h H i I q Q f d` or `?`), little-endian; items are Python scalars."""

    __slots__ = ("_view",)

    def __init__(self, data: bytes, code: str) -> None:
        self._view: memoryview[T] = memoryview(data).cast(code)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self._view)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return list(self._view[index]) if isinstance(index, slice) else self._view[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._view)

    def __repr__(self) -> str:
        return f"<{len(self)} numbers of type {self._view.format!r}>"

    def __reduce__(self) -> tuple[type[LazyNumbers[T]], tuple[bytes, str]]:
        return type(self), (self._view.tobytes(), self._view.format)


class LazyStrings(LazyArray[str]):
    """Strings, decoded from UTF-8 on access; an item that is not UTF-8 raises MalformedError then.

    data: the array as stored. ends[i]: end of string i in `data`. path, key, offset: origin of `data`, for errors.
    """

    __slots__ = ("_data", "_ends", "_key", "_offset", "_path")

    def __init__(self, data: bytes, ends: array[int], path: Path, key: str, offset: int) -> None:
        self._data = data
        self._ends = ends
        self._path = path
        self._key = key
        self._offset = offset

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self._key}: index {index} of {len(self)} strings")
        start = LENGTH_BYTES + (self._ends[index - 1] if index else 0)
        try:
            return self._data[start : self._ends[index]].decode()
        except UnicodeDecodeError as error:
            raise self._not_utf8(start, error) from error

    def __iter__(self) -> Iterator[str]:
        data, start = self._data, LENGTH_BYTES
        try:
            for end in self._ends:
                yield data[start:end].decode()
                start = end + LENGTH_BYTES
        except UnicodeDecodeError as error:
            raise self._not_utf8(start, error) from error

    def __repr__(self) -> str:
        return f"<{len(self)} strings>"

    def _not_utf8(self, start: int, error: UnicodeDecodeError) -> MalformedError:
        return MalformedError(
            f"a string of this array is not UTF-8 ({error.reason}); convert the model again",
            path=self._path,
            field=self._key,
            offset=self._offset + start + error.start,
        )
