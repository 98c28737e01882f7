"""Opening well-formed GGUF files: values against gguf-py, the Gemma 4 vocabulary, splits, and resources."""

from __future__ import annotations

import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest

from gemma4.quant.errors import MalformedError, MissingPartError, MissingTensorError, TruncatedError
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType
from gemma4.quant.gguf_arrays import LazyNumbers, LazyStrings
from gemma4.quant.gguf_file import GGUFFile
from tests.raw_gguf import (
    BOOL,
    CODES,
    F32,
    FLOAT32,
    INT32,
    Q8_0,
    UINT16,
    UINT32,
    RawGGUF,
    RawTensor,
    Value,
    control,
    nested,
    number,
    numbers,
    string,
    strings,
)

EXTREMES = {
    "B": (0, 255),
    "b": (-128, 127),
    "H": (0, 65535),
    "h": (-32768, 32767),
    "I": (0, 2**32 - 1),
    "i": (-(2**31), 2**31 - 1),
    "f": (-0.5, float("inf")),
    "?": (False, True),
    "Q": (0, 2**64 - 1),
    "q": (-(2**63), 2**63 - 1),
    "d": (1e-310, -1e308),
}


def save(path: Path, raw: RawGGUF | bytes) -> Path:
    path.write_bytes(raw.build() if isinstance(raw, RawGGUF) else raw)
    return path


@pytest.fixture
def control_path(tmp_path: Path) -> Path:
    return save(tmp_path / "control.gguf", control())


def test_control_file_opens_with_the_right_values(control_path: Path) -> None:
    raw = control()
    with GGUFFile.open(control_path) as opened:
        assert (opened.path, opened.paths) == (control_path, (control_path,))
        assert (opened.version, opened.alignment, opened.unclaimed_bytes) == (3, 32, 0)
        assert opened.file_bytes == control_path.stat().st_size
        assert list(opened.metadata) == [key for key, _ in raw.keys]
        assert opened.metadata["general.architecture"] == "gemma4"
        assert opened.metadata["flag"] is True
        assert opened.metadata["tokenizer.ggml.tokens"] == ["<pad>", "", "▁the", "é\0é"]
        assert opened.metadata["tokenizer.ggml.scores"] == [0.0, -1.0, 2.5, float("inf")]
        assert opened.metadata["pattern"] == [True, False, True]
        assert opened.metadata["matrix"] == ([1, -2], ["a", "b"])
        assert [(t.name, t.shape, t.type, t.nbytes, t.part) for t in opened.tensors.values()] == [
            ("token_embd.weight", (3, 32), GGMLType.Q8_0, 102, 0),
            ("output_norm.weight", (5,), GGMLType.F32, 20, 0),
            ("blk.0.attn_q.weight", (2, 64), GGMLType.Q4_0, 72, 0),
        ]
        for tensor in raw.tensors:
            assert bytes(opened.data(str(tensor.name))) == tensor.data


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 65536])
def test_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    raw = RawGGUF(
        keys=[("general.alignment", number(UINT32, alignment))],
        tensors=[RawTensor("a", (3,), F32, b"0123456789ab"), RawTensor("b", (1,), F32, b"wxyz")],
        version=version,
        alignment=alignment,
    )
    with GGUFFile.open(save(tmp_path / "m.gguf", raw)) as opened:
        assert (opened.version, opened.alignment, opened.unclaimed_bytes) == (version, alignment, 0)
        assert (bytes(opened.data("a")), bytes(opened.data("b"))) == (b"0123456789ab", b"wxyz")
        assert all(t.offset % alignment == 0 for t in opened.tensors.values())


@pytest.mark.parametrize("type_id", CODES, ids=CODES.get)
def test_numbers_of_every_type_are_python_scalars(tmp_path: Path, type_id: int) -> None:
    values = EXTREMES[CODES[type_id]]
    keys: list[tuple[str | bytes, Value]] = [(f"one.{i}", number(type_id, v)) for i, v in enumerate(values)]
    keys += [("many", numbers(type_id, values)), ("none", numbers(type_id, []))]
    with GGUFFile.open(save(tmp_path / "m.gguf", RawGGUF(keys=keys))) as opened:
        got = [opened.metadata["one.0"], opened.metadata["one.1"]]
        many = opened.metadata["many"]
        assert isinstance(many, LazyNumbers)
        assert got == list(values) == list(many) == [many[0], many[-1]] == many[0:2]
        assert {type(x) for x in (*got, *many)} == {type(values[0])}
        assert len(many) == 2
        assert opened.metadata["none"] == []


