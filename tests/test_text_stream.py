"""Text from ids as it becomes final: stop strings, characters of several tokens, end of generation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4.text_stream import stream_text
from gemma4.tokenizer import Tokenizer, tokenizer_from_metadata
from tests.tiny_vocabulary import FIRST_BYTE, TURN_END, vocabulary

TOKENIZER = tokenizer_from_metadata(vocabulary())


def pieces(text: str) -> list[int]:
    """One id for each character the vocabulary holds, bytes for the others."""
    return TOKENIZER.encode(text, add_bos=False)


def as_bytes(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def word(text: str) -> int:
    (token_id,) = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_text(i) == text]
    return token_id


def cut(text: str, stop: list[str]) -> str:
    """The specification: `text` up to the stop string that ends first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [len(word) for word in stop if text[:end].endswith(word)]
        if found:
            return text[: end - max(found)]
    return text


def test_without_stop_strings_every_token_is_given_at_once() -> None:
    assert list(stream_text(pieces("abc"), TOKENIZER)) == ["a", "b", "c"]
    assert list(stream_text([word("▁se"), word("the")], TOKENIZER)) == [" se", "the"]
    assert list(stream_text([], TOKENIZER)) == []


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    assert list(stream_text(pieces("xaby"), TOKENIZER, ["abc"])) == ["x", "aby"]
    assert list(stream_text(pieces("aaab"), TOKENIZER, ["aab"])) == ["a"]
    assert list(stream_text(pieces("xab"), TOKENIZER, ["abc"])) == ["x", "ab"]


def test_a_stop_string_over_tokens_ends_the_text() -> None:
    ids = [word("the"), word("ing"), word("ed"), word("▁se")]
    for stop, text in [("ing", "the"), ("ein", "th"), ("ged", "thein"), ("heinged s", "t"), ("e", "th")]:
        assert "".join(stream_text(ids, TOKENIZER, [stop])) == text, stop
    assert list(stream_text(ids, TOKENIZER, ["the"])) == []
    assert "".join(stream_text(ids, TOKENIZER, ["unseen"])) == "theinged se"


def test_nothing_is_read_after_a_stop_string() -> None:
    read = []

    def ids() -> Iterator[int]:
        for token in pieces("abcdef"):
            read.append(token)
            yield token

    assert "".join(stream_text(ids(), TOKENIZER, ["cd"])) == "ab"
    assert read == pieces("abcd")


def test_of_two_stop_strings_the_one_that_is_complete_first_counts() -> None:
    assert "".join(stream_text(pieces("abc"), TOKENIZER, ["abc", "b"])) == "a"
    assert "".join(stream_text([word("the")], TOKENIZER, ["the", "h"])) == "t"
    assert "".join(stream_text(pieces("abc"), TOKENIZER, ["bc", "abc"])) == ""


def test_an_empty_stop_string_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="stop: found an empty string"):
        stream_text([], TOKENIZER, ["a", ""])


@pytest.mark.parametrize("text", ["é", "日本", "🙂", "añb"])
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    found = list(stream_text(as_bytes(text), TOKENIZER))
    assert found == list(text)


def test_half_a_character_is_replaced() -> None:
    smile = as_bytes("🙂")
    assert list(stream_text([*pieces("a"), *smile[:2], *pieces("b")], TOKENIZER)) == ["a", "\N{REPLACEMENT CHARACTER}b"]
    assert list(stream_text([*pieces("a"), *smile[:3]], TOKENIZER)) == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert list(stream_text([*smile[:3], TURN_END], TOKENIZER)) == ["\N{REPLACEMENT CHARACTER}"]


def test_stop_strings_of_several_bytes() -> None:
    ids = [*pieces("ab"), *as_bytes("日本"), *pieces("c")]
    assert "".join(stream_text(ids, TOKENIZER, ["日本"])) == "ab"
    assert "".join(stream_text(ids, TOKENIZER, ["本c"])) == "ab日"
    assert "".join(stream_text([*pieces("a"), *as_bytes("🙂")[:3]], TOKENIZER, ["\N{REPLACEMENT CHARACTER}"])) == "a"


def test_end_of_generation_is_no_text() -> None:
    assert list(stream_text([*pieces("ab"), TURN_END], TOKENIZER)) == ["a", "b"]
    assert "".join(stream_text([*pieces("ab"), TOKENIZER.eos_id], TOKENIZER, ["bc"])) == "ab"


def test_an_end_token_that_is_ordinary_text_is_no_text_either() -> None:
    tokenizer: Tokenizer = tokenizer_from_metadata(vocabulary(eot_token_id=word("ed")))
    assert "".join(stream_text([word("the"), word("ed")], tokenizer)) == "the"


@given(
    text=st.text(alphabet="abé🙂", max_size=14),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    in_bytes=st.lists(st.booleans(), min_size=14, max_size=14),
)
def test_the_text_does_not_depend_on_the_borders_of_tokens(text: str, stop: list[str], in_bytes: list[bool]) -> None:
    ids = [i for c, split in zip(text, in_bytes, strict=False) for i in (as_bytes(c) if split else pieces(c))]
    found = list(stream_text(ids, TOKENIZER, stop))
    assert "".join(found) == cut(text, stop)
    assert "" not in found


@given(
    words=st.lists(st.sampled_from(["the", "ing", "ed", "e", "t", "h", "▁te"]), max_size=8),
    stop=st.lists(st.text(alphabet="theindg ", min_size=1, max_size=5), max_size=3),
)
def test_the_text_does_not_depend_on_the_length_of_tokens(words: list[str], stop: list[str]) -> None:
    found = "".join(stream_text([word(text) for text in words], TOKENIZER, stop))
    assert found == cut("".join(words).replace("▁", " "), stop)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_ids_give_the_decoded_text(ids: list[int]) -> None:
    ids = [i for i in ids if i not in TOKENIZER.eog_ids]
    assert "".join(stream_text(ids, TOKENIZER)) == TOKENIZER.decode(ids)
