"""Ids against llama.cpp's, special tokens kept out of text, decoding whole and streamed, broken vocabularies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4.quant.errors import TokenizerError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.tokenizer import Tokenizer, tokenizer_from_metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@pytest.fixture(scope="module")
def vocab_path(unpacked: Callable[[str], Path]) -> Path:
    return unpacked("ggml-vocab-gemma-4.gguf")


@pytest.fixture(scope="module")
def gemma4(vocab_path: Path) -> Tokenizer:
    with GGUFFile.open(vocab_path) as gguf:
        return tokenizer_from_metadata(gguf.metadata, vocab_path)


@pytest.fixture(scope="module")
def gemma3(real_gguf: Path) -> Tokenizer:
    with GGUFFile.open(real_gguf) as gguf:
        return tokenizer_from_metadata(gguf.metadata, real_gguf)


@pytest.fixture(scope="module")
def vocab_cases(data_dir: Path) -> list[tuple[str, list[int]]]:
    texts = (data_dir / "ggml-vocab-gemma-4.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (data_dir / "ggml-vocab-gemma-4.gguf.out").read_text().splitlines()
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


def byte_vocabulary(model: str, extra: list[tuple[str, int]], /, **keys: Any) -> dict[str, Any]:
    """Metadata of a small vocabulary: pad, eos, bos, unk, 256 bytes, then `extra` (text, type) from id 260."""
    control = [(text, CONTROL) for text in ("<pad>", "<eos>", "<bos>", "<unk>")]
    entries = control + [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + extra
    metadata = {
        "model": model,
        "tokens": [text for text, _ in entries],
        "token_type": [kind for _, kind in entries],
        "scores": [-float(i) for i in range(len(entries))],
        "merges": [],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**metadata, **keys}.items()}


# Ids


def test_all_vocabulary_strings_get_the_reference_ids(
    gemma4: Tokenizer, vocab_cases: list[tuple[str, list[int]]]
) -> None:
    assert len(vocab_cases) == 46
    assert [gemma4.encode(text, add_bos=False) for text, _ in vocab_cases] == [ids for _, ids in vocab_cases]


def test_gemma3_prompts_get_llama_cpp_ids(gemma3: Tokenizer, data_dir: Path) -> None:
    golden = json.loads((data_dir / "gemma3-270m.json").read_text())
    for case in golden["greedy"]:
        assert gemma3.encode(case["prompt"]) == case["prompt_ids"]
        assert gemma3.decode(case["greedy_ids"]) == case["text"]
    assert gemma3.encode(golden["forced"]["text"]) == golden["forced"]["ids"]


def test_gemma3_odd_texts_get_llama_cpp_ids(gemma3: Tokenizer, data_dir: Path) -> None:
    for case in json.loads((data_dir / "tokenizer/gemma3_llama_cpp.json").read_text()):
        assert gemma3.encode(case["text"], add_bos=False) == case["ids"], case["text"]
        assert gemma3.encode(case["text"], parse_special=True) == case["ids_parse_special"], case["text"]


def test_both_algorithms_agree_on_the_vocabulary_they_share(
    gemma3: Tokenizer, gemma4: Tokenizer, vocab_cases: list[tuple[str, list[int]]]
) -> None:
    assert [gemma3.encode(text) for text, _ in vocab_cases] == [gemma4.encode(text) for text, _ in vocab_cases]


def test_long_newline_runs(gemma4: Tokenizer) -> None:
    assert gemma4.encode("\n" * 40, add_bos=False) == [137, 115]


# BOS, end of generation, special tokens


def test_bos_comes_exactly_once(gemma4: Tokenizer) -> None:
    assert gemma4.encode("hi") == [2, *gemma4.encode("hi", add_bos=False)]
    assert gemma4.encode("<bos>hi", parse_special=True) == gemma4.encode("hi")
    assert gemma4.encode("") == [2]


def test_gemma4_has_bos_even_where_the_file_says_no() -> None:
    tokenizer = tokenizer_from_metadata(byte_vocabulary("gemma4", [("a", NORMAL)], add_bos_token=False))
    assert tokenizer.add_bos
    assert tokenizer.encode("a") == [2, 260]


def test_a_sentencepiece_file_may_say_no_bos() -> None:
    tokenizer = tokenizer_from_metadata(
        byte_vocabulary("llama", [("a", NORMAL)], add_bos_token=False, add_space_prefix=False)
    )
    assert tokenizer.encode("a") == [260]


def test_end_of_generation_ids(gemma4: Tokenizer, gemma3: Tokenizer) -> None:
    assert gemma4.eog_ids == {1, 50, 106}
    assert gemma3.eog_ids == {1, 106}


def test_end_of_generation_ids_from_metadata() -> None:
    extra = [("<turn|>", CONTROL), ("<end_of_turn>", NORMAL), ("a", NORMAL)]
    metadata = byte_vocabulary("gemma4", extra, eos_token_id=260, eot_token_id=262, suppress_tokens=[261, 5])
    tokenizer = tokenizer_from_metadata(metadata)
    assert tokenizer.eog_ids == {1, 260, 262}
    assert tokenizer.eos_id == 260
    assert tokenizer.suppress_ids == (261, 5)


SPECIAL_TEXTS = ["<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool_call>", "<|channel>", '<|"|>', "<|image|>", "<unk>"]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_texts_become_ids_only_on_request(gemma4: Tokenizer, text: str) -> None:
    (special,) = gemma4.encode(text, add_bos=False, parse_special=True)
    assert gemma4.token_text(special) == text
    plain = gemma4.encode(f"a {text} b", add_bos=False)
    assert special not in plain
    assert gemma4.decode(plain) == f"a {text} b"


@pytest.mark.parametrize("text", ["<start_of_turn>", "<end_of_turn>", "<bos>", "<unused7>"])
def test_gemma3_control_texts_become_ids_only_on_request(gemma3: Tokenizer, text: str) -> None:
    (special,) = gemma3.encode(text, add_bos=False, parse_special=True)
    assert special not in gemma3.encode(text, add_bos=False)
    assert gemma3.decode(gemma3.encode(text)) == text


def test_gemma3_user_defined_pieces_are_text(gemma3: Tokenizer) -> None:
    assert gemma3.encode("<table>   \n\n", add_bos=False) == [168, 139, 108]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TEXTS, "<|", "turn", "|>", "<", " ", "\n", "é", "x"]), max_size=12))
def test_text_never_becomes_a_special_token(gemma4: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = gemma4.encode(text, add_bos=False)
    assert not {gemma4.token_text(i) for i in ids} & set(SPECIAL_TEXTS)
    assert gemma4.decode(ids) == text


def test_special_tokens_split_text_leftmost_and_longest() -> None:
    extra = [("<a", CONTROL), ("<a>", CONTROL), ("a>", CONTROL), ("x", NORMAL)]
    tokenizer = tokenizer_from_metadata(byte_vocabulary("gemma4", extra))
    assert list(tokenizer.split_special("x<a>a><ax<")) == ["x", 261, 262, 260, "x<"]


# Decoding


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_gemma4_text_survives_the_round_trip(gemma4: Tokenizer, text: str) -> None:
    assert gemma4.decode(gemma4.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_gemma3_text_survives_the_round_trip(gemma3: Tokenizer, text: str) -> None:
    assert gemma3.decode(gemma3.encode(text)) == text


# Byte tokens (238 to 493) are frequent here, so that characters start, continue and break off in all ways.
TOKEN_IDS = st.lists(st.integers(238, 493) | st.integers(0, 262143), max_size=20)


@settings(max_examples=300, deadline=None)
@given(TOKEN_IDS, st.booleans())
def test_streamed_pieces_join_to_the_decoded_text(gemma4: Tokenizer, ids: list[int], skip_special: bool) -> None:
    stream = gemma4.stream(skip_special=skip_special)
    pieces = [stream.push(i) for i in ids]
    whole = b"".join(gemma4.token_bytes(i, skip_special=skip_special) for i in ids).decode(errors="replace")
    assert "".join(pieces) + stream.flush() == gemma4.decode(ids, skip_special=skip_special) == whole


def test_a_stream_holds_back_an_incomplete_character(gemma4: Tokenizer) -> None:
    stream = gemma4.stream()
    llama = gemma4.encode("🦙", add_bos=False)
    assert len(llama) == 4
    assert [stream.push(i) for i in llama] == ["", "", "", "🦙"]
    assert stream.push(llama[0]) == ""
    assert stream.push(gemma4.encode("a", add_bos=False)[0]) == "\ufffda"
    assert stream.push(llama[0]) == ""
    assert stream.flush() == "\ufffd"


def test_decoding_hides_control_and_shows_user_defined_tokens(gemma4: Tokenizer) -> None:
    ids = gemma4.encode("<bos><|turn>a<|channel>b<turn|>", parse_special=True)
    assert gemma4.decode(ids) == "a<|channel>b"
    assert gemma4.decode(ids, skip_special=False) == "<bos><|turn>a<|channel>b<turn|>"


def test_the_space_prefix_is_added_and_taken_away() -> None:
    tokenizer = tokenizer_from_metadata(byte_vocabulary("llama", [("▁", NORMAL), ("a", NORMAL)]))
    assert tokenizer.encode("a a") == [2, 260, 261, 260, 261]
    assert tokenizer.decode([2, 260, 261, 260, 261]) == "a a"
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


# What is refused


def test_a_file_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer") as caught:
        tokenizer_from_metadata({"tokenizer.ggml.model": "none"}, tmp_path)
    assert caught.value.path == tmp_path
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        tokenizer_from_metadata({})


A_VOCABULARY = [("a", NORMAL), ("b", NORMAL), ("ab", NORMAL), ("<turn|>", CONTROL)]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"model": "gpt2"}, "model", "unsupported tokenizer 'gpt2'"),
        ({"model": 7}, "model", "expected a string"),
        ({"tokens": "abc"}, "tokens", "expected an array"),
        ({"tokens": [1, 2]}, "tokens", "expected an array of str, found int"),
        ({"token_type": [1]}, "token_type", "expected 264 entries, one per token, found 1"),
        ({"token_type": [9] * 264}, "token_type", "expected token types 1 to 6, found 9"),
        ({"token_type": [BYTE] * 264}, "tokens", "byte token 0 reads '<pad>'"),
        ({"bos_token_id": 264}, "bos_token_id", "expected a token id below 264, found 264"),
        ({"eos_token_id": -1}, "eos_token_id", "found -1"),
        ({"eos_token_id": True}, "eos_token_id", "found True"),
        ({"suppress_tokens": [999]}, "suppress_tokens", "found 999"),
        ({"merges": ["ab"]}, "merges", "merge 0 ('ab') holds no space"),
        ({"merges": ["a a"]}, "merges", "'aa', which is not a token"),
        ({"merges": ["a b", "ab q"]}, "merges", "which is not a token"),
        ({"tokens": ["a"] * 264}, "tokens", "263 tokens occur twice"),
    ],
)
def test_broken_gemma4_vocabularies(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        tokenizer_from_metadata(byte_vocabulary("gemma4", A_VOCABULARY, **changes))
    assert caught.value.field == f"tokenizer.ggml.{field}"
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges", "bos_token_id", "eos_token_id"])
def test_missing_keys_are_named(key: str) -> None:
    metadata = byte_vocabulary("gemma4", A_VOCABULARY)
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(TokenizerError, match=rf"tokenizer\.ggml\.{key}: missing"):
        tokenizer_from_metadata(metadata)


@pytest.mark.parametrize("extra", [[("x", CONTROL)], [("x", NORMAL), ("y", NORMAL), ("xy", USER_DEFINED)]])
def test_a_special_token_that_text_could_spell_is_refused(extra: list[tuple[str, int]]) -> None:
    with pytest.raises(TokenizerError, match="special token"):
        tokenizer_from_metadata(byte_vocabulary("gemma4", extra, merges=["x y"] if len(extra) > 1 else []))


@pytest.mark.parametrize(
    "extra",
    [[("a", NORMAL), ("a", NORMAL)], [("", NORMAL)], [("<0x00>", NORMAL)]],
    ids=["twice", "empty", "byte twice"],
)
def test_broken_sentencepiece_vocabularies(extra: list[tuple[str, int]]) -> None:
    with pytest.raises(TokenizerError, match="SentencePiece refuses the vocabulary"):
        tokenizer_from_metadata(byte_vocabulary("llama", extra))


def test_lone_surrogates_and_foreign_ids_are_refused(gemma4: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        gemma4.encode("a\ud800")
    for outside in (-1, 262144):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            gemma4.decode([outside])
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            gemma4.token_text(outside)


def test_importing_the_tokenizer_loads_no_heavy_package() -> None:
    code = (
        "import sys, gemma4.tokenizer, gemma4.chat\n"
        "print(sorted({'torch', 'tokenizers', 'sentencepiece', 'jinja2', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
