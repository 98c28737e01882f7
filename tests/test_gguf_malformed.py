"""Broken files and odd paths: every one is refused at once, with an error that names the place and the cause."""

from __future__ import annotations

import gzip
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from gemma4.quant.errors import (
    FileMissingError,
    FileUnreadableError,
    Gemma4Error,
    MalformedError,
    NotGGUFError,
    TruncatedError,
    UnsupportedFeatureError,
    UnsupportedTypeError,
)
from gemma4.quant.gguf_file import GGUFFile, Limits
from tests.raw_gguf import (
    ARRAY,
    BOOL,
    F16,
    F32,
    INT32,
    Q4_K,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    RawGGUF,
    RawTensor,
    Value,
    control,
    nested,
    number,
    numbers,
    pack,
    string,
    strings,
    text,
)

TWO_63 = 2**63
TWO_64 = 2**64


def refuse(path: Path, kind: type[Gemma4Error], limits: Limits | None = None) -> Gemma4Error:
    idle = len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    with pytest.raises(Gemma4Error) as caught:
        GGUFFile.open(path, limits=limits)
    assert time.perf_counter() - start < 5.0
    assert type(caught.value) is kind, str(caught.value)
    assert caught.value.path == path
    assert str(caught.value).startswith(str(path))
    # The error's own traceback must not be what keeps the file open.
    assert len(os.listdir("/proc/self/fd")) == idle
    return caught.value


def keys(*pairs: tuple[str | bytes, Value], **lies: int) -> RawGGUF:
    return RawGGUF(keys=list(pairs), **lies)  # type: ignore[arg-type]


def tensor(
    dims: tuple[int, ...] = (4,),
    type_id: int = F32,
    data: bytes = bytes(16),
    offset: int | None = None,
    n_dims: int | None = None,
    name: str | bytes = "w",
) -> RawTensor:
    return RawTensor(name, dims, type_id, data, offset, n_dims)


def tensors(*entries: RawTensor, **lies: int) -> RawGGUF:
    return RawGGUF(tensors=list(entries), **lies)  # type: ignore[arg-type]


def aligned(value: Value) -> RawGGUF:
    return keys(("general.alignment", value))


def array(type_id: int, count: int, payload: bytes = b"") -> Value:
    return Value(ARRAY, pack("IQ", type_id, count) + payload)


def deep(levels: int) -> Value:
    value = numbers(INT32, [1])
    for _ in range(levels - 1):
        value = nested([value])
    return value


PAD = ("pad", string("x" * 4000))

