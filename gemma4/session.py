"""What one generation leaves to the next: a KV cache, the tokens it holds, and the decode loop captured on it.

A generation takes a session for itself and gives it back when it ends. The next one, if it begins with the same tokens,
runs only those after them. Generations that overlap in time have sessions of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from gemma4.cache import KVCache
from gemma4.config import CacheKind
from gemma4.decode_loop import DecodeLoop
from gemma4.model import TextModel
from gemma4.sampling import SamplingParams


class TokenHistory:
    """The tokens at positions 0, 1, … of a cache, and how far back its rings still hold them.

    ring: positions a sliding layer keeps, p in slot p % ring. window: those a query sees, its own included.
    """

    def __init__(self, window: int, ring: int) -> None:
        self.window = window
        self.ring = ring
        self.ids: list[int] = []
        self._oldest = 0  # the first position that is in every ring, and so are all from there on

    def resume(self, ids: Sequence[int]) -> int:
        """How many of the first tokens of `ids` need not run again; forgets all others. Less than len(ids).

        A query at position r sees back to r - window + 1. Whatever has been written since past the end of the ring took
        the place of older positions, so a cache that has run far ahead cannot go back a little: then it is 0.
        """
        most = min(len(self.ids), len(ids) - 1)
        start = next((i for i in range(most) if self.ids[i] != ids[i]), most)
        if self._oldest > max(0, start - self.window + 1):
            start = 0
        if start == 0:
            self._oldest = 0
        del self.ids[start:]
        return start

    def will_write(self, end: int) -> None:
        """To be called before anything is written at positions up to `end`, exclusive."""
        self._oldest = max(self._oldest, end - self.ring)


@dataclass(frozen=True, slots=True)
class Session:
    """One generation's own cache and decode loop."""

    loop: DecodeLoop
    history: TokenHistory

    @classmethod
    def begin(
        cls,
        model: TextModel,
        max_seq_len: int,
        params: SamplingParams,
        suppress_ids: Sequence[int],
        kv_cache: CacheKind = CacheKind.LOSSLESS,
    ) -> Session:
        cache = KVCache(model.config, max_seq_len, model.dtype, model.norm.weight.device, kv_cache)
        history = TokenHistory(model.config.sliding_window, cache.ring_length)
        return cls(DecodeLoop(model, cache, params, suppress_ids), history)


class SessionPool:
    """Keeps the session that was given back last. Safe to use from several threads."""

    def __init__(self, model: TextModel, max_seq_len: int, kv_cache: CacheKind = CacheKind.LOSSLESS) -> None:
        self.model = model
        self.max_seq_len = max_seq_len
        self.kv_cache = kv_cache
        self._idle: deque[Session] = deque(maxlen=1)

    def take(self, params: SamplingParams, suppress_ids: Sequence[int]) -> Session:
        """The kept session, which stays away until `put`, or a new one."""
        try:
            idle = self._idle.pop()
        except IndexError:
            return Session.begin(self.model, self.max_seq_len, params, suppress_ids, self.kv_cache)
        if idle.loop.params == params:
            return idle
        return Session(DecodeLoop(self.model, idle.loop.cache, params, suppress_ids), idle.history)

    def put(self, session: Session) -> None:
        self._idle.append(session)

    def clear(self) -> None:
        self._idle.clear()
