"""Writes whole Gemma 4 GGUF files with random but sane weights, for timing: the 31B in Q4_K_M in seconds.

usage: python benchmarks/synthesize.py OUT [--layers 60] [--tiny]

The header comes from `tests.family_gguf`. Vectors are random; the blocks of all other tensors repeat one pool per type,
which ggml's own encoder made of normally distributed weights, so time is that of the disk and memory stays small.
A file that is there already is written in place: the memory that it holds in a tmpfs need not be found anew.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import libgguf
import numpy as np
from gguf import GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, too

from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile
from tests.family_gguf import quantize
from tests.tiny_gguf import GEMMA4_31B, Model, Sizes, gemma4

POOL_SHAPE = (256, 4096)
PIECE_BYTES = 32 << 20


def gemma4_31b(layers: int) -> Model:
    return quantize(gemma4(GEMMA4_31B, layers=layers), "Q4_K_M")


def tiny(layers: int) -> Model:
    """Shapes of a few megabytes."""
    sizes = Sizes(layers, 256, 512, 4, (2, 1), (64, 128), vocab=2048, window=64)
    return quantize(gemma4(sizes), "Q4_K_M")


def write(path: Path, model: Model) -> Path:
    """Writes the whole file and returns its path."""
    with _header_of(model) as (header, head), _opened(path) as fd:
        os.ftruncate(fd, header.file_bytes)
        _write(fd, 0, [memoryview(head)])
        for name, info in header.tensors.items():
            vector = info.type is GGMLType.F32
            blocks = model.encoded(name).data.cast("B") if vector else random_blocks(info.type)
            _fill(fd, info.offset, info.nbytes, blocks)
    return path


def write_header(path: Path, model: Model) -> Path:
    """Makes a file of at least the model's size the model's: its end is cut off, all weights are what is there."""
    with _header_of(model) as (header, head), _opened(path) as fd:
        if os.fstat(fd).st_size < header.file_bytes:
            raise ValueError(f"{path}: found {os.fstat(fd).st_size} bytes, expected {header.file_bytes} or more")
        os.ftruncate(fd, header.file_bytes)
        _write(fd, 0, [memoryview(head)])
    return path


def write_random_bytes(path: Path, nbytes: int) -> Path:
    """A file of bytes 0 to 63, which are finite weights in every type: no exponent comes near its end."""
    piece = memoryview(np.random.default_rng(0).integers(0, 64, PIECE_BYTES, dtype=np.uint8).data)
    with _opened(path) as fd, ThreadPoolExecutor(8) as pool:
        os.ftruncate(fd, nbytes)
        starts = range(0, nbytes, PIECE_BYTES)
        list(pool.map(lambda start: _write(fd, start, [piece[: nbytes - start]]), starts))
    return path


@contextmanager
def _header_of(model: Model) -> Iterator[tuple[GGUFFile, bytes]]:
    """The model's header, read, and its bytes up to the weights."""
    with TemporaryDirectory() as folder, GGUFFile.open(model.write_sparse(Path(folder) / "header.gguf")) as header:
        begin = min(info.offset for info in header.tensors.values())
        with header.path.open("rb") as file:
            head = file.read(begin)
        yield header, head


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@functools.cache
def random_blocks(kind: GGMLType) -> memoryview:
    """Bytes of blocks whose weights have a standard deviation of 1/64, which suits rows of a few thousand."""
    weights = np.random.default_rng(0).standard_normal(POOL_SHAPE, dtype=np.float32) / np.float32(64)
    blocks: np.ndarray = libgguf.quantize_rows(weights, GGMLQuantizationType(kind).value)
    return blocks.view(np.uint8).data.cast("B")


def _fill(fd: int, offset: int, nbytes: int, pool: memoryview) -> None:
    """Repeats `pool` from `offset` on, `nbytes` in all."""
    step = max(1, PIECE_BYTES // len(pool)) * len(pool)
    for done in range(0, nbytes, step):
        whole, rest = divmod(min(step, nbytes - done), len(pool))
        _write(fd, offset + done, [pool] * whole + [pool[:rest]])


def _write(fd: int, offset: int, pieces: list[memoryview]) -> None:
    """Raises OSError, also where the disk is full in the middle."""
    expected = sum(map(len, pieces))
    if os.pwritev(fd, pieces, offset) != expected:
        raise OSError(f"found no room for {expected} bytes at {offset}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="shapes of a few megabytes")
    args = parser.parse_args()
    write(args.out, tiny(args.layers) if args.tiny else gemma4_31b(args.layers))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
