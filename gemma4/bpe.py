"""Gemma 4's tokenizer: byte-fallback BPE over whole texts, spaces written as U+2581, no pre-tokenizer.

Built on the `tokenizers` package. llama.cpp first cuts the text at newline runs; every merge that holds a newline is
newline-only, so merging the whole text gives the same ids.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

from gemma4.vocabulary import MERGES_KEY, TOKENS_KEY

if TYPE_CHECKING:
    from gemma4.vocabulary import Vocabulary


def bpe_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """A function text -> ids that never produces a special token, whatever the text.

    Raises TokenizerError if the merges do not fit the tokens, or could spell a special token.
    """
    from tokenizers import Tokenizer, models

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    _check_tokens(vocabulary, ids)
    model = models.BPE(vocab=ids, merges=_split_merges(vocabulary, ids), byte_fallback=True, ignore_merges=False)
    tokenizer = Tokenizer(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text.replace(" ", "▁"), add_special_tokens=False).ids
        return ids

    return encode


def _check_tokens(vocabulary: Vocabulary, ids: dict[str, int]) -> None:
    if len(ids) != len(vocabulary.tokens):
        raise vocabulary.error(f"{len(vocabulary.tokens) - len(ids)} tokens occur twice", TOKENS_KEY)
    # With all byte tokens present, no text is ever unknown.
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in ids]:
        raise vocabulary.error(f"the token <0x{missing[0]:02X}> is missing", TOKENS_KEY)
    if short := [token for token in vocabulary.special if len(token) == 1]:
        raise vocabulary.error(f"the special token {short[0]!r} is one character, so any text spells it", TOKENS_KEY)


def _split_merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Cut each merge at its first space after index 0, where a token may have its own."""
    pairs = []
    for rank, merge in enumerate(vocabulary.merges):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise vocabulary.error(f"merge {rank} ({merge!r:.80}) holds no space", MERGES_KEY)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    made = set(map("".join, pairs))
    if foreign := made.union(chain.from_iterable(pairs)) - ids.keys():
        raise vocabulary.error(f"the merges use {min(foreign)!r:.80}, which is not a token", MERGES_KEY)
    if spelled := made & vocabulary.special.keys():
        raise vocabulary.error(f"the merges spell the special token {min(spelled)!r:.80}", MERGES_KEY)
    return pairs
