"""The generation loop: prefill in chunks, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4.quant.errors import ContextError

if TYPE_CHECKING:
    from gemma4.cache import KVCache
    from gemma4.history import Session
    from gemma4.model import TextModel


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ContextError for an empty prompt, ValueError for an id outside the vocabulary."""
    if not ids:
        raise ContextError("found no tokens, expected at least one", field="ids")
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"ids: found {outside}, expected 0 to {vocab_size - 1}")


@torch.inference_mode()
def prefill(
    model: TextModel, cache: KVCache, ids: Sequence[int], start: int = 0, *, all_logits: bool = False
) -> Tensor:
    """Runs `ids` at positions start, start + 1, … through the model, at most a chunk at a time.

    Returns float32 [1, vocab_size] of the last token, or [len(ids), vocab_size].
    Raises ContextError where the cache has no room.
    """
    if start + len(ids) > cache.max_seq_len:
        raise ContextError(
            f"found {start + len(ids)} tokens, the cache holds {cache.max_seq_len}; raise max_seq_len or shorten it",
            field="ids",
        )
    device = model.norm.weight.device
    tokens = torch.tensor(ids, dtype=torch.int64, device=device)
    positions = torch.arange(start, start + len(ids), dtype=torch.int64, device=device)
    logits: list[Tensor] = []
    for begin in range(0, len(ids), cache.chunk_size):
        chunk = slice(begin, min(begin + cache.chunk_size, len(ids)))
        wanted = None if all_logits else int(chunk.stop == len(ids))
        with cache.up_to(start + chunk.stop):
            logits.append(model(tokens[chunk], positions[chunk], cache, wanted))
    return torch.cat(logits)


def check_room(prompt_tokens: int, max_new_tokens: int, max_seq_len: int) -> None:
    """Raises ContextError where prompt and new tokens do not fit, ValueError for a negative number of them."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected at least 0")
    needed = prompt_tokens + max_new_tokens
    if needed > max_seq_len:
        raise ContextError(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones need {needed} positions, max_seq_len is "
            f"{max_seq_len}; load with a larger max_seq_len or ask for fewer tokens",
            field="max_new_tokens",
        )


@torch.inference_mode()
def generate_tokens(
    session: Session,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    seed: int = 0,
    eog_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yields up to `max_new_tokens` ids that follow `ids`; ends after an id in `eog_ids`, which is yielded too.

    Tokens that the session holds from before do not run again. Raises ContextError where the ids do not fit in its
    cache. A session whose generation was left is as good as any; one whose generation failed is not.
    """
    loop, history = session.loop, session.history
    check_room(len(ids), max_new_tokens, loop.cache.max_seq_len)
    start = history.resume(ids)
    history.will_write(len(ids))
    loop.model.reserve_workspace(len(ids) - start)
    logits = prefill(loop.model, loop.cache, ids[start:], start)
    history.end_prompt(ids, len(ids) + max_new_tokens)
    loop.start(logits, len(ids), seed)
    for remaining in range(max_new_tokens - 1, -1, -1):
        read = loop.read()
        if loop.runs_ahead and remaining:
            _advance(session)
        new_id = read()
        if loop.runs_ahead and remaining:
            history.ids.append(new_id)
        yield new_id
        if new_id in eog_ids:
            return
        if remaining and not loop.runs_ahead:
            _advance(session)
            history.ids.append(new_id)


def _advance(session: Session) -> None:
    session.history.will_write(len(session.history.ids) + 1)
    session.loop.advance()
