"""What ExecuTorch's CUDA backend is given for a method: the key of its library, and where each weight lies.

The format is version 3 of the one that `executorch.backends.cuda.cuda_weight_collector` writes (ExecuTorch 1.5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma4.quant.errors import MalformedError

MAGIC: Final = b"ETCUDAFQN3"


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """name: in the exported module. key: of its bytes in the data file. offset, sizes, strides: in items, not bytes."""

    name: str
    key: str
    nbytes: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CudaMethod:
    """library: key of the shared library among the program's named data."""

    library: str
    weights: tuple[CudaWeight, ...]

    @classmethod
    def parse(cls, payload: memoryview, path: Path | None = None) -> CudaMethod:
        """payload: what the backend is given. path: named in errors. Raises MalformedError."""
        if bytes(payload[: len(MAGIC)]) != MAGIC:
            raise MalformedError(f"found {bytes(payload[: len(MAGIC)])!r}, expected {MAGIC!r}", path=path)
        try:
            reader = _Reader(payload, len(MAGIC))
            library = reader.text()
            (count,) = reader.numbers("<I")
            return cls(library, tuple(reader.weight() for _ in range(count)))
        except (struct.error, UnicodeDecodeError) as error:
            raise MalformedError(f"the CUDA backend's data is broken: {error}", path=path) from error


@dataclass(slots=True)
class _Reader:
    data: memoryview
    at: int

    def numbers(self, kind: str) -> tuple[int, ...]:
        values = struct.unpack_from(kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return values

    def text(self) -> str:
        (size,) = self.numbers("<I")
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8")

    def weight(self) -> CudaWeight:
        name, key = self.text(), self.text()
        nbytes, _dtype, _device, offset, dims = self.numbers("<QiiqI")
        return CudaWeight(name, key, nbytes, offset, self.numbers(f"<{dims}q"), self.numbers(f"<{dims}q"))
