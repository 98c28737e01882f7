"""Reads what a 64-bit shared library of ELF needs and offers: libraries, undefined and defined dynamic symbols."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma4.quant.errors import MalformedError

_SECTION_DYNAMIC: Final = 6
_SECTION_DYNAMIC_SYMBOLS: Final = 11
_TAG_NEEDED: Final = 1
_BIND_WEAK: Final = 2


@dataclass(frozen=True, slots=True)
class SharedLibrary:
    """needed: names of libraries, in order. undefined: symbols that others must have, weak ones left out."""

    needed: tuple[str, ...]
    undefined: frozenset[str]
    defined: frozenset[str]

    @classmethod
    def parse(cls, data: memoryview, path: Path | None = None) -> SharedLibrary:
        """data: the file's content. path: named in errors. Raises MalformedError."""
        if bytes(data[:6]) != b"\x7fELF\x02\x01":
            raise MalformedError("is no 64-bit little-endian ELF file", path=path)
        try:
            return cls._parse(data)
        except (struct.error, IndexError, ValueError) as error:
            raise MalformedError(f"its sections contradict each other: {error}", path=path) from error

    @classmethod
    def _parse(cls, data: memoryview) -> SharedLibrary:
        table, size, count = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A)
        # Of each section: name, type, flags, address, offset, size, link, info, alignment, item size.
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
        needed: list[str] = []
        undefined: set[str] = set()
        defined: set[str] = set()
        for _, kind, _, _, offset, nbytes, link, _, _, _ in sections:
            if kind == _SECTION_DYNAMIC:
                for tag, value in struct.iter_unpack("<QQ", data[offset : offset + nbytes]):
                    if tag == _TAG_NEEDED:
                        needed.append(_text(data, sections[link][4] + value))
            elif kind == _SECTION_DYNAMIC_SYMBOLS:
                for name, info, _, section, _, _ in struct.iter_unpack("<IBBHQQ", data[offset : offset + nbytes]):
                    text = _text(data, sections[link][4] + name)
                    if section:
                        defined.add(text)
                    elif text and info >> 4 != _BIND_WEAK:
                        undefined.add(text)
        return cls(tuple(needed), frozenset(undefined), frozenset(defined))


def _text(data: memoryview, start: int) -> str:
    step = 256
    found = b""
    while b"\0" not in found:
        piece = bytes(data[start + len(found) : start + len(found) + step])
        if not piece:
            raise IndexError("a name has no end")
        found += piece
    return found[: found.index(b"\0")].decode()