HEADERS: dict[str, tuple[RawGGUF, type[Gemma4Error], str, str]] = {
    # Version and counts.
    "version_0": (RawGGUF(version=0), MalformedError, "version", "version is 0"),
    "version_1": (RawGGUF(version=1), UnsupportedFeatureError, "version", "version 1, expected 2 or 3"),
    "version_4": (RawGGUF(version=4), UnsupportedFeatureError, "version", "version 4, expected 2 or 3"),
    "version_max": (RawGGUF(version=2**32 - 1), UnsupportedFeatureError, "version", "expected 2 or 3"),
    "big_endian_2": (RawGGUF(version=0x02000000), UnsupportedFeatureError, "version", "big-endian"),
    "big_endian_3": (RawGGUF(version=0x03000000), UnsupportedFeatureError, "version", "big-endian"),
    "key_count_max": (RawGGUF(key_count=TWO_64 - 1), MalformedError, "header", f"{TWO_64 - 1} metadata keys"),
    "key_count_negative": (RawGGUF(key_count=TWO_63), MalformedError, "header", "metadata keys"),
    "key_count_over_file": (RawGGUF(key_count=60_000), TruncatedError, "header", "a header of 60000 metadata keys"),
    "key_count_one_more": (keys(("k", number(UINT8, 1)), key_count=2), TruncatedError, "header", "2 metadata keys"),
    "tensor_count_max": (RawGGUF(tensor_count=TWO_64 - 1), MalformedError, "header", f"{TWO_64 - 1} tensors"),
    "tensor_count_over_file": (RawGGUF(tensor_count=200_000), TruncatedError, "header", "200000 tensors"),
    "tensor_count_one_more": (tensors(tensor(), tensor_count=2), MalformedError, "tensor 1", "the name is empty"),
    # Keys.
    "key_empty": (keys(("", number(UINT8, 1)), PAD), MalformedError, "metadata key 0", "the key is empty"),
    "key_twice": (keys(("k", number(UINT8, 1)), ("k", number(UINT8, 1))), MalformedError, "k", "appears twice"),
    "key_nul": (keys(("a\0b", number(UINT8, 1))), MalformedError, "metadata key 0", "NUL"),
    "key_not_utf8": (keys((b"a\xff", number(UINT8, 1))), MalformedError, "metadata key 0", "not UTF-8"),
    "key_surrogate": (keys((b"a\xed\xa0\x80", number(UINT8, 1))), MalformedError, "metadata key 0", "not UTF-8"),
    "key_too_long": (keys(("k" * 65_536, number(UINT8, 1))), MalformedError, "metadata key 0", "65536 bytes"),
    # Values.
    "value_type_13": (keys(("k", Value(13, bytes(8))), PAD), MalformedError, "k", "type is 13, expected 0 to 12"),
    "value_type_max": (keys(("k", Value(2**32 - 1, bytes(8)))), MalformedError, "k", "type is 4294967295"),
    "value_bool_2": (keys(("k", Value(BOOL, b"\2"))), MalformedError, "k", "stored as 2, expected 0 or 1"),
    "value_cut": (keys(("k", Value(UINT64, bytes(7)))), TruncatedError, "k", "needs 8 bytes"),
    "value_absent": (keys(("k", Value(UINT32, b""))), TruncatedError, "header", "a header of 1 metadata keys"),
    "string_past_end": (keys(("k", string("abc", 5000))), TruncatedError, "k", "the value needs 5000 bytes"),
    "string_max": (keys(("k", string("abc", TWO_64 - 1))), MalformedError, "k", f"{TWO_64 - 1} bytes"),
    "string_negative": (keys(("k", string("abc", TWO_63))), MalformedError, "k", f"{TWO_63} bytes"),
    "string_over_limit": (keys(("k", string("abc", 2**27))), MalformedError, "k", "at most 67108864"),
    "string_not_utf8": (keys(("k", string(b"a\xc3("))), MalformedError, "k", "not UTF-8"),
    # Arrays.
    "array_type_13": (keys(("k", array(13, 0)), PAD), MalformedError, "k", "element type is 13"),
    "array_bool_3": (keys(("k", array(BOOL, 3, b"\0\1\3"))), MalformedError, "k", "other than 0 and 1"),
    "array_past_end": (keys(("k", array(UINT32, 100, bytes(396)))), TruncatedError, "k", "an array of 100 values"),
    "array_count_max": (keys(("k", array(UINT8, TWO_64 - 1))), MalformedError, "k", "more than any file has"),
    "array_count_wraps": (keys(("k", array(UINT64, 2**61 + 1, bytes(8)))), MalformedError, "k", "more than any file"),
    "array_count_wraps_32": (keys(("k", array(UINT32, 2**30 + 1, bytes(8)))), TruncatedError, "k", "of 1073741825"),
    "array_header_cut": (keys(("k", Value(ARRAY, pack("IH", UINT8, 0)))), TruncatedError, "k", "array's length"),
    "strings_count_max": (keys(("k", array(STRING, TWO_64 - 1))), MalformedError, "k", "more than 8388608 strings"),
    "strings_past_end": (keys(("k", array(STRING, 1000, text("a") * 9))), TruncatedError, "k", "1000 strings"),
    "strings_one_more": (keys(("k", strings(["abcdefgh"] * 3, count=4))), TruncatedError, "k", "string 3"),
    "strings_first_max": (keys(("k", array(STRING, 1, text("", TWO_64 - 1)))), MalformedError, "k", "string 0"),
    "strings_last_one_over": (keys(("k", array(STRING, 2, text("a") + text("b", 2)))), TruncatedError, "k", "string 1"),
    "strings_middle_4gib": (
        keys(("k", array(STRING, 3, text("a") + text("b", 2**32) + text("c")))),
        TruncatedError,
        "k",
        "string 1",
    ),
    "nested_count_max": (keys(("k", array(ARRAY, TWO_64 - 1))), MalformedError, "k", "more than 65536 nested"),
    "nested_past_end": (keys(("k", array(ARRAY, 60_000))), TruncatedError, "k", "60000 arrays"),
    "nested_too_deep": (keys(("k", deep(5))), MalformedError, "k", "nested deeper than 4"),
    "nested_bomb": (keys(("k", Value(ARRAY, pack("IQ", ARRAY, 1) * 5000))), MalformedError, "k", "nested deeper"),
    # Alignment.
    "alignment_0": (aligned(number(UINT32, 0)), MalformedError, "general.alignment", "is 0, expected a power"),
    "alignment_3": (aligned(number(UINT32, 3)), MalformedError, "general.alignment", "is 3"),
    "alignment_48": (aligned(number(UINT32, 48)), MalformedError, "general.alignment", "is 48"),
    "alignment_huge": (aligned(number(UINT32, 2**31)), MalformedError, "general.alignment", "up to 65536"),
    "alignment_u64": (aligned(number(UINT64, 32)), MalformedError, "general.alignment", "UINT64, expected UINT32"),
    "alignment_i32": (aligned(number(INT32, 32)), MalformedError, "general.alignment", "INT32, expected UINT32"),
    "alignment_text": (aligned(string("32")), MalformedError, "general.alignment", "STRING, expected UINT32"),
    "alignment_array": (aligned(numbers(UINT32, [32])), MalformedError, "general.alignment", "ARRAY"),
    "alignment_bool": (aligned(number(BOOL, True)), MalformedError, "general.alignment", "BOOL, expected UINT32"),
    # The tensor table.
    "tensor_name_empty": (tensors(tensor(name="")), MalformedError, "tensor 0", "the name is empty"),
    "tensor_name_nul": (tensors(tensor(name="a\0b")), MalformedError, "tensor 0", "NUL"),
    "tensor_name_not_utf8": (tensors(tensor(name=b"\xfe\xfe")), MalformedError, "tensor 0", "not UTF-8"),
    "tensor_name_max": (
        tensors(RawTensor("w", (4,), F32, bytes(16), name_length=TWO_64 - 1)),
        MalformedError,
        "tensor 0",
        f"{TWO_64 - 1} bytes",
    ),
    "tensor_name_twice": (tensors(tensor(), tensor()), MalformedError, "w", "two tensors have this name"),
    "dims_5": (tensors(tensor((1, 1, 1, 1, 1))), MalformedError, "w", "5 dimensions, expected at most 4"),
    "dims_max": (tensors(tensor(n_dims=2**32 - 1)), MalformedError, "w", "4294967295 dimensions"),
    "dim_0": (tensors(tensor((4, 0))), MalformedError, "w", "dimensions are [4, 0]"),
    "dim_0_hides_overflow": (tensors(tensor((TWO_63, 0))), MalformedError, "w", "expected a product"),
    "dim_negative": (tensors(tensor((TWO_64 - 1,))), MalformedError, "w", "expected a product"),
    "dims_wrap_to_0": (tensors(tensor((2**32, 2**32))), MalformedError, "w", "expected a product"),
    "dims_wrap_to_4": (tensors(tensor((2**32, 2**32, 1, 4))), MalformedError, "w", "expected a product"),
    "bytes_wrap": (tensors(tensor((2**62,))), MalformedError, "w", "past any file"),
    "k_not_whole_blocks": (tensors(tensor((33, 2), Q8_0)), MalformedError, "w", "rows of 33 weights do not fit Q8_0"),
    "k_below_one_block": (tensors(tensor((32, 8), Q4_K)), MalformedError, "w", "expected a multiple of 256"),
    "quantized_scalar": (tensors(tensor((), Q8_0, bytes(34))), MalformedError, "w", "rows of 1 weights"),
    "offset_unaligned": (tensors(tensor(offset=1)), MalformedError, "w", "offset 1 is not a multiple of the alignment"),
    "offset_unaligned_64": (
        RawGGUF([("general.alignment", number(UINT32, 64))], [tensor(offset=32)], alignment=64),
        MalformedError,
        "w",
        "alignment 64",
    ),
    "offset_past_end": (tensors(tensor(offset=4096)), TruncatedError, "w", "1 of 1 tensors are cut"),
    "offset_max": (tensors(tensor(offset=TWO_64 - 32)), MalformedError, "w", "past any file"),
    "offset_wraps": (tensors(tensor(offset=TWO_63 - 32)), MalformedError, "w", "past any file"),
    "data_absent": (tensors(tensor(data=b"")), TruncatedError, "w", "tensors are cut"),
    "data_one_row_short": (tensors(tensor((256, 3), Q4_K, bytes(2 * 144))), TruncatedError, "w", "cut"),
    "same_data_twice": (
        tensors(tensor(), tensor(name="v", offset=0)),
        MalformedError,
        "v",
        "overlaps 'w', which ends at byte",
    ),
    "overlap_by_a_row": (
        tensors(tensor((16, 2), data=bytes(128)), tensor(name="v", offset=96)),
        MalformedError,
        "v",
        "overlaps 'w'",
    ),
    "contained": (
        tensors(tensor((64,), data=bytes(256)), tensor((2,), F16, offset=64, name="v")),
        MalformedError,
        "v",
        "overlaps 'w'",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    raw, kind, field, words = HEADERS[case]
    path = tmp_path / f"{case}.gguf"
    path.write_bytes(raw.build())
    error = refuse(path, kind)
    assert error.field == field
    assert words in error.message
    assert error.offset is not None
    assert error.offset >= 0


@pytest.mark.parametrize("version", [2, 3])
def test_offsets_point_at_the_lie(tmp_path: Path, version: int) -> None:
    good = control()
    good.version = version
    data = good.build()
    path = tmp_path / "m.gguf"
    roles = {"key length", "value type", "element type", "string length", "name length", "dimension count"}
    checked = set()
    for place in good.layout():
        if place.role in roles:
            lie = b"\xff" * place.width
            path.write_bytes(data[: place.offset] + lie + data[place.offset + place.width :])
            error = refuse(path, MalformedError)
            assert error.offset in (place.offset, place.offset + place.width), place
            checked.add(place.role)
    assert checked == roles


def test_all_tensors_of_unknown_types_are_listed_by_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    kinds = {"a": 43, "b": 44, "c": 142, "d": 4, "e": 99, "f": 43, "good": F32}
    path.write_bytes(tensors(*(tensor(name=name, type_id=t) for name, t in kinds.items())).build())
    error = refuse(path, UnsupportedTypeError)
    assert error.field == "a"
    for words in (
        "6 tensors",
        "type 43 (MX46A or TurboQuant, written only by a fork of llama.cpp): a, f",
        "type 44 (MX46A or TurboQuant, written only by a fork of llama.cpp): b",
        "type 142 (Prism, written only by a fork of llama.cpp): c",
        "type 4 (Q4_2, retired by ggml): d",
        "type 99 (unknown): e",
    ):
        assert words in error.message
    assert "good" not in error.message


def test_a_long_list_of_tensors_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tensors(*(tensor(name=f"t{i}", type_id=143) for i in range(150))).build())
    error = refuse(path, UnsupportedTypeError)
    assert "150 tensors" in error.message
    assert "t99 and 50 more" in error.message


CAUSES: dict[str, tuple[bytes, type[Gemma4Error], str]] = {
    "empty": (b"", TruncatedError, "has 0 bytes"),
    "magic_cut": (b"GGU", TruncatedError, "has 3 bytes"),
    "magic_only": (b"GGUF", TruncatedError, "version needs 4 bytes"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", NotGGUFError, "HTML page"),
    "html_spaced": (b"\xef\xbb\xbf\n\n  <HTML lang='en'>", NotGGUFError, "HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", NotGGUFError, "HTML page"),
    "lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2\n",
        NotGGUFError,
        "git-LFS pointer",
    ),
    "zeros": (bytes(100_000), NotGGUFError, "zero bytes"),
    "zeros_after_magic": (b"GGUF" + bytes(100_000), MalformedError, "never completed"),
    "gzip": (gzip.compress(b"GGUF"), NotGGUFError, "gzip"),
    "xz": (b"\xfd7zXZ\0\0\4", NotGGUFError, "xz file"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", NotGGUFError, "zstandard"),
    "bzip2": (b"BZh91AY&SY", NotGGUFError, "bzip2"),
    "zip": (b"PK\3\4\x14\0", NotGGUFError, "zip archive"),
    "ggjt": (b"tjgg\3\0\0\0", NotGGUFError, "GGJT"),
    "ggml": (b"lmgg\3\0\0\0", NotGGUFError, "GGML"),
    "byte_swapped": (b"FUGG\0\0\0\3", NotGGUFError, "big-endian"),
    "safetensors": (pack("Q", 20) + b'{"__metadata__":{}} ' + bytes(64), NotGGUFError, "safetensors"),
    "json": (b'{"error":"Unauthorized"}', NotGGUFError, "JSON"),
    "text": (b"hello world", NotGGUFError, "starts with b'hell', expected b'GGUF'"),
}


@pytest.mark.parametrize("case", CAUSES)
def test_a_failed_download_is_named_for_what_it_is(tmp_path: Path, case: str) -> None:
    data, kind, words = CAUSES[case]
    path = tmp_path / f"{case}.gguf"
    path.write_bytes(data)
    error = refuse(path, kind)
    assert words in error.message
    assert error.field in ("magic", "version")
    assert error.offset is not None


def test_a_raw_piece_of_a_file_says_to_join_the_pieces(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf.part2of3"
    path.write_bytes(b"\x17\x2a\x99\x01" * 100)
    assert "join all pieces" in refuse(path, NotGGUFError).message


def test_a_cut_file_states_the_bytes_present_and_needed(tmp_path: Path) -> None:
    data = control().build()
    path = tmp_path / "m.gguf"
    path.write_bytes(data[: len(data) * 99 // 100 - 32])
    error = refuse(path, TruncatedError)
    needed = len(data) - 24
    assert f"has {path.stat().st_size} bytes, its tensors need {needed}" in error.message
    assert error.field == "blk.0.attn_q.weight"


@pytest.mark.parametrize("version", [2, 3])
def test_a_cut_at_every_byte_is_truncation(tmp_path: Path, version: int) -> None:
    raw = control()
    raw.version = version
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.build())
    with GGUFFile.open(path) as opened:
        data_end = max(t.offset + t.nbytes for t in opened.tensors.values())
    for size in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, size)
        if size >= data_end:
            GGUFFile.open(path).close()
            continue
        with pytest.raises(TruncatedError) as caught:
            GGUFFile.open(path)
        assert f"has {size} bytes" in caught.value.message


# Paths


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "a directory" in refuse(tmp_path, NotGGUFError).message


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert "a FIFO" in refuse(tmp_path / "m.gguf", NotGGUFError).message


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("m.gguf")
        assert "a socket" in refuse(tmp_path / "m.gguf", NotGGUFError).message


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_a_device_is_refused(device: str) -> None:
    assert "a character device" in refuse(Path(device), NotGGUFError).message


def test_a_missing_file_is_also_the_builtin_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GGUFFile.open(tmp_path / "gone.gguf")
    refuse(tmp_path / "gone.gguf", FileMissingError)
    (tmp_path / "dangling.gguf").symlink_to("nowhere")
    refuse(tmp_path / "dangling.gguf", FileMissingError)


def test_impossible_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    refuse(tmp_path / "loop.gguf", FileUnreadableError)
    refuse(tmp_path / ("x" * 300), FileUnreadableError)
    refuse(tmp_path / "a\0b", FileUnreadableError)
    refuse(tmp_path / "a\ud800b", FileUnreadableError)
    (tmp_path / "file").touch()
    refuse(tmp_path / "file" / "m.gguf", FileUnreadableError)


def test_a_symlink_to_a_model_opens(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(control().build())
    (tmp_path / "m.gguf").symlink_to("blob")
    with GGUFFile.open(tmp_path / "m.gguf") as opened:
        assert len(opened.tensors) == 3


def test_no_descriptor_left_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(control().build())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(FileUnreadableError, match="Too many open files"):
            GGUFFile.open(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Limits and amplification


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_keys=8), "9 metadata keys, expected at most 8"),
        (Limits(max_tensors=2), "3 tensors, expected at most 2"),
        (Limits(max_string_bytes=5), "6 bytes, expected at most 5"),
        (Limits(max_name_bytes=10), "20 bytes, expected at most 10"),
        (Limits(max_array_strings=5), "more than 5 strings"),
        (Limits(max_nested_arrays=1), "more than 1 nested"),
        (Limits(max_array_depth=1), "deeper than 1"),
        (Limits(max_alignment=16), "up to 16"),
        (Limits(max_header_bytes=300), "past the header limit of 300 bytes"),
    ],
    ids=lambda value: str(value)[:0] or None,
)
def test_limits_can_be_lowered(tmp_path: Path, limits: Limits, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(control().build())
    assert words in refuse(path, MalformedError, limits).message


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (strings(["a", "b"]), Limits(max_array_strings=3), "more than 3 strings in all"),
        (nested([numbers(INT32, [1]), numbers(INT32, [2])]), Limits(max_nested_arrays=3), "more than 3 nested arrays"),
    ],
    ids=["strings", "nested"],
)
def test_array_limits_count_all_keys_together(tmp_path: Path, value: Value, limits: Limits, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(keys(("first", value)).build())
    GGUFFile.open(path, limits=limits).close()
    path.write_bytes(keys(("first", value), ("second", value)).build())
    error = refuse(path, MalformedError, limits)
    assert error.field == "second"
    assert words in error.message


@pytest.mark.parametrize(
    "raw",
    [
        keys(("k", array(STRING, 2**21, bytes(2**24)))),
        keys(("k", array(ARRAY, 2**16, pack("IQ", UINT8, 0) * 2**16))),
        keys(("k", array(UINT8, 2**25, bytes(2**25)))),
        keys(("k", string(b"a" * 2**25))),
        keys(*((f"{i:05}", number(UINT8, 1)) for i in range(60_000))),
        tensors(*(RawTensor(f"{i}", (), F32, bytes(4)) for i in range(20_000))),
    ],
    ids=["empty_strings", "nested_arrays", "bytes", "one_string", "keys", "tensors"],
)
def test_opening_costs_no_more_than_the_file(tmp_path: Path, raw: RawGGUF) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.build())
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    with GGUFFile.open(path):
        assert time.perf_counter() - start < 5.0
        assert process.memory_info().rss - before < 256 << 20


