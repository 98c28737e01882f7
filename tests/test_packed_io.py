"""Packed weights on disk: exact, mapped, the same bytes every time, and no damage unnoticed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma4.quant.atomic_write import FileUnwritableError
from gemma4.quant.errors import (
    FileMissingError,
    FileUnreadableError,
    Gemma4Error,
    MalformedError,
    MetadataError,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
    UnsupportedFeatureError,
    UnsupportedTypeError,
)
from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType, row_bytes
from gemma4.quant.packed_io import load_packed, save_packed
from tests.format_checks import assert_same_planes

REPOSITORY = Path(__file__).parents[1]
TYPES = ("Q4_K", "F32", "Q5_K", "Q6_K", "Q8_0", "Q5_0", "BF16", "Q5_1", "Q4_0", "Q4_1", "F16")
METADATA = {"general.name": 'a "name" with ü and \\', "empty": "", "note": '"packed.crc32":"12345678"'}


def make(type_name: str, rows: int = 5, k: int = 512) -> QuantTensor:
    ggml_type = GGMLType[type_name]
    rng = np.random.default_rng(int(ggml_type))
    blocks = rng.integers(0, 256, (rows, row_bytes(ggml_type, k)), np.uint8)
    return container_for(ggml_type).from_blocks(torch.from_numpy(blocks), k)


def make_all() -> dict[str, QuantTensor]:
    return {f"blk.{i}.{name}::weight": make(name) for i, name in enumerate(TYPES)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    save_packed(path, make_all(), METADATA)
    return path


def test_round_trip_of_every_type(saved: Path) -> None:
    expected = make_all()
    tensors, metadata = load_packed(saved, "cpu", verify=True)
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert_same_planes(tensor, expected[name])
        assert torch.equal(tensor.to_blocks(), expected[name].to_blocks())
    assert metadata == METADATA
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_package_reads_the_same_planes(saved: Path) -> None:
    planes = load_file(saved)
    expected = {f"{n}::{p}": plane for n, t in make_all().items() for p, plane in t.planes_dict().items()}
    assert planes.keys() == expected.keys()
    for name, plane in expected.items():
        assert torch.equal(planes[name].view(torch.uint8), plane.view(torch.uint8))


def test_nothing_and_no_rows(tmp_path: Path) -> None:
    save_packed(tmp_path / "none", {}, {})
    assert load_packed(tmp_path / "none", "cpu", verify=True) == ({}, {})
    save_packed(tmp_path / "empty", {"a": make("Q6_K", rows=0), "b": make("Q4_0")}, {})
    tensors, _ = load_packed(tmp_path / "empty", "cpu", verify=True)
    assert tensors["a"].shape == (0, 512)
    assert_same_planes(tensors["b"], make("Q4_0"))


def test_views_and_repeated_tensors_are_saved_as_they_look(tmp_path: Path) -> None:
    whole = make("Q6_K", rows=9)
    parts = {"a": whole.slice_rows(0, 6), "b": whole.slice_rows(3, 9), "c": whole, "d": whole}
    save_packed(tmp_path / "a", parts, {})
    tensors, _ = load_packed(tmp_path / "a", "cpu")
    for name, part in parts.items():
        assert_same_planes(tensors[name], part)


def test_loading_maps_the_file_and_keeps_it(saved: Path) -> None:
    before = saved.read_bytes()
    tensors, _ = load_packed(saved, "cpu")
    assert str(saved) in Path("/proc/self/maps").read_text()
    for tensor in tensors.values():
        for plane in tensor.planes_dict().values():
            plane.zero_()
    assert saved.read_bytes() == before


def test_loading_to_a_device(saved: Path) -> None:
    tensors, _ = load_packed(saved, "meta")
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    with pytest.raises(ShapeError, match="meta device"):
        save_packed(saved, tensors, {})


@pytest.mark.gpu
def test_through_the_gpu(tmp_path: Path) -> None:
    save_packed(tmp_path / "a", {name: tensor.to("cuda") for name, tensor in make_all().items()}, METADATA)
    save_packed(tmp_path / "b", make_all(), METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors, _ = load_packed(tmp_path / "a", "cuda")
    for name, tensor in make_all().items():
        assert tensors[name].device.type == "cuda"
        assert_same_planes(tensors[name].to("cpu"), tensor)


def test_the_same_tensors_make_the_same_bytes_in_every_process(saved: Path) -> None:
    code = (
        "import sys; from tests.test_packed_io import *; save_packed(sys.argv[1], make_all(), METADATA);"
        "sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    )
    written = subprocess.run(
        [sys.executable, "-c", code, str(saved.parent / "other")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    assert written.stdout == saved.read_bytes()


# Damage


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, header, 150), *rng.integers(header, len(content), 100)]
    for place, bit in zip(places, rng.integers(0, 8, len(places)), strict=True):
        content[place] ^= 1 << bit
        saved.write_bytes(content)
        with pytest.raises(Gemma4Error) as caught:
            load_packed(saved, "cpu", verify=True)
        assert caught.value.path == saved
        content[place] ^= 1 << bit


def test_a_cut_or_grown_file_is_refused_without_verifying(saved: Path) -> None:
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(MalformedError, match="not a whole safetensors file"):
            load_packed(saved, "cpu")
    saved.write_bytes(content + b"\0")
    with pytest.raises(MalformedError, match="not a whole safetensors file"):
        load_packed(saved, "cpu")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>" * 50, b"\0" * 4096, b"version https://git-lfs" * 9])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(MalformedError) as caught:
        load_packed(tmp_path / "a", "cpu")
    assert caught.value.path == tmp_path / "a"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError):
        load_packed(tmp_path / "absent", "cpu")
    with pytest.raises(FileUnreadableError, match="not a regular file"):
        load_packed(tmp_path, "cpu")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileUnreadableError, match="not a regular file"):
        load_packed(tmp_path / "fifo", "cpu")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileUnreadableError, match="symbolic links"):
        load_packed(tmp_path / "loop", "cpu")


GOOD = {"packed.version": "1", "packed.types": '{"a": "Q8_0"}'}
QS, D = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.float16)


@pytest.mark.parametrize(
    ("metadata", "planes", "error", "field"),
    [
        ({}, {}, MetadataError, "packed.version"),
        ({"packed.version": "2"}, {}, UnsupportedFeatureError, "packed.version"),
        ({"packed.types": "{"}, {}, MetadataError, "packed.types"),
        ({"packed.types": "[" * 100_000}, {}, MetadataError, "packed.types"),
        ({"packed.types": "[]"}, {}, MetadataError, "packed.types"),
        ({"packed.types": '{"a": "Q9_9"}'}, {}, MetadataError, "packed.types"),
        ({"packed.types": '{"a": 8}'}, {}, MetadataError, "packed.types"),
        ({"packed.types": '{"a": "Q8_1"}'}, {}, UnsupportedTypeError, "a"),
        ({}, {"a::qs": QS}, MissingTensorError, "a"),
        ({}, {"a::qs": QS, "a::d": D, "a::m": D}, UnexpectedTensorError, "a::m"),
        ({}, {"a::qs": QS, "a::d": D, "b": D}, UnexpectedTensorError, "b"),
        ({}, {"a::qs": QS, "a::d": D.float()}, ShapeError, "a"),
        ({}, {"a::qs": QS, "a::d": D[:1]}, ShapeError, "a"),
        ({}, {"a::qs": QS[:, :48].contiguous(), "a::d": D}, ShapeError, "a"),
        ({}, {"a::qs": torch.zeros((), dtype=torch.int8), "a::d": D}, ShapeError, "a"),
    ],
)
def test_contents_that_contradict_themselves(
    tmp_path: Path,
    metadata: dict[str, str],
    planes: dict[str, torch.Tensor],
    error: type[Gemma4Error],
    field: str,
) -> None:
    written = GOOD | metadata if planes or metadata else {"format": "pt"}
    save_file({name: plane.clone() for name, plane in planes.items()}, tmp_path / "a", written)
    with pytest.raises(error) as caught:
        load_packed(tmp_path / "a", "cpu")
    assert (type(caught.value), caught.value.path, caught.value.field) == (error, tmp_path / "a", field)


# Refusals and failures of the writer


@pytest.mark.parametrize("metadata", [{"packed.version": "3"}, {"packed.mine": "x"}, {"a": 1}, {1: "a"}])
def test_unfit_metadata_is_refused_before_writing(saved: Path, metadata: dict[Any, Any]) -> None:
    before = saved.read_bytes()
    with pytest.raises(MetadataError):
        save_packed(saved, {}, metadata)
    assert saved.read_bytes() == before


def test_a_quota_in_the_middle_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(FileUnwritableError, match="too large"):
            save_packed(saved, make_all(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("prepare", [lambda path: path.mkdir(), os.mkfifo], ids=["directory", "fifo"])
def test_targets_that_are_no_files(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "a")
    with pytest.raises(FileUnwritableError, match="not a regular file"):
        save_packed(tmp_path / "a", {}, {})


def test_the_layout_of_the_header_is_stable(tmp_path: Path) -> None:
    save_packed(tmp_path / "a", {"t": make("Q4_0", rows=1, k=32)}, {"k": "v"})
    content = (tmp_path / "a").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert (8 + size) % 64 == 0
    assert json.loads(content[8 : 8 + size]) == {
        "__metadata__": {
            "packed.version": "1",
            "packed.crc32": content[content.index(b'32":"') + 5 :][:8].decode(),
            "packed.types": '{"t": "Q4_0"}',
            "k": "v",
        },
        "t::d": {"dtype": "F16", "shape": [1, 1], "data_offsets": [0, 2]},
        "t::qs": {"dtype": "U8", "shape": [1, 16], "data_offsets": [2, 18]},
    }
