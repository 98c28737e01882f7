"""Speculative decoding (Leviathan et al., arXiv 2211.17192): guess several tokens, check them all in one pass.

A round drafts k tokens after the last known one, runs these k + 1 through the model (on a GPU at most MMA_ROWS - 1 in
one pass), and takes from each position the token that plain decoding would take there. Tokens stand as long as the
draft foresaw them; the first that it did not is the model's own and ends the round. So a round yields 1 to k + 1 tokens
and its result never depends on the draft:

- greedy, the text is that of plain decoding, by the same bits of its logits: in such a pass every row is computed as if
  it were alone (`gemma4.kernels.linear.dense_linear`, the packed matvecs, attention row by row);
- with a temperature, the distribution is. Drafts are certain guesses, for which accepting a draft with its probability
  and else choosing among the other tokens is the same as to sample first and compare then.

Rejected tokens leave keys and values behind, at the positions after the last known token. They are masked until the
tokens that come to stand there replace them. A ring of W + s positions, W its window, lost p + k - W - s and those
before to them, p the last known token, which are out of sight of what comes after p for k <= s (`gemma4.ring`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from gemma4.cache import AttentionCache, HeadTransform, KVCache
from gemma4.decode_loop import DecodeLoop
from gemma4.generate import check_room, prefill
from gemma4.history import TokenHistory
from gemma4.kernels.fused_norm import rms_norm_reference
from gemma4.kernels.packed_matvec import MAX_ROWS, MMA_ROWS
from gemma4.model import TextModel
from gemma4.quant.linear import Rows
from gemma4.rows import RowMaker

NUM_DRAFT_TOKENS: Final = 2
"""Drafts of a round unless told otherwise: as many as a GPU checks in one pass."""


class Draft(Protocol):
    """What guesses tokens: a `gemma4.drafter.Drafter`, or anything else."""

    def check_target(self, model: TextModel) -> None:
        """Raises a Gemma4Error where it cannot draft for `model`."""

    def propose(self, token: Tensor, hidden: Tensor, position: Tensor, cache: KVCache, count: int) -> Tensor:
        """int64 [count], guesses of the tokens after `token`, made without waiting for the device.

        token, position: int64 [1], the last known token, whose keys are not in `cache` yet. hidden: float32 [1, H], the
        model's hidden state of the token before, after its last norm. cache: only to read.
        """


@dataclass(slots=True)
class Speculation:
    """What became of the drafts of one generation; counts while it runs."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts among all; None before the first."""
        return self.accepted / self.drafted if self.drafted else None

    def add(self, other: Speculation) -> None:
        """Counts what became of the drafts of another generation too."""
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted


class TokenByToken:
    """A layer's cache that attends to a few tokens one after another, each exactly as a pass of its own would."""

    def __init__(self, cache: AttentionCache) -> None:
        self.cache = cache

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: HeadTransform,
        input_pos: Tensor,
        scale: float,
        make: RowMaker,
    ) -> Rows:
        def row(x: Tensor | None, i: int) -> Tensor | None:
            return None if x is None else x[i : i + 1]

        outputs = [
            self.cache.attend(q[i : i + 1], row(k, i), row(v, i), heads, input_pos[i : i + 1], scale, make)
            for i in range(q.shape[0])
        ]
        # Of int8 activations the first tensor has the rows second.
        return tuple(
            torch.cat(parts, dim=1 if i == 0 and len(outputs[0]) > 1 else 0)
            for i, parts in enumerate(zip(*outputs, strict=True))
        )


def check_draft(model: TextModel, draft: Draft, num_draft_tokens: int) -> None:
    """Raises ValueError for a number of drafts that one pass cannot check, and what `draft.check_target` raises."""
    most = min(MAX_ROWS - 1, model.config.sliding_window)
    if not 1 <= num_draft_tokens <= most:
        raise ValueError(f"num_draft_tokens: found {num_draft_tokens}, expected 1 to {most}")
    draft.check_target(model)


