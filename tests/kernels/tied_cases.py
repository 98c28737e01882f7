"""Attention problems from raw projections whose values are the keys, with their exact answers in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4.kernels.tied_rope_cache import tied_norm_rope_reference
from tests.kernels.attention_cases import Case, exact_attention
from tests.kernels.rope_cases import EPS, RopeCase, RopeInputs, exact, make_inputs


@dataclass(frozen=True, slots=True)
class TiedProblem:
    """q [B, Hq, T, D] and rows [B, Hkv, T, 5D/4] of the new tokens; caches [B, Hkv, L, 5D/4] before and after them.

    inputs: the raw projections of all tokens, of which the last T are new.
    """

    q: Tensor
    rows: Tensor
    input_pos: Tensor
    old_cache: Tensor
    new_cache: Tensor
    answer: Tensor
    inputs: RopeInputs


def make_tied(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TiedProblem:
    """A random problem; slots after the last token are NaN."""
    assert not case.window, "full layers only"
    total, dim = case.first + case.tokens, case.head_dim
    heads = case.batch * case.q_heads, case.batch * case.kv_heads
    x = make_inputs(RopeCase(total, 0, *heads, dim, dim // 8, v_norm=True, values=False), dtype, device)
    q, k, v = (h.unflatten(1, (case.batch, -1))[0] for h in exact(x, v_norm=True))
    answer = exact_attention(q[:, :, case.first :], k, v, x.input_pos[case.first :], 0)
    made = tied_norm_rope_reference(x.q, x.k, x.q_weight, x.k_weight, x.inv_freq, x.input_pos, EPS, dim // 4)
    queries, rows = (h.unflatten(1, (case.batch, -1))[0] for h in made)
    caches = torch.full((2, *rows.shape[:2], case.length, rows.shape[3]), torch.nan, dtype=dtype, device=device)
    caches[0, :, :, : case.first] = rows[:, :, : case.first]
    caches[1, :, :, :total] = rows
    new = slice(case.first, None)
    return TiedProblem(
        queries[:, :, new].contiguous(), rows[:, :, new].contiguous(), x.input_pos[new], *caches, answer, x
    )
