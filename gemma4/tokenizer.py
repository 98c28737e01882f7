"""Text to token ids and back, from the metadata of a GGUF file alone.

    tokenizer = tokenizer_from_metadata(file.metadata, file.path)
    ids = tokenizer.encode("The capital of France is")     # BOS first, exactly once
    text = tokenizer.decode(ids)

Special tokens. `encode(text)` never turns text into a special token: "<|turn>" typed by a user is spelled with
ordinary pieces. `parse_special=True` maps the text of a special token to its id, for text the program wrote itself.
Special are, in a Gemma 4 vocabulary, the CONTROL and USER_DEFINED tokens (turns, channels, tool calls); in a
SentencePiece vocabulary (Gemma 3) the CONTROL tokens only: its USER_DEFINED pieces are whitespace runs, HTML tags and
image markers, which SentencePiece and llama.cpp always recognise in text.

Decoding. A literal "▁" (U+2581) in the input comes back as a space: the vocabulary writes spaces that way. Byte
tokens that do not form UTF-8 become U+FFFD. CONTROL tokens are left out unless `skip_special=False`; USER_DEFINED ones
are kept, so that a caller can see channels and tool calls.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4.quant.errors import TokenizerError
from gemma4.vocabulary import BPE_MODEL, TOKENS_KEY, TokenType, Vocabulary, vocabulary_from_metadata

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import MetadataValue

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_HIDDEN = (TokenType.CONTROL, TokenType.UNKNOWN)


def has_tokenizer(metadata: Mapping[str, MetadataValue]) -> bool:
    """Whether a GGUF file's metadata describes one."""
    return metadata.get("tokenizer.ggml.model", "none") != "none"


def tokenizer_from_metadata(metadata: Mapping[str, MetadataValue], path: Path | None = None) -> Tokenizer:
    """The tokenizer that a GGUF file's `tokenizer.ggml.*` metadata describes.

    path: named in errors. Raises TokenizerError if the file has no tokenizer, one of an unknown kind, or a broken one.
    """
    vocabulary = vocabulary_from_metadata(metadata, path)
    if vocabulary.model == BPE_MODEL:
        from gemma4.bpe import bpe_encoder as encoder
    else:
        from gemma4.spm import spm_encoder as encoder
    return Tokenizer(vocabulary, encoder(vocabulary))


class Tokenizer:
    """A vocabulary and the function that encodes ordinary text with it. Safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary, encode_ordinary: Callable[[str], list[int]]) -> None:
        self._vocabulary = vocabulary
        self._encode_ordinary = encode_ordinary
        self._special = _SpecialTexts(vocabulary.special)
        self._bytes = _byte_values(vocabulary)
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.add_bos = vocabulary.add_bos
        self.suppress_ids = vocabulary.suppress_ids

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        add_bos: start with BOS if the vocabulary asks for it and the text did not already give it.
        parse_special: map special tokens' texts to their ids; leave False for text from users.
        Raises TokenizerError on a lone surrogate.
        """
        ids: list[int] = []
        for piece in self.split_special(text) if parse_special else (text,):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self.encode_ordinary(piece)
        return self.with_bos(ids) if add_bos else ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of `text` with no BOS and no special token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode: lone surrogate at character {error.start}", field="text"
            ) from error
        return self._encode_ordinary(text)

    def split_special(self, text: str) -> Iterator[str | int]:
        """Cut `text` at the texts of special tokens: their ids, and the non-empty strings between them."""
        return self._special.split(text)

    @property
    def special_first_characters(self) -> frozenset[str]:
        """Every special token's text starts with one of these."""
        return self._special.first_characters

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text, if there is one."""
        return self._vocabulary.special.get(text)

    def with_bos(self, ids: list[int]) -> list[int]:
        """`ids` with BOS in front, unless it is there already or the vocabulary wants none."""
        return ids if not self.add_bos or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Raises TokenizerError on an id outside the vocabulary."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder to feed one id at a time; the pieces it returns join to what `decode` returns."""
        return StreamDecoder(self, skip_special=skip_special, strip_space=self._vocabulary.add_space_prefix)

    def token_text(self, token_id: int) -> str:
        """The vocabulary's text of one token, as stored ("▁" for a space, "<0x0A>" for a byte)."""
        self._check_id(token_id)
        return self._vocabulary.tokens[token_id]

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """What one token adds to a decoded text: UTF-8, or a part of it for a byte token."""
        self._check_id(token_id)
        if token_id in self._bytes:
            return self._bytes[token_id]
        if skip_special and self._vocabulary.types[token_id] in _HIDDEN:
            return b""
        return self._vocabulary.tokens[token_id].replace("▁", " ").encode()

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}", field="ids")


class StreamDecoder:
    """Decodes ids one by one and holds back bytes that do not yet form a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes final; empty while a character is incomplete."""
        data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        if data and self._strip_space:
            # The encoder put this space in front of the text.
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD if it stops inside a character, otherwise empty."""
        return self._utf8.decode(b"", final=True)


class _SpecialTexts:
    """Finds special tokens in text, leftmost first and longest first."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._lengths = sorted({len(text) for text in ids}, reverse=True)
        self.first_characters = frozenset(text[0] for text in ids)
        self._first = re.compile("|".join(map(re.escape, sorted(self.first_characters))) or r"(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        done = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < done:
                continue
            for length in self._lengths:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None:
                    if done < start:
                        yield text[done:start]
                    yield token_id
                    done = start + length
                    break
        if done < len(text):
            yield text[done:]


def _byte_values(vocabulary: Vocabulary) -> dict[int, bytes]:
    values = {}
    for i, kind in enumerate(vocabulary.types):
        if kind == TokenType.BYTE:
            match = _BYTE_TOKEN.fullmatch(vocabulary.tokens[i])
            if match is None:
                raise vocabulary.error(
                    f"byte token {i} reads {vocabulary.tokens[i]!r:.80}, expected <0xNN>", TOKENS_KEY
                )
            values[i] = bytes.fromhex(match[1])
    return values