class SpeculativeLoop(DecodeLoop):
    """A decode loop whose step is a round. plain: the loop whose cache and settings it takes over."""

    def __init__(self, plain: DecodeLoop, draft: Draft, num_draft_tokens: int) -> None:
        super().__init__(plain.model, plain.cache, plain.params, plain.suppressed.tolist())
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self.stats = Speculation()
        self.hidden = torch.zeros(1, plain.model.config.hidden_size, device=self.token.device)
        self._caches = [TokenByToken(layer) for layer in plain.cache.layers]
        self._results = torch.zeros(num_draft_tokens + 2, dtype=torch.int64, device=self.token.device)

    @classmethod
    def beside(
        cls, plain: DecodeLoop, draft: Draft, num_draft_tokens: int, previous: SpeculativeLoop | None
    ) -> SpeculativeLoop:
        """A loop for one generation: `previous` with its captured graph, where it serves the same."""
        wanted = (plain.cache, plain.params, draft, num_draft_tokens)
        if previous is None or wanted != (previous.cache, previous.params, previous.draft, previous.num_draft_tokens):
            return cls(plain, draft, num_draft_tokens)
        previous.stats = Speculation()
        return previous

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.token, self.position, self.hidden

    @property
    def rows_at_once(self) -> int:
        """How many tokens one pass checks: from MMA_ROWS on a GPU sums in another order than in plain decoding."""
        return MMA_ROWS - 1 if self.token.is_cuda else MAX_ROWS

    def prefill(self, ids: Sequence[int], start: int, seed: int) -> None:
        """Runs ids[start:], the part of a prompt that the cache lacks, and picks the first new token."""
        model, chunk = self.model, self.cache.chunk_size
        last = start + (len(ids) - start - 1) // chunk * chunk
        if last > start:
            prefill(model, self.cache, ids[start:last], start)
        tokens = torch.tensor(ids[last:], dtype=torch.int64, device=self.token.device)
        positions = torch.arange(last, len(ids), dtype=torch.int64, device=self.token.device)
        make = model.rows_for(len(tokens))
        h, y = model.run(tokens, positions, self.cache.layers, make)
        self.cache.commit(positions)
        logits, h = model.head(h[-1:], y[-1:], make)
        self.hidden.copy_(self._normed(h))
        self.start(logits, len(ids), seed)

    def drafts_at(self, position: int) -> int:
        """How many drafts the next round makes, `position` being that of the last known token."""
        return min(self.num_draft_tokens, self.cache.max_seq_len - 1 - position)

    def new_ids(self, position: int) -> list[int]:
        """Runs a round and returns the ids it found, at least one."""
        count = self.drafts_at(position)
        if count == self.num_draft_tokens:
            self.advance()
        else:
            self._round(count)
        agreed, *ids = self._results.tolist()
        self.stats.rounds += 1
        self.stats.drafted += count
        self.stats.accepted += agreed
        return ids[: agreed + 1]

    def _step(self) -> None:
        self._round(self.num_draft_tokens)

    def _round(self, count: int) -> None:
        """Drafts `count` tokens and checks them. Writes the number of those that stand, then the model's tokens."""
        drafts = self.draft.propose(self.token, self.hidden, self.position, self.cache, count)
        tokens = torch.cat((self.token, drafts))
        positions = self.position + torch.arange(count + 1, device=tokens.device)
        pieces = zip(*(torch.split(x, self.rows_at_once) for x in (tokens, positions)), strict=True)
        logits, h = (torch.cat(parts) for parts in zip(*(self._check(*piece) for piece in pieces), strict=True))
        chosen = torch.cat([self._pick(logits[i : i + 1]) for i in range(count + 1)])
        agreed = (chosen[:-1] == drafts).cumprod(0).sum(0, keepdim=True)
        self._results[0:1] = agreed
        self._results[1 : count + 2] = chosen
        self.hidden.copy_(self._normed(h).index_select(0, agreed))
        self.token.copy_(chosen.index_select(0, agreed))
        self.position.add_(agreed + 1)

    def _check(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and residual stream of a few tokens, each with the bits it has in a pass of its own."""
        make = self.model.rows_for(tokens.shape[0])
        h, y = self.model.run(tokens, positions, self._caches, make)
        return self.model.head(h, y, make)

    def _normed(self, h: Tensor) -> Tensor:
        norm = self.model.norm
        return rms_norm_reference(h, norm.weight, norm.eps)


@torch.inference_mode()
def speculate_tokens(
    loop: SpeculativeLoop,
    history: TokenHistory,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    seed: int = 0,
    eog_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """As `gemma4.generate.generate_tokens`; history: of the loop's cache."""
    check_room(len(ids), max_new_tokens, loop.cache.max_seq_len)
    start = history.resume(ids)
    history.will_write(len(ids))
    loop.model.reserve_workspace(len(ids) - start)
    loop.prefill(ids, start, seed)
    history.end_prompt(ids, len(ids) + max_new_tokens + loop.num_draft_tokens)
    last = int(loop.token)
    new_ids = [last]
    for _ in range(max_new_tokens):
        if not new_ids:
            position = len(history.ids)
            history.will_write(position + loop.drafts_at(position) + 1)
            new_ids = loop.new_ids(position)
            history.ids += [last, *new_ids[:-1]]
        last = new_ids.pop(0)
        yield last
        if last in eog_ids:
            return
