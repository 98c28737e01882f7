"""The Triton kernels of tq4_write and tq4_sdpa in the interpreter; run by test_tq4.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.pieces import SliceShape
from gemma4.kernels.prefill_attention import PrefillConfig
from gemma4.kernels.tq4_decode import TQ4DecodeConfig, tq4_decode_launch
from gemma4.kernels.tq4_prefill import tq4_prefill_launch
from gemma4.kernels.tq4_rotation import launch_rotate_queries, rotate_queries_reference
from gemma4.kernels.tq4_rows import launch_tq4_rows, tq4_rows_reference
from gemma4.kernels.tq4_write import tq4_write_launch
from gemma4.kernels.turboquant import decode
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.tq4_cases import SCALE, Case, empty_cache, make_problem
from tests.kernels.triton_without_gpu import allow_loops_over_tensors

allow_loops_over_tensors()

TIED = {"head_dim": 128, "turned": 64}
DECODES = [
    Case(first=0, tokens=1, length=1, bits=4, q_heads=1, kv_heads=1),
    Case(first=37, tokens=3, length=64, bits=4, q_heads=4, kv_heads=2, **TIED),
    Case(first=60, tokens=2, length=80, q_heads=8, kv_heads=1, **TIED),
]
PREFILLS = [
    Case(first=0, tokens=18, length=32, q_heads=2, kv_heads=2),
    Case(first=22, tokens=10, length=50, bits=4, q_heads=4, kv_heads=2, **TIED),
]


@pytest.mark.parametrize("case", DECODES, ids=str)
def test_decode(case: Case) -> None:
    problem = make_problem(case)
    config = TQ4DecodeConfig(block_r=8, block_n=16, num_warps=4, num_stages=1, programs_per_sm=1)
    with poisoned_outputs():
        out = torch.empty_like(problem.q)
        queries = launch_rotate_queries(problem.q, problem.k_weight, case.turned)
        tq4_decode_launch(queries, problem.cache, problem.input_pos, SCALE, out, config, splits=3)
    assert relative_error(out, problem.answer) < 2e-3


@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_prefill(case: Case) -> None:
    problem = make_problem(case)
    config = PrefillConfig(block_m=32, block_n=16, block_dv=32, num_warps=4, num_stages=1, wgmma=False)
    results = []
    # One slice; several, with nothing left to do in the last; a head at a time; a few tokens at a time.
    for tokens, heads, keys in ((18, 2, 128), (18, 2, 16), (18, 1, 32), (8, 2, 32)):
        shape = SliceShape(min(tokens, case.tokens), heads, keys)
        with poisoned_outputs():
            args = (problem.q, problem.cache, problem.k_weight, problem.input_pos, SCALE, config, shape)
            out = tq4_prefill_launch(*args)
        results.append(out)
        assert relative_error(out, problem.answer) < 2e-3
    few = problem.cache.first_slots(case.first + case.tokens)
    args = (problem.q, few, problem.k_weight, problem.input_pos, SCALE, config, SliceShape(case.tokens, 2, 16))
    results.append(tq4_prefill_launch(*args))
    for found in (results[1], results[2], results[4]):
        assert torch.equal(found, results[0])


@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_rows(case: Case) -> None:
    problem = make_problem(case)
    begin, end = 16, case.first + case.tokens
    rows = torch.full((case.kv_heads, case.length - begin, 2, case.head_dim), torch.nan, dtype=torch.float16)
    launch_tq4_rows(problem.cache, problem.k_weight, problem.input_pos, begin, rows)
    known = end - begin
    for found, expected in zip(
        rows.unbind(2), tq4_rows_reference(problem.cache, problem.k_weight, case.head_dim), strict=True
    ):
        torch.testing.assert_close(
            found[:, :known].float(), expected[0, :, begin : begin + known], rtol=2e-3, atol=2e-3
        )
    assert rows[:, known:].isnan().all()


@pytest.mark.parametrize("case", DECODES[1:], ids=str)
def test_write(case: Case) -> None:
    problem = make_problem(case)
    cache = empty_cache(case)
    k, v = (x[:, :, case.first :] for x in (problem.k, problem.v))
    tq4_write_launch(k, v, cache, problem.input_pos)
    for codes, scale, expected_codes, expected_scale, dim in (
        (*cache[:2], *problem.cache[:2], case.turned),
        (*cache[2:4], *problem.cache[2:4], case.head_dim),
    ):
        assert scale[:, :, : case.first].isnan().all()
        assert (codes[:, :, : case.first] == 0xA5).all()
        new = slice(case.first, case.first + case.tokens)
        torch.testing.assert_close(scale[:, :, new], expected_scale[:, :, new], rtol=1e-5, atol=0)
        found = decode(codes[:, :, new], scale[:, :, new], dim)
        expected = decode(expected_codes[:, :, new], expected_scale[:, :, new], dim)
        # A coordinate on the border of two cells may fall into either.
        assert ((found - expected).abs() > 1e-4).float().mean() < 1e-3


def test_rotated_queries() -> None:
    problem = make_problem(DECODES[1])
    found = launch_rotate_queries(problem.q, problem.k_weight, 64)
    expected = rotate_queries_reference(problem.q, problem.k_weight, 64)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
