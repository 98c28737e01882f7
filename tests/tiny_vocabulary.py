"""A Gemma 4 vocabulary of 320 tokens as GGUF metadata, to go with the tiny models of `tests.tiny_gguf`.

Ids: 0 to 3 are pad, eos, bos and unk, then come 256 bytes, the two turn marks, and ordinary pieces of text.
"""

from __future__ import annotations

from typing import Any

SIZE = 320
FIRST_BYTE = 4
TURN, TURN_END = 260, 261
FIRST_PIECE = 262
NON_ASCII_BYTES = list(range(FIRST_BYTE + 0x80, FIRST_BYTE + 0x100))

_NORMAL, _CONTROL, _BYTE = 1, 3, 6


def vocabulary(**keys: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` metadata. keys: values to replace or add, by the last part of their key."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz▁.,!", "é", "日", "🙂"]
    pieces += [f"▁{a}{b}" for a in "stw" for b in "aeiou"] + ["the", "ing", "ed"]
    pieces += [f"x{i}" for i in range(SIZE - FIRST_PIECE - len(pieces))]
    entries = [(text, _CONTROL) for text in ("<pad>", "<eos>", "<bos>", "<unk>")]
    entries += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    entries += [("<|turn>", _CONTROL), ("<turn|>", _CONTROL), *((text, _NORMAL) for text in pieces)]
    assert len(entries) == SIZE
    metadata = {
        "model": "gemma4",
        "tokens": [text for text, _ in entries],
        "token_type": [kind for _, kind in entries],
        "merges": ["e d"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**metadata, **keys}.items()}
