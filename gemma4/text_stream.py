"""From token ids to text as it becomes final: incomplete characters and possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gemma4.tokenizer import Tokenizer


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yields pieces of text; their concatenation ends before the first occurrence of any `stop` string.

    End-of-generation ids are not part of the text.
    """
    decoder = tokenizer.stream()
    held = ""
    for token in ids:
        held += "" if token in tokenizer.eog_ids else decoder.push(token)
        end = _first_stop(held, stop)
        if end is not None:
            yield held[:end]
            return
        final = len(held) - _possible_stop(held, stop)
        if final:
            yield held[:final]
            held = held[final:]
    held += decoder.flush()
    end = _first_stop(held, stop)
    if held[:end]:
        yield held[:end]


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    found = [text.index(word) for word in stop if word in text]
    return min(found, default=None)


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(word.startswith(text[-n:]) for word in stop)), 0)
