"""Write GGUF files byte by byte, well formed or broken on purpose. Shares no code with the reader under test.

    RawGGUF(keys=[("general.name", string("x"))], tensors=[RawTensor("w", (32, 2), Q8_0, bytes(68))]).build()

Every count, length, type and offset can be overridden with a lie; `layout()` lists where each of them lies.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
CODES = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}


class Value(NamedTuple):
    """A metadata value: its type id and its stored bytes."""

    type_id: int
    payload: bytes


class Field(NamedTuple):
    """One number of the header: where, how wide in bytes, and what it says."""

    offset: int
    width: int
    role: str


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A stored string: uint64 length (or a lie), then the bytes."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def number(type_id: int, value: float) -> Value:
    return Value(type_id, struct.pack("<" + CODES[type_id], value))


def string(value: str | bytes, length: int | None = None) -> Value:
    return Value(STRING, text(value, length))


def numbers(type_id: int, values: Sequence[float], count: int | None = None) -> Value:
    head = struct.pack("<IQ", type_id, len(values) if count is None else count)
    return Value(ARRAY, head + struct.pack(f"<{len(values)}{CODES[type_id]}", *values))


def strings(values: Sequence[str | bytes], count: int | None = None) -> Value:
    head = struct.pack("<IQ", STRING, len(values) if count is None else count)
    return Value(ARRAY, head + b"".join(text(v) for v in values))


def nested(values: Sequence[Value], count: int | None = None) -> Value:
    head = struct.pack("<IQ", ARRAY, len(values) if count is None else count)
    return Value(ARRAY, head + b"".join(v.payload for v in values))


@dataclass
class RawTensor:
    """dims in ggml order. offset: from the start of the data; by default where the previous tensor's padding ends."""

    name: str | bytes
    dims: tuple[int, ...]
    type_id: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None
    name_length: int | None = None


@dataclass
class RawGGUF:
    keys: list[tuple[str | bytes, Value]] = field(default_factory=list)
    tensors: list[RawTensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    key_count: int | None = None
    tensor_count: int | None = None
    tail: bytes = b""

    def build(self) -> bytes:
        header, _ = self._header()
        if not self.tensors:
            return header + self.tail
        data = bytearray()
        for tensor, offset in zip(self.tensors, self._offsets(), strict=True):
            if tensor.offset is None:
                data.extend(bytes(offset - len(data)))
                data.extend(tensor.data)
        data.extend(bytes(-len(data) % self.alignment))
        return header + bytes(-len(header) % self.alignment) + bytes(data) + self.tail

    def layout(self) -> list[Field]:
        return self._header()[1]

    def _offsets(self) -> list[int]:
        offsets, end = [], 0
        for tensor in self.tensors:
            start = end + -end % self.alignment
            offsets.append(start if tensor.offset is None else tensor.offset)
            if tensor.offset is None:
                end = start + len(tensor.data)
        return offsets

    def _header(self) -> tuple[bytes, list[Field]]:
        out, fields = bytearray(self.magic), []

        def put(role: str, code: str, value: int) -> None:
            raw = struct.pack("<" + code, value)
            fields.append(Field(len(out), len(raw), role))
            out.extend(raw)

        put("version", "I", self.version)
        put("tensor count", "Q", len(self.tensors) if self.tensor_count is None else self.tensor_count)
        put("key count", "Q", len(self.keys) if self.key_count is None else self.key_count)
        for key, value in self.keys:
            raw = key.encode() if isinstance(key, str) else key
            put("key length", "Q", len(raw))
            out.extend(raw)
            put("value type", "I", value.type_id)
            if value.type_id == ARRAY:
                fields.append(Field(len(out), 4, "element type"))
                fields.append(Field(len(out) + 4, 8, "array length"))
                if value.payload[:4] == struct.pack("<I", STRING):
                    fields.append(Field(len(out) + 12, 8, "string length"))
            elif value.type_id == STRING:
                fields.append(Field(len(out), 8, "string length"))
            out.extend(value.payload)
        for tensor, offset in zip(self.tensors, self._offsets(), strict=True):
            raw = tensor.name.encode() if isinstance(tensor.name, str) else tensor.name
            put("name length", "Q", len(raw) if tensor.name_length is None else tensor.name_length)
            out.extend(raw)
            put("dimension count", "I", len(tensor.dims) if tensor.n_dims is None else tensor.n_dims)
            for dim in tensor.dims:
                put("dimension", "Q", dim)
            put("tensor type", "I", tensor.type_id)
            put("tensor offset", "Q", offset)
        return bytes(out), fields


def control() -> RawGGUF:
    """A small valid file with every kind of value and several tensor types."""
    return RawGGUF(
        keys=[
            ("general.architecture", string("gemma4")),
            ("general.alignment", number(UINT32, 32)),
            ("gemma4.block_count", number(UINT32, 2)),
            ("gemma4.eps", number(FLOAT32, 0.5)),
            ("flag", number(BOOL, True)),
            ("tokenizer.ggml.tokens", strings(["<pad>", "", "▁the", "é\0é"])),
            ("tokenizer.ggml.scores", numbers(FLOAT32, [0.0, -1.0, 2.5, float("inf")])),
            ("pattern", numbers(BOOL, [True, False, True])),
            ("matrix", nested([numbers(INT16, [1, -2]), strings(["a", "b"])])),
        ],
        tensors=[
            RawTensor("token_embd.weight", (32, 3), Q8_0, bytes(range(102))),
            RawTensor("output_norm.weight", (5,), F32, bytes(range(20))),
            RawTensor("blk.0.attn_q.weight", (64, 2), Q4_0, bytes(range(72))),
        ],
    )


def pack(layout: str, *values: int) -> bytes:
    """struct.pack, little-endian."""
    return struct.pack("<" + layout, *values)
