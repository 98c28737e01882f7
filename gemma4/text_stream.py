"""From token ids to text as it becomes final: incomplete characters and possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gemma4.tokenizer import Tokenizer


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yields pieces of text, none empty; their concatenation ends before the `stop` string that is complete first.

    Where two are complete at once, the longer counts, so that the text does not depend on the borders of tokens.
    End-of-generation ids are not part of the text. Raises ValueError for an empty stop string.
    """
    if "" in stop:
        raise ValueError("stop: found an empty string, expected at least one character")
    return _pieces(ids, tokenizer, stop)


def _pieces(ids: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    decoder = tokenizer.stream()
    held = ""
    for token in ids:
        held += "" if token in tokenizer.eog_ids else decoder.push(token)
        end = _first_stop(held, stop)
        final = len(held) - _possible_stop(held, stop) if end is None else end
        if final:
            yield held[:final]
        if end is not None:
            return
        held = held[final:]
    held += decoder.flush()
    if text := held[: _first_stop(held, stop)]:
        yield text


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that ends first in `text`, the longest of those; None if there is none."""
    found = [(text.index(word) + len(word), text.index(word)) for word in stop if word in text]
    return min(found)[1] if found else None


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(word.startswith(text[-n:]) for word in stop)), 0)