@pytest.mark.parametrize("kind", list(GGMLType), ids=lambda t: t.name)
def test_tensors_of_every_type_match_gguf_py(tmp_path: Path, kind: GGMLType) -> None:
    block = BLOCK_FORMATS[kind]
    rng = np.random.default_rng(int(kind))
    shapes = [(2, 3, 2 * block.block_size), (block.block_size,), (5, block.block_size)]
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "any")
    for i, shape in enumerate(shapes):
        stored = (*shape[:-1], shape[-1] // block.block_size * block.type_size)
        raw = rng.integers(0, 256, stored, dtype=np.uint8)
        writer.add_tensor(f"t{i}", raw, raw_dtype=gguf.GGMLQuantizationType(int(kind)))
    finish(writer)
    with GGUFFile.open(path) as opened:
        for theirs in gguf.GGUFReader(path).tensors:
            ours = opened.tensors[theirs.name]
            assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert (int(ours.type), ours.nbytes) == (int(theirs.tensor_type), int(theirs.n_bytes))
            assert ours.offset == int(theirs.data_offset)
            assert bytes(opened.data(theirs.name)) == theirs.data.tobytes()
        assert opened.unclaimed_bytes == 0


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_matches_gguf_py(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "any")
    kinds = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    for i, name in enumerate(kinds):
        getattr(writer, f"add_{name}")(f"k.{name}", 100 + i)
    writer.add_float32("k.f32", 1e-6)
    writer.add_float64("k.f64", 1e-6)
    writer.add_bool("k.bool", False)
    writer.add_string("k.str", "naïve ▁ 🙂")
    writer.add_array("k.strs", ["a", "ß", "", "🙂" * 200])
    writer.add_array("k.ints", [1, -2, 3])
    writer.add_array("k.floats", [0.1, -2.5])
    writer.add_array("k.bools", [True, False])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", np.zeros(4, np.float32))
    finish(writer)
    oracle = gguf.GGUFReader(path)
    with GGUFFile.open(path) as opened:
        theirs = {k: f.contents() for k, f in oracle.fields.items() if not k.startswith("GGUF.")}
        assert dict(opened.metadata) == theirs
        assert opened.alignment == oracle.alignment == 64


def test_nested_arrays_match_gguf_py(tmp_path: Path) -> None:
    deep = nested([nested([numbers(INT32, [1, 2]), numbers(INT32, [])]), nested([strings(["x"])])])
    path = save(tmp_path / "m.gguf", RawGGUF(keys=[("deep", deep), ("after", number(UINT32, 7))]))
    with GGUFFile.open(path) as opened:
        assert opened.metadata["deep"] == (([1, 2], []), (["x"],))
        assert opened.metadata["after"] == 7


def test_gemma4_vocabulary_opens_fast_and_whole(unpacked: Callable[[str], Path]) -> None:
    path = unpacked("ggml-vocab-gemma-4.gguf")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        opened = GGUFFile.open(path)
        seconds.append(time.process_time() - start)
        opened.close()
    tokens, merges = opened.metadata["tokenizer.ggml.tokens"], opened.metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, LazyStrings)
    assert isinstance(merges, LazyStrings)
    assert (len(tokens), len(merges), len(opened.tensors)) == (262_144, 514_906, 0)
    assert tokens[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert (tokens[106], tokens[-1]) == ("<turn|>", tokens[262_143])
    assert tokens[107] == "\n"
    assert list(merges) == walk(path.read_bytes(), "tokenizer.ggml.merges")
    assert [tokens[i] for i in range(0, 262_144, 1000)] == list(tokens)[::1000]
    scores = opened.metadata["tokenizer.ggml.scores"]
    assert isinstance(scores, LazyNumbers)
    assert set(scores) == {-1000.0}
    assert min(seconds) < 1.0


def walk(data: bytes, key: str) -> list[str]:
    at = data.index(key.encode()) + len(key) + 4
    kind, count = struct.unpack_from("<IQ", data, at)
    assert kind == 8
    at, out = at + 12, []
    for _ in range(count):
        length = int.from_bytes(data[at : at + 8], "little")
        out.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return out


def test_real_checkpoint_opens_fast_and_every_byte_is_claimed(real_gguf: Path) -> None:
    start = time.process_time()
    with GGUFFile.open(real_gguf) as opened:
        assert time.process_time() - start < 1.0
        assert opened.metadata["general.architecture"] == "gemma3"
        assert opened.unclaimed_bytes == 0
        embedding = opened.tensors["token_embd.weight"]
        assert (embedding.shape, embedding.type) == ((262_144, 640), GGMLType.Q8_0)
        assert len(opened.data("token_embd.weight")) == embedding.nbytes


# Lazy arrays


def test_lazy_arrays_outlive_the_file_and_pickle(control_path: Path) -> None:
    with GGUFFile.open(control_path) as opened:
        tokens, scores = opened.metadata["tokenizer.ggml.tokens"], opened.metadata["tokenizer.ggml.scores"]
    control_path.unlink()
    for copied in (tokens, pickle.loads(pickle.dumps(tokens))):
        assert copied == ["<pad>", "", "▁the", "é\0é"]
    assert pickle.loads(pickle.dumps(scores)) == scores


def test_lazy_strings_behave_like_a_list(control_path: Path) -> None:
    with GGUFFile.open(control_path) as opened:
        tokens = opened.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, LazyStrings)
    plain = list(tokens)
    assert [tokens[i] for i in range(-4, 4)] == plain + plain
    assert tokens[::-1] == plain[::-1]
    assert tokens[1:3] == plain[1:3]
    assert tokens.index("▁the") == 2
    assert tokens != plain[:3]
    assert tokens != "<pad>"
    for index in (4, -5):
        with pytest.raises(IndexError, match=r"tokens: index .* of 4"):
            tokens[index]


