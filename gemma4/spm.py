"""Gemma 3's tokenizer: SentencePiece BPE with byte fallback, rebuilt from the vocabulary.

The `sentencepiece` package loads a serialized `ModelProto`. A GGUF file holds the same content in its metadata, so
the message is written here, field by field (numbers from sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gemma4.vocabulary import TOKENS_KEY, TokenType

if TYPE_CHECKING:
    from gemma4.vocabulary import Vocabulary


# score = 2 (32-bit), type = 3 (varint below 0x80), each after its tag byte.
_SCORE_AND_TYPE = struct.Struct("<BfBB")


def spm_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """A function text -> ids that never produces a control token, whatever the text.

    Raises TokenizerError if SentencePiece refuses the vocabulary (duplicate, empty or missing pieces).
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model_proto(vocabulary))
    except RuntimeError as error:
        raise vocabulary.error(f"SentencePiece refuses the vocabulary: {error}", TOKENS_KEY) from error

    def encode(text: str) -> list[int]:
        ids: list[int] = processor.EncodeAsIds(text)
        return ids

    return encode


def model_proto(vocabulary: Vocabulary) -> bytes:
    """Serialize the vocabulary as a SentencePiece `ModelProto` with an identity normalizer."""
    trainer = b"".join(
        (
            _integer(3, 2),  # model_type = BPE
            _integer(4, len(vocabulary.tokens)),  # vocab_size
            _integer(35, 1),  # byte_fallback
            _integer(40, vocabulary.unknown_id),
            _integer(41, vocabulary.bos_id),
            _integer(42, vocabulary.eos_id),
            _integer(43, -1),  # pad_id: unused when encoding
        )
    )
    normalizer = b"".join(
        (
            _bytes(1, b"identity"),
            _integer(3, vocabulary.add_space_prefix),  # add_dummy_prefix
            _integer(4, 0),  # remove_extra_whitespaces
            _integer(5, 1),  # escape_whitespaces
        )
    )
    pieces = b"".join(_bytes(1, piece) for piece in _pieces(vocabulary))
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def _pieces(vocabulary: Vocabulary) -> Iterator[bytes]:
    """One serialized `SentencePiece` (piece, score, type) per token."""
    for i, (token, score, kind) in enumerate(zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)):
        if i == vocabulary.unknown_id:
            kind = TokenType.UNKNOWN  # files type it as control; SentencePiece needs exactly one unknown piece
        elif kind == TokenType.UNKNOWN:
            kind = TokenType.CONTROL
        # Files hold user-defined pieces with plain spaces.
        text = token.replace(" ", "▁") if kind == TokenType.USER_DEFINED else token
        yield _bytes(1, text.encode()) + _SCORE_AND_TYPE.pack(0x15, score, 0x18, kind)


def _bytes(field: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _integer(field: int, value: int) -> bytes:
    """A varint protobuf field; negative numbers are written as 64-bit two's complement."""
    return _varint(field << 3) + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE_BYTE[value]
    return _ONE_BYTE_MORE[value & 0x7F] + _varint(value >> 7)


_ONE_BYTE = [bytes([value]) for value in range(0x80)]
_ONE_BYTE_MORE = [bytes([value | 0x80]) for value in range(0x80)]
