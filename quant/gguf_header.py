"""Parse the header of one GGUF file: version, metadata, and the table of tensors as written.

Layout (all little-endian): "GGUF", version u32, tensor count u64, key count u64; per key a string, a value type u32
and the value; per tensor a name, dimension count u32, dimensions u64 (fastest first), type u32, offset u64 from the
start of the data. Source: the GGUF specification in ggml's `docs/gguf.md`, versions 2 and 3.

Every count and length is checked against the bytes that are left before anything is allocated for it.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from gemma4.quant.errors import Gemma4Error, MalformedError, TruncatedError, UnsupportedFeatureError
from gemma4.quant.gguf_arrays import LENGTH_BYTES, LazyNumbers, LazyStrings

MetadataValue: TypeAlias = "str | int | float | bool | Sequence[MetadataValue]"

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_DIMS: Final = 4
INT64_MAX: Final = 2**63 - 1
ALIGNMENT_KEY: Final = "general.alignment"
DEFAULT_ALIGNMENT: Final = 32

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_COUNTS: Final = struct.Struct("<QQ")
_TENSOR_TAIL: Final = tuple(struct.Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1))
_MIN_KEY_BYTES: Final = 14
_MIN_TENSOR_BYTES: Final = 25
_MIN_ARRAY_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class Limits:
    """What a header may ask for before it is refused. The defaults are far above any published model."""

    max_header_bytes: int = 512 << 20
    max_string_bytes: int = 64 << 20
    max_name_bytes: int = 65_535
    max_keys: int = 65_536
    max_tensors: int = 262_144
    max_array_strings: int = 1 << 23
    max_nested_arrays: int = 65_536
    max_array_depth: int = 4
    max_alignment: int = 65_536


class ValueType(IntEnum):
    """Type id of a metadata value as stored."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_NUMBERS: Final[dict[int, struct.Struct]] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}


class TensorEntry(NamedTuple):
    """One row of the tensor table, as written. dims: ggml order. offset: from the start of the data. at: its byte."""

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int
    at: int


@dataclass(frozen=True, slots=True)
class Header:
    """end_bytes: size of the header; the data starts at the next multiple of `alignment`."""

    version: int
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    end_bytes: int


