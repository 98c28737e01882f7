"""Attention problems with their exact answers: float64 softmax over whole sequences, poisoned caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 0.3


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens` new tokens after `first` old ones; caches of `length` slots; window 0: unlimited."""

    first: int
    tokens: int
    window: int
    length: int
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16

    def __str__(self) -> str:
        heads = f"B{self.batch}-H{self.q_heads}x{self.kv_heads}-D{self.head_dim}"
        return f"P{self.first}-T{self.tokens}-W{self.window}-L{self.length}-{heads}"


@dataclass(frozen=True, slots=True)
class Problem:
    """q [B, Hq, T, D]; k, v [B, Hkv, T, D] of the new tokens; caches before and after the new tokens; the answer."""

    q: Tensor
    k: Tensor
    v: Tensor
    input_pos: Tensor
    old_caches: tuple[Tensor, Tensor]
    new_caches: tuple[Tensor, Tensor]
    answer: Tensor


def make_problem(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """A random problem; slots that hold nothing the new tokens may see are NaN."""
    torch.manual_seed(case.first + 1000 * case.tokens)
    total = case.first + case.tokens
    oldest = max(0, case.first - case.window + 1) if case.window else 0
    kv_shape = (case.batch, case.kv_heads, total, case.head_dim)
    q = torch.randn(case.batch, case.q_heads, case.tokens, case.head_dim, device=device).to(dtype)
    k, v = (torch.randn(kv_shape, device=device).to(dtype) for _ in range(2))
    positions = torch.arange(total, device=device)
    old = tuple(_cache(x, positions[oldest : case.first], case.length) for x in (k, v))
    new = tuple(_cache(x, positions[oldest:], case.length) for x in (k, v))
    answer = exact_attention(q, k, v, positions[case.first :], case.window)
    k_new, v_new = k[:, :, case.first :].contiguous(), v[:, :, case.first :].contiguous()
    return Problem(q, k_new, v_new, positions[case.first :], (old[0], old[1]), (new[0], new[1]), answer)


def _cache(x: Tensor, positions: Tensor, length: int) -> Tensor:
    cache = torch.full((x.shape[0], x.shape[1], length, x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)
    newest = positions[-length:]
    cache[:, :, newest % length] = x[:, :, newest]
    return cache


def exact_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, window: int) -> Tensor:
    """Attention of q at input_pos over keys 0, 1, ... in float64, by the formula."""
    batch, tokens, head_dim = q.shape[0], q.shape[2], q.shape[3]
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.double().view(batch, kv_heads, -1, tokens, head_dim)
    scores = torch.einsum("bhgtd,bhnd->bhgtn", grouped, k.double()) * SCALE
    distance = input_pos[:, None] - torch.arange(keys, device=q.device)
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("bhgtn,bhnd->bhgtd", weights, v.double()).reshape(q.shape)


def relative_error(out: Tensor, answer: Tensor) -> float:
    """||out - answer|| / ||answer|| in float64; NaN where anything is NaN."""
    difference = out.double() - answer.double()
    return float(difference.norm() / answer.double().norm())


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Uninitialized memory is NaN inside, so an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