# Fuzzing

INTERESTING = (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 31, 32, 33, 43, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
INTERESTING_64 = (*INTERESTING, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)


def mutations(rng: random.Random, count: int) -> Iterator[bytes]:
    base = control()
    data, layout = base.build(), base.layout()
    header = layout[-1].offset + layout[-1].width
    for _ in range(count):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            mutate(rng, out, header, layout[rng.randrange(len(layout))])
        yield bytes(out)


def mutate(rng: random.Random, out: bytearray, header: int, place: tuple[int, int, str]) -> None:
    offset, width, _ = place
    at = rng.randrange(header)
    kind = rng.randrange(7)
    if kind == 0:
        value = rng.choice(INTERESTING if width == 4 else INTERESTING_64)
        out[offset : offset + width] = value.to_bytes(width, "little")
    elif kind == 1 and offset + width <= len(out):
        value = int.from_bytes(out[offset : offset + width], "little") + rng.choice((-32, -8, -1, 1, 8, 32, 64))
        out[offset : offset + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    elif kind == 2 and at < len(out):
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 3 and at < len(out):
        out[at] = rng.randrange(256)
    elif kind == 4:
        del out[at : at + rng.randrange(1, 16)]
    elif kind == 5:
        out[at:at] = rng.randbytes(rng.randrange(1, 16))
    else:
        start = rng.randrange(header)
        out[at:at] = out[start : start + rng.randrange(1, 64)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_files_are_refused_or_sound(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    opened_count, errors = 0, []
    for data in mutations(random.Random(seed), 1500):
        overwrite(path, data)
        try:
            opened = GGUFFile.open(path)
        except Gemma4Error as error:
            errors.append(error)
            continue
        with opened:
            check_sound(opened, data)
        opened_count += 1
    assert opened_count > 50
    assert len(errors) > 500
    assert all(error.path == path and error.field and error.offset is not None for error in errors)
    kinds = {type(error) for error in errors}
    assert kinds >= {MalformedError, TruncatedError, UnsupportedTypeError, UnsupportedFeatureError}


def overwrite(path: Path, data: bytes) -> None:
    """Without emptying the file first, which some file systems answer with a flush to disk."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def check_sound(opened: GGUFFile, data: bytes) -> None:
    end, problems = 0, []
    for info in sorted(opened.tensors.values(), key=lambda t: t.offset):
        assert info.offset >= end
        assert info.offset % opened.alignment == 0
        end = info.offset + info.nbytes
        assert end <= len(data)
        assert bytes(opened.data(info.name)) == data[info.offset : end]
        assert all(type(n) is int and n > 0 for n in info.shape)
    for value in opened.metadata.values():
        try:
            repr(list(value) if isinstance(value, Sequence) else value)
        except MalformedError as error:
            problems.append(error)
    assert all("UTF-8" in error.message for error in problems)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_cuts_are_truncation(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    whole = RawGGUF(tensors=[RawTensor(f"t{i}", (32, 4), Q8_0, rng.randbytes(136)) for i in range(20)]).build()
    path = tmp_path / "m.gguf"
    for _ in range(64):
        path.write_bytes(whole[: rng.randrange(len(whole) - 24)])
        refuse(path, TruncatedError)


def test_the_builder_writes_what_the_format_says() -> None:
    data = RawGGUF(keys=[("k", number(UINT32, 7))], tensors=[RawTensor("w", (2,), F32, b"01234567")]).build()
    expected = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q1sII", 1, b"k", 4, 7)
    expected += struct.pack("<Q1sIQIQ", 1, b"w", 1, 2, 0, 0)
    assert data == expected.ljust(96, b"\0") + b"01234567".ljust(32, b"\0")
