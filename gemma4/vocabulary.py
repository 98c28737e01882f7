"""The vocabulary of a GGUF file: its `tokenizer.ggml.*` metadata, checked and typed.

Nothing here encodes text. `bpe.py` and `spm.py` build an encoder from a `Vocabulary`, `tokenizer.py` joins the two.
Source of the rules: llama.cpp's vocabulary loader (token types, BOS and end-of-generation overrides).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4.quant.errors import TokenizerError

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import MetadataValue

MODEL_KEY = "tokenizer.ggml.model"
TOKENS_KEY = "tokenizer.ggml.tokens"
SCORES_KEY = "tokenizer.ggml.scores"
TYPES_KEY = "tokenizer.ggml.token_type"
MERGES_KEY = "tokenizer.ggml.merges"
SUPPRESS_KEY = "tokenizer.ggml.suppress_tokens"
EOS_IDS_KEY = "tokenizer.ggml.eos_token_ids"

PRE_KEY = "tokenizer.ggml.pre"

BPE_MODEL = "gemma4"
SPM_MODEL = "llama"

# Token texts that end a turn whatever the metadata says; they count only where the file types them as special.
_TURN_ENDS = {BPE_MODEL: ("<eos>", "<turn|>", "<|tool_response>"), SPM_MODEL: ("<end_of_turn>",)}
_EOG_NAMES = ("eot_token_id", "eom_token_id")
# Marks around reasoning and tool calls: a caller has to see them, though some files type them as CONTROL.
_VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
_BYTE_TEXTS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class TokenType(IntEnum):
    """GGUF token types; the numbers are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """One vocabulary. A token's id is its index in `tokens`, `types` and (if present) `scores`.

    model: "gemma4" (byte-fallback BPE by `merges`) or "llama" (SentencePiece BPE by `scores`).
    special: text -> id of the tokens that text never becomes unless special parsing is asked for.
    merges: "left right" pairs, best first; empty for "llama". scores: log-probabilities; empty for "gemma4".
    """

    model: str
    path: Path | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    bos_id: int
    eos_id: int
    unknown_id: int
    add_bos: bool
    add_space_prefix: bool
    eog_ids: frozenset[int]
    suppress_ids: tuple[int, ...]
    special: Mapping[str, int]

    def error(self, message: str, field: str | None = None) -> TokenizerError:
        return TokenizerError(message, path=self.path, field=field)


def vocabulary_from_metadata(metadata: Mapping[str, MetadataValue], path: Path | None = None) -> Vocabulary:
    """Read and check the `tokenizer.ggml.*` keys.

    Raises TokenizerError naming the key: no tokenizer in the file, a tokenizer of another kind, arrays that
    disagree in length, ids outside the vocabulary.
    """
    read = _Reader(metadata, path)
    model = read.string(MODEL_KEY, default="none")
    if read.string(PRE_KEY, default="") == BPE_MODEL:
        model = BPE_MODEL  # Ollama's files say "llama" and name the kind here
    if model == "none":
        raise read.error(MODEL_KEY, "the file has no tokenizer; pass token ids instead of text")
    if model not in (BPE_MODEL, SPM_MODEL):
        raise read.error(MODEL_KEY, f"unsupported tokenizer {model!r}, expected {BPE_MODEL!r} or {SPM_MODEL!r}")
    is_bpe = model == BPE_MODEL

    tokens = read.strings(TOKENS_KEY)
    types = read.integers(TYPES_KEY, count=len(tokens))
    if foreign := set(types) - set(TokenType):
        raise read.error(TYPES_KEY, f"expected token types 1 to 6, found {min(foreign)}")
    if is_bpe:
        types = _bpe_types(tokens, types)
    special_types = {TokenType.CONTROL, TokenType.UNKNOWN}
    if is_bpe:
        # In a SentencePiece vocabulary, user-defined pieces are whitespace runs and HTML tags: ordinary text.
        special_types.add(TokenType.USER_DEFINED)
    special = {tokens[i]: i for i, kind in enumerate(types) if kind in special_types and tokens[i]}

    def token_id(name: str) -> int:
        return read.token_id(f"tokenizer.ggml.{name}", len(tokens))

    eos_id = token_id("eos_token_id")
    eog_ids = {eos_id} | {special[text] for text in _TURN_ENDS[model] if text in special}
    eog_ids |= {token_id(name) for name in _EOG_NAMES if f"tokenizer.ggml.{name}" in metadata}
    eog_ids |= set(read.token_ids(EOS_IDS_KEY, len(tokens)))
    return Vocabulary(
        model=model,
        path=path,
        tokens=tokens,
        types=types,
        scores=() if is_bpe else read.floats(SCORES_KEY, count=len(tokens)),
        merges=read.strings(MERGES_KEY) if is_bpe else (),
        bos_id=token_id("bos_token_id"),
        eos_id=eos_id,
        unknown_id=token_id("unknown_token_id"),
        # Some Gemma 4 files say False, but the model does not work without BOS.
        add_bos=is_bpe or read.flag("tokenizer.ggml.add_bos_token", default=True),
        add_space_prefix=not is_bpe and read.flag("tokenizer.ggml.add_space_prefix", default=True),
        eog_ids=frozenset(eog_ids),
        suppress_ids=read.token_ids(SUPPRESS_KEY, len(tokens)),
        special=special,
    )


def _bpe_types(tokens: Sequence[str], types: Sequence[int]) -> tuple[int, ...]:
    """The types of llama.cpp's converter, whichever wrote the file: visible marks are USER_DEFINED, bytes are BYTE."""
    changed = list(types)
    has_bytes = TokenType.BYTE in types
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.CONTROL and text in _VISIBLE:
            changed[i] = TokenType.USER_DEFINED
        elif not has_bytes and kind == TokenType.NORMAL and text in _BYTE_TEXTS:
            changed[i] = TokenType.BYTE
    return tuple(changed)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed look-ups in the metadata; every failure is a TokenizerError that names the key."""

    metadata: Mapping[str, MetadataValue]
    path: Path | None

    def error(self, key: str, message: str) -> TokenizerError:
        return TokenizerError(message, path=self.path, field=key)

    def string(self, key: str, default: str) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, found {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected a bool, found {type(value).__name__}")
        return value

    def token_id(self, key: str, vocab_size: int) -> int:
        if key not in self.metadata:
            raise self.error(key, "missing")
        value = self.metadata[key]
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.error(key, f"expected a token id below {vocab_size}, found {value!r:.80}")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        ids = self.integers(key) if key in self.metadata else ()
        for value in ids:
            if not 0 <= value < vocab_size:
                raise self.error(key, f"expected token ids below {vocab_size}, found {value}")
        return ids

    def strings(self, key: str) -> tuple[str, ...]:
        return self._array(key, str, None)

    def integers(self, key: str, count: int | None = None) -> tuple[int, ...]:
        return self._array(key, int, count)

    def floats(self, key: str, count: int) -> tuple[float, ...]:
        return self._array(key, float, count)

    def _array(self, key: str, kind: type, count: int | None) -> tuple[Any, ...]:
        if key not in self.metadata:
            raise self.error(key, "missing")
        value = self.metadata[key]
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.error(key, f"expected an array, found {type(value).__name__}")
        items = tuple(value)
        if foreign := set(map(type, items)) - {kind}:
            raise self.error(key, f"expected an array of {kind.__name__}, found {foreign.pop().__name__}")
        if count is not None and len(items) != count:
            raise self.error(key, f"expected {count} entries, one per token, found {len(items)}")
        return items
