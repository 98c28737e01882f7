"""The Triton kernel of rope_cache in the interpreter; run by test_rope_cache.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.rope_cache import (
    qk_norm_rope_cache_reference,
    qk_norm_rope_launch,
    qk_norm_rope_reference,
)
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.rope_cases import EPS, RopeCase, exact, make_inputs
from tests.kernels.triton_without_gpu import allow_loops_over_tensors

allow_loops_over_tensors()

CASES = [
    RopeCase(tokens=1, first=0, q_heads=1, kv_heads=1, head_dim=2, rotated=1, v_norm=True, values=True),
    RopeCase(tokens=5, first=13, q_heads=4, kv_heads=2, head_dim=16, rotated=8, v_norm=True, values=True),
    RopeCase(tokens=3, first=7, q_heads=4, kv_heads=1, head_dim=32, rotated=16, v_norm=False, values=True),
    RopeCase(tokens=2, first=262142, q_heads=8, kv_heads=2, head_dim=64, rotated=8, v_norm=True, values=False),
    RopeCase(tokens=1, first=262143, q_heads=9, kv_heads=3, head_dim=16, rotated=8, v_norm=True, values=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_returned_heads(case: RopeCase) -> None:
    x = make_inputs(case, torch.float32)
    with poisoned_outputs():
        k_out = torch.empty(1, case.kv_heads, case.tokens, case.head_dim)
        v_out = torch.empty_like(k_out)
        weights = (x.q_weight, x.k_weight)
        q_out = qk_norm_rope_launch(
            x.q, x.k, x.v, *weights, k_out, v_out, x.inv_freq, x.input_pos, EPS, case.v_norm, into_cache=False
        )
    for out, answer in zip((q_out, k_out, v_out), exact(x, case.v_norm), strict=True):
        assert relative_error(out, answer) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_in_the_cache(case: RopeCase, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype)
    caches = torch.randn(2, 1, case.kv_heads, 7, case.head_dim).to(dtype)
    expected = caches.clone()
    weights = (x.q_weight, x.k_weight)
    q_expected = qk_norm_rope_cache_reference(
        x.q, x.k, x.v, *weights, *expected, x.inv_freq, x.input_pos, EPS, case.v_norm
    )
    with poisoned_outputs():
        q_out = qk_norm_rope_launch(
            x.q, x.k, x.v, *weights, *caches, x.inv_freq, x.input_pos, EPS, case.v_norm, into_cache=True
        )
    assert qk_norm_rope_reference(x.q, x.k, x.v, *weights, x.inv_freq, x.input_pos, EPS, case.v_norm)[0].equal(
        q_expected
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative_error(q_out, q_expected) < tolerance
    assert relative_error(caches, expected) < tolerance