def test_a_string_that_is_not_utf8_names_its_byte_on_access(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", RawGGUF(keys=[("tokens", strings([b"ok", b"a\xffb", b"fine"]))]))
    with GGUFFile.open(path) as opened:
        tokens = opened.metadata["tokens"]
    assert isinstance(tokens, LazyStrings)
    assert (tokens[0], tokens[2]) == ("ok", "fine")
    for read in (lambda: tokens[1], lambda: list(tokens), lambda: tokens[0:2]):
        with pytest.raises(MalformedError, match="UTF-8") as caught:
            read()
        assert caught.value.field == "tokens"
        assert caught.value.offset == path.read_bytes().index(b"\xff")


# Views, closing, and files that change


def test_views_are_copy_on_write_and_never_reach_the_file(control_path: Path) -> None:
    before = control_path.read_bytes()
    with GGUFFile.open(control_path) as opened:
        view = opened.data("output_norm.weight")
        assert (view.readonly, view.format, view.nbytes) == (False, "B", 20)
        view[:] = bytes(20)
        assert bytes(opened.data("output_norm.weight")) == bytes(20)
    assert control_path.read_bytes() == before


def test_views_survive_close_and_release_the_descriptor_with_the_last(control_path: Path) -> None:
    idle = len(os.listdir("/proc/self/fd"))
    opened = GGUFFile.open(control_path)
    view = opened.data("token_embd.weight")
    opened.close()
    opened.close()
    assert bytes(view) == bytes(range(102))
    with pytest.raises(ValueError, match="closed"):
        opened.data("token_embd.weight")
    del view
    assert len(os.listdir("/proc/self/fd")) == idle


def test_an_unknown_tensor_is_named(control_path: Path) -> None:
    with GGUFFile.open(control_path) as opened, pytest.raises(MissingTensorError) as caught:
        opened.data("blk.9.attn_q.weight")
    assert (caught.value.field, caught.value.path) == ("blk.9.attn_q.weight", control_path)


def test_a_file_cut_in_place_is_noticed_before_a_view_is_given(control_path: Path) -> None:
    with GGUFFile.open(control_path) as opened:
        kept = opened.tensors["token_embd.weight"]
        os.truncate(control_path, kept.offset + kept.nbytes)
        assert bytes(opened.data("token_embd.weight")) == bytes(range(102))
        with pytest.raises(TruncatedError, match="while open") as caught:
            opened.data("blk.0.attn_q.weight")
        assert caught.value.field == "blk.0.attn_q.weight"
        assert opened.metadata["tokenizer.ggml.tokens"] == ["<pad>", "", "▁the", "é\0é"]


def test_a_file_replaced_while_open_keeps_its_old_bytes(control_path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(control_path) as opened:
        os.replace(save(tmp_path / "new.gguf", RawGGUF()), control_path)
        assert bytes(opened.data("token_embd.weight")) == bytes(range(102))


def test_opening_a_thousand_times_keeps_descriptors_and_memory_flat(control_path: Path) -> None:
    process = psutil.Process()

    def churn(times: int) -> tuple[int, int]:
        for _ in range(times):
            with GGUFFile.open(control_path) as opened:
                opened.data("token_embd.weight")
        return process.num_fds(), process.memory_info().rss

    fds, rss = churn(100)
    fds_after, rss_after = churn(1000)
    assert fds_after == fds
    assert rss_after - rss < 4 << 20


def test_a_file_larger_than_memory_opens_at_once(tmp_path: Path) -> None:
    size = 64 << 30
    raw = RawGGUF(tensors=[RawTensor("a", (8, 1), F32, bytes(32)), RawTensor("far", (4,), F32, b"", offset=size - 32)])
    path = save(tmp_path / "sparse.gguf", raw)
    with GGUFFile.open(grow(path, size + 4096)) as opened:
        assert bytes(opened.data("far")) == bytes(16)
        assert opened.unclaimed_bytes > size - 8192


def grow(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


# Order, gaps and left-over bytes


def test_gaps_and_reordered_tensors_are_accepted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = RawGGUF(
        tensors=[RawTensor("b", (4,), F32, b"", offset=96), RawTensor("a", (4,), F32, b"a" * 16)],
        tail=bytes(64) + b"b" * 16 + bytes(32),
    )
    with GGUFFile.open(save(tmp_path / "m.gguf", raw)) as opened:
        assert list(opened.tensors) == ["b", "a"]
        assert (bytes(opened.data("a")), bytes(opened.data("b"))) == (b"a" * 16, b"b" * 16)
        assert opened.unclaimed_bytes == 64 + 16
    assert "80 bytes belong to no tensor" in caplog.text


@pytest.mark.parametrize("tail", [0, 1, 1000])
def test_left_over_bytes_are_counted(tmp_path: Path, tail: int) -> None:
    raw = control()
    raw.tail = bytes(tail)
    with GGUFFile.open(save(tmp_path / "m.gguf", raw)) as opened:
        assert opened.unclaimed_bytes == tail


def test_a_file_without_its_last_padding_opens(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", RawGGUF(tensors=[RawTensor("a", (1,), F32, b"abcd")]))
    os.truncate(path, path.stat().st_size - 28)
    with GGUFFile.open(path) as opened:
        assert bytes(opened.data("a")) == b"abcd"


def test_scalars_and_long_names_are_accepted(tmp_path: Path) -> None:
    name = "blk.0." + "long" * 40 + ".weight"
    raw = RawGGUF(tensors=[RawTensor("scalar", (), F32, b"abcd"), RawTensor(name, (1, 1, 1, 2), F32, bytes(8))])
    with GGUFFile.open(save(tmp_path / "m.gguf", raw)) as opened:
        assert opened.tensors["scalar"].shape == ()
        assert opened.tensors[name].shape == (2, 1, 1, 1)


# Split files


def split_set(folder: Path, count: int = 3) -> list[Path]:
    paths = []
    for i in range(count):
        raw = RawGGUF(
            keys=[
                ("split.no", number(UINT16, i)),
                ("split.count", number(UINT16, count)),
                ("split.tensors.count", number(INT32, 2 * count)),
            ],
            tensors=[
                RawTensor(f"t{i}.a", (4,), F32, bytes([i] * 16)),
                RawTensor(f"t{i}.b", (32,), Q8_0, bytes([100 + i] * 34)),
            ],
        )
        if i == 0:
            raw.keys += [("general.architecture", string("gemma4")), ("flag", number(BOOL, True))]
        paths.append(save(folder / f"model-{i + 1:05}-of-{count:05}.gguf", raw))
    return paths


@pytest.mark.parametrize("opened_part", [0, 1, 2])
def test_a_split_set_opens_through_any_part(tmp_path: Path, opened_part: int) -> None:
    paths = split_set(tmp_path)
    with GGUFFile.open(paths[opened_part]) as opened:
        assert (opened.path, opened.paths) == (paths[opened_part], tuple(paths))
        assert opened.metadata["general.architecture"] == "gemma4"
        assert list(opened.tensors) == ["t0.a", "t0.b", "t1.a", "t1.b", "t2.a", "t2.b"]
        assert [t.part for t in opened.tensors.values()] == [0, 0, 1, 1, 2, 2]
        assert opened.file_bytes == sum(p.stat().st_size for p in paths)
        assert opened.unclaimed_bytes == 0
        for i in range(3):
            assert bytes(opened.data(f"t{i}.a")) == bytes([i] * 16)
            assert bytes(opened.data(f"t{i}.b")) == bytes([100 + i] * 34)


def test_a_split_set_of_gguf_py_opens(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "any", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full(32, i, np.float32))
    finish(writer)
    with GGUFFile.open(tmp_path / "model-00001-of-00003.gguf") as opened:
        assert list(opened.tensors) == [f"t{i}" for i in range(5)]
        for i in range(5):
            assert np.frombuffer(opened.data(f"t{i}"), np.float32).tolist() == [float(i)] * 32


def test_a_single_part_set_opens_under_any_name(tmp_path: Path) -> None:
    path = split_set(tmp_path, count=1)[0]
    with GGUFFile.open(path.rename(tmp_path / "renamed.gguf")) as opened:
        assert list(opened.tensors) == ["t0.a", "t0.b"]


def test_every_missing_part_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    paths = split_set(tmp_path, count=4)
    paths[1].unlink()
    paths[3].unlink()
    idle = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MissingPartError) as caught:
        GGUFFile.open(paths[2])
    assert paths[1].name in str(caught.value)
    assert paths[3].name in str(caught.value)
    assert paths[0].name not in caught.value.message
    assert len(os.listdir("/proc/self/fd")) == idle


def test_a_renamed_part_says_what_name_it_needs(tmp_path: Path) -> None:
    path = split_set(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(MissingPartError, match=r"one of 3 parts.*-00001-of-00003\.gguf"):
        GGUFFile.open(path)


def rewrite(path: Path, **values: Value) -> None:
    """Replace a part by one with other keys and its old first tensor name."""
    number_in_name = int(path.name.split("-")[1]) - 1
    defaults = {"split.no": number(UINT16, number_in_name), "split.count": number(UINT16, 3)}
    keys = {**defaults, **{key.replace("__", "."): value for key, value in values.items()}}
    raw = RawGGUF(keys=list(keys.items()), tensors=[RawTensor(f"t{number_in_name}.a", (4,), F32, bytes(16))])
    save(path, raw)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"split__no": number(UINT16, 2)}, "split.no", "part 3 by its header and part 2 by its name"),
        ({"split__no": number(FLOAT32, 1.0)}, "split.no", "found 1.0"),
        ({"split__count": number(UINT16, 4)}, "split.count", "contradict"),
        ({"general__architecture": string("llama")}, "general.architecture", "'llama' here, 'gemma4' in"),
        ({"split__tensors__count": number(INT32, 7)}, "split.tensors.count", "contradict"),
        ({}, "split.tensors.count", "hold 5 tensors together, the header says 6"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    tmp_path: Path, values: dict[str, Value], field: str, words: str
) -> None:
    paths = split_set(tmp_path)
    rewrite(paths[1], **values)
    with pytest.raises(MalformedError) as caught:
        GGUFFile.open(paths[0])
    assert caught.value.field == field
    assert words in str(caught.value)


def test_a_part_of_another_count_by_name_is_refused(tmp_path: Path) -> None:
    path = split_set(tmp_path)[0].rename(tmp_path / "model-00001-of-00002.gguf")
    with pytest.raises(MalformedError, match="header says 3 parts, the file's name says 2"):
        GGUFFile.open(path)


def test_a_name_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    save(
        paths[2],
        RawGGUF(
            keys=[("split.no", number(UINT16, 2)), ("split.count", number(UINT16, 3))],
            tensors=[RawTensor("t0.a", (4,), F32, bytes(16)), RawTensor("t2.b", (4,), F32, bytes(16))],
        ),
    )
    with pytest.raises(MalformedError, match=paths[0].name) as caught:
        GGUFFile.open(paths[1])
    assert (caught.value.path, caught.value.field) == (paths[2], "t0.a")


def test_a_truncated_part_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    paths = split_set(tmp_path)
    idle = len(os.listdir("/proc/self/fd"))
    os.truncate(paths[2], paths[2].stat().st_size - 40)
    with pytest.raises(TruncatedError) as caught:
        GGUFFile.open(paths[0])
    assert (caught.value.path, caught.value.field) == (paths[2], "t2.b")
    assert len(os.listdir("/proc/self/fd")) == idle
