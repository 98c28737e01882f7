"""The Triton kernels for tied rows in the interpreter; run by test_tied_attention.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.decode_attention import DecodeConfig
from gemma4.kernels.prefill_attention import PrefillConfig, prefill_attention_launch
from gemma4.kernels.split_merge import merge_heads
from gemma4.kernels.tied_decode_attention import tied_split_launch
from gemma4.kernels.tied_rope_cache import tied_norm_rope_launch, tied_norm_rope_reference
from tests.kernels.attention_cases import SCALE, Case, poisoned_outputs, relative_error
from tests.kernels.rope_cases import EPS, RopeCase, make_inputs
from tests.kernels.tied_cases import make_tied
from tests.kernels.triton_without_gpu import allow_loops_over_tensors

allow_loops_over_tensors()

DECODE = [
    Case(first=0, tokens=1, window=0, length=1, head_dim=64),
    Case(first=37, tokens=3, window=0, length=51, batch=2, q_heads=6, kv_heads=1, head_dim=64),
    Case(first=20, tokens=1, window=0, length=40, q_heads=6, head_dim=32),  # tiles wider than a quarter
]
PREFILL = [
    Case(first=0, tokens=9, window=0, length=9, kv_heads=1, head_dim=64),
    Case(first=29, tokens=5, window=0, length=50, batch=2, q_heads=6, head_dim=32),
]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case: Case, dtype: torch.dtype) -> None:
    problem = make_tied(case, dtype)
    config = DecodeConfig(block_r=16, block_n=16, num_warps=4, num_stages=1, programs_per_sm=1)
    with poisoned_outputs():
        partials = tied_split_launch(problem.q, problem.new_cache, problem.input_pos, SCALE, config, 3)
        out = merge_heads(partials, problem.q)
    assert relative_error(out, problem.answer) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill(case: Case, dtype: torch.dtype) -> None:
    problem = make_tied(case, dtype)
    rotated = case.head_dim // 4
    block_dv = case.head_dim if dtype == torch.float32 else case.head_dim // 2
    config = PrefillConfig(block_m=16, block_n=16, block_dv=block_dv, num_warps=4, num_stages=1, wgmma=False)
    views = (problem.rows, problem.rows[..., rotated:], problem.old_cache, problem.old_cache[..., rotated:])
    with poisoned_outputs():
        out = prefill_attention_launch(problem.q, *views, problem.input_pos, SCALE, 0, config, rotated)
    assert relative_error(out, problem.answer) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("into_cache", [False, True])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_norm_rope(head_dim: int, into_cache: bool, dtype: torch.dtype) -> None:
    x = make_inputs(RopeCase(3, 11, 4, 2, head_dim, head_dim // 8, v_norm=True, values=False), dtype)
    args = (x.q, x.k, x.q_weight, x.k_weight)
    q_expected, rows_expected = tied_norm_rope_reference(*args, x.inv_freq, x.input_pos, EPS, head_dim // 4)
    with poisoned_outputs():
        out = torch.empty(1, 2, 7 if into_cache else 3, 5 * head_dim // 4, dtype=dtype)
        q = tied_norm_rope_launch(*args, out, x.inv_freq, x.input_pos, EPS, into_cache)
    rows = out[:, :, [4, 5, 6]] if into_cache else out
    assert relative_error(q, q_expected) < tolerance(dtype)
    assert relative_error(rows, rows_expected) < tolerance(dtype)
    assert not into_cache or out[:, :, :4].isnan().all()