class _Cursor:
    """A position in the mapped file that never reads past the end and names what it was reading."""

    def __init__(self, data: mmap.mmap, path: Path, limits: Limits) -> None:
        self.data = data
        self.path = path
        self.limits = limits
        self.size = len(data)
        self.end = min(self.size, limits.max_header_bytes)
        self.pos = 0
        self.field = "magic"
        self.strings_left = limits.max_array_strings
        self.arrays_left = limits.max_nested_arrays

    def malformed(self, message: str, at: int) -> MalformedError:
        return MalformedError(message, path=self.path, field=self.field, offset=at)

    def need(self, count: int, what: str) -> None:
        if count > self.end - self.pos:
            raise self.short(count, what, self.pos)

    def short(self, count: int, what: str, at: int) -> Gemma4Error:
        needed = at + count
        if needed > INT64_MAX:
            return self.malformed(f"{what} claims {count} bytes, more than any file has: the header is damaged", at)
        if needed <= self.size:
            limit = self.limits.max_header_bytes
            return self.malformed(f"{what} runs to byte {needed}, past the header limit of {limit} bytes", at)
        return TruncatedError(
            f"{what} needs {count} bytes up to byte {needed}, but the file has {self.size} bytes: "
            "the download or copy was cut short, or the header is damaged; fetch the file again",
            path=self.path,
            field=self.field,
            offset=at,
        )

    def number(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        self.need(layout.size, what)
        values: tuple[int, ...] = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return values

    def string(self, what: str, limit: int) -> str:
        at = self.pos
        (length,) = self.number(_U64, f"the length of {what}")
        if length > limit:
            raise self.malformed(f"{what} has {length} bytes, expected at most {limit}", at)
        self.need(length, what)
        raw = self.data[self.pos : self.pos + length]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            where = self.pos + error.start
            raise self.malformed(f"{what} is not UTF-8 ({error.reason}); convert the model again", where) from error
        self.pos += length
        return text

    def name(self, what: str) -> str:
        at = self.pos
        text = self.string(what, self.limits.max_name_bytes)
        if not text:
            raise self.malformed(f"{what} is empty", at)
        if "\0" in text:
            raise self.malformed(f"{what} contains a NUL byte", at)
        return text


def parse_header(data: mmap.mmap, path: Path, limits: Limits) -> Header:
    """Read everything before the tensor data. `data` is the whole file and starts with the magic.

    Raises TruncatedError, MalformedError, or UnsupportedFeatureError (byte order or version).
    """
    cursor = _Cursor(data, path, limits)
    cursor.pos = len(MAGIC)
    version = _version(cursor)
    counts_at = cursor.pos
    cursor.field = "header"
    tensor_count, key_count = cursor.number(_COUNTS, "the tensor and key counts")
    _check_count(cursor, "metadata keys", key_count, limits.max_keys, _MIN_KEY_BYTES, counts_at + 8)
    _check_count(cursor, "tensors", tensor_count, limits.max_tensors, _MIN_TENSOR_BYTES, counts_at)
    alignment = DEFAULT_ALIGNMENT
    metadata: dict[str, MetadataValue] = {}
    for index in range(key_count):
        key_at = cursor.pos
        cursor.field = f"metadata key {index}"
        key = cursor.name("the key")
        cursor.field = key
        if key in metadata:
            raise cursor.malformed("this metadata key appears twice", key_at)
        value_at = cursor.pos
        (type_id,) = cursor.number(_U32, "the value type")
        metadata[key] = value = _value(cursor, key, type_id, value_at)
        if key == ALIGNMENT_KEY:
            alignment = _alignment(cursor, value, type_id, value_at)
    tensors = tuple(_tensor_entry(cursor, index) for index in range(tensor_count))
    return Header(version, metadata, tensors, alignment, cursor.pos)


def _version(cursor: _Cursor) -> int:
    at = cursor.pos
    cursor.field = "version"
    (version,) = cursor.number(_U32, "the format version")
    if version in VERSIONS:
        return version
    if version == 0:
        raise cursor.malformed("the version is 0: probably a download that never completed; fetch it again", at)
    if version & 0xFFFF == 0:
        found = "this is a big-endian GGUF file, expected little-endian; convert it with gguf-py's gguf-convert-endian"
    elif version < min(VERSIONS):
        found = f"this is GGUF version {version}, expected 2 or 3; convert the model again with a current llama.cpp"
    else:
        found = f"this is GGUF version {version}, expected 2 or 3: written by a newer tool, or damaged"
    raise UnsupportedFeatureError(found, path=cursor.path, field=cursor.field, offset=at)


def _check_count(cursor: _Cursor, what: str, count: int, limit: int, min_bytes: int, at: int) -> None:
    if count > limit:
        raise cursor.malformed(f"the header announces {count} {what}, expected at most {limit}", at)
    cursor.need(count * min_bytes, f"a header of {count} {what}")


def _alignment(cursor: _Cursor, value: MetadataValue, type_id: int, at: int) -> int:
    if type_id != ValueType.UINT32:
        raise cursor.malformed(f"the alignment has type {ValueType(type_id).name}, expected UINT32", at)
    assert isinstance(value, int)
    limit = cursor.limits.max_alignment
    if value.bit_count() != 1 or value > limit:
        raise cursor.malformed(f"the alignment is {value}, expected a power of two up to {limit}", at)
    return value


def _value(cursor: _Cursor, key: str, type_id: int, at: int) -> MetadataValue:
    if type_id == ValueType.STRING:
        return cursor.string("the value", cursor.limits.max_string_bytes)
    if type_id == ValueType.ARRAY:
        return _array(cursor, key, depth=1)
    layout = _NUMBERS.get(type_id)
    if layout is None:
        raise cursor.malformed(f"the value type is {type_id}, expected 0 to {max(ValueType)}", at)
    value_at = cursor.pos
    (value,) = cursor.number(layout, "the value")
    if type_id == ValueType.BOOL and cursor.data[value_at] > 1:
        raise cursor.malformed(f"a boolean is stored as {cursor.data[value_at]}, expected 0 or 1", value_at)
    return value


def _array(cursor: _Cursor, key: str, depth: int) -> Sequence[MetadataValue]:
    at = cursor.pos
    (type_id,) = cursor.number(_U32, "the array's element type")
    (count,) = cursor.number(_U64, "the array's length")
    if type_id == ValueType.STRING:
        return _string_array(cursor, key, count)
    if type_id == ValueType.ARRAY:
        return _nested_array(cursor, key, count, depth)
    layout = _NUMBERS.get(type_id)
    if layout is None:
        raise cursor.malformed(f"the array's element type is {type_id}, expected 0 to {max(ValueType)}", at)
    cursor.need(count * layout.size, f"an array of {count} values")
    start = cursor.pos
    cursor.pos = start + count * layout.size
    data = cursor.data[start : cursor.pos]
    if type_id == ValueType.BOOL and data.translate(None, b"\0\1"):
        raise cursor.malformed("an array of booleans holds bytes other than 0 and 1", start)
    return LazyNumbers(data, layout.format[1:])


def _nested_array(cursor: _Cursor, key: str, count: int, depth: int) -> Sequence[MetadataValue]:
    limits = cursor.limits
    if depth == limits.max_array_depth:
        raise cursor.malformed(f"arrays are nested deeper than {depth} levels", cursor.pos)
    if count > cursor.arrays_left:
        raise cursor.malformed(f"more than {limits.max_nested_arrays} nested arrays", cursor.pos)
    cursor.arrays_left -= count
    cursor.need(count * _MIN_ARRAY_BYTES, f"an array of {count} arrays")
    return tuple(_array(cursor, key, depth + 1) for _ in range(count))


def _string_array(cursor: _Cursor, key: str, count: int) -> LazyStrings:
    start = cursor.pos
    if count > cursor.strings_left:
        limit = cursor.limits.max_array_strings
        raise cursor.malformed(f"the arrays hold more than {limit} strings in all", start)
    cursor.strings_left -= count
    cursor.need(count * LENGTH_BYTES, f"an array of {count} strings")
    ends = array("I")
    # This loop is most of the time it takes to open a vocabulary: nothing but the walk belongs in it.
    with memoryview(cursor.data)[start : cursor.end] as window:
        room, length_at, append, pos = len(window), _U64.unpack_from, ends.append, 0
        try:
            for _ in repeat(None, count):
                pos += LENGTH_BYTES + length_at(window, pos)[0]
                append(pos)
        except (struct.error, OverflowError):
            pos = room + 1
    if pos > room:
        raise _string_past_end(cursor, ends, start)
    cursor.pos = start + pos
    return LazyStrings(cursor.data[start : cursor.pos], ends, cursor.path, key, start)


def _string_past_end(cursor: _Cursor, ends: array[int], start: int) -> Gemma4Error:
    room = cursor.end - start
    while ends and ends[-1] > room:
        ends.pop()
    cursor.pos = start + (ends[-1] if ends else 0)
    what = f"string {len(ends)} of the array"
    if cursor.end - cursor.pos < LENGTH_BYTES:
        return cursor.short(LENGTH_BYTES, f"the length of {what}", cursor.pos)
    (length,) = _U64.unpack_from(cursor.data, cursor.pos)
    return cursor.short(LENGTH_BYTES + length, what, cursor.pos)


def _tensor_entry(cursor: _Cursor, index: int) -> TensorEntry:
    at = cursor.pos
    cursor.field = f"tensor {index}"
    name = cursor.name("the name")
    cursor.field = name
    dims_at = cursor.pos
    (n_dims,) = cursor.number(_U32, "the number of dimensions")
    if n_dims > MAX_DIMS:
        raise cursor.malformed(f"the tensor has {n_dims} dimensions, expected at most {MAX_DIMS}", dims_at)
    *dims, type_id, offset = cursor.number(_TENSOR_TAIL[n_dims], "the tensor's shape, type and offset")
    return TensorEntry(name, tuple(dims), type_id, offset, at)
