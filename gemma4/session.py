"""Sessions of one model: each has a KV cache, and a decode loop captured on it.

A generation takes a session for itself and gives it back when it ends. Generations that overlap in time have sessions
of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from gemma4.cache import KVCache
from gemma4.config import CacheKind
from gemma4.decode_loop import DecodeLoop
from gemma4.history import Session, TokenHistory
from gemma4.model import TextModel
from gemma4.ring_snapshot import RingSnapshot
from gemma4.sampling import SamplingParams


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
            return self._begin(params, suppress_ids)
        if idle.loop.params == params:
            return idle
        return Session(DecodeLoop(self.model, idle.loop.cache, params, suppress_ids), idle.history)

    def _begin(self, params: SamplingParams, suppress_ids: Sequence[int]) -> Session:
        model = self.model
        cache = KVCache(model.config, self.max_seq_len, model.dtype, model.norm.weight.device, self.kv_cache)
        history = TokenHistory(model.config.sliding_window, cache.ring_length, RingSnapshot(cache.rings))
        return Session(DecodeLoop(model, cache, params, suppress_ids), history)

    def put(self, session: Session) -> None:
        self._idle.append(session)

    def clear(self) -> None:
        self._idle.clear()

    @property
    def nbytes(self) -> int:
        """Of the kept session's cache."""
        return sum(session.loop.cache.nbytes for session in self._idle)
