"""The Triton kernel of prefill_attention in the interpreter; run by test_prefill_attention.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.prefill_attention import PrefillConfig, prefill_attention_launch
from tests.kernels.attention_cases import SCALE, Case, make_problem, poisoned_outputs, relative_error
from tests.kernels.triton_without_gpu import allow_loops_over_tensors

allow_loops_over_tensors()

CASES = [
    Case(first=0, tokens=1, window=0, length=1),
    Case(first=0, tokens=37, window=0, length=64),
    Case(first=16, tokens=16, window=0, length=33),
    Case(first=29, tokens=21, window=0, length=50, batch=2, q_heads=6),
    Case(first=40, tokens=3, window=0, length=43, q_heads=8, kv_heads=1, head_dim=32),
    Case(first=0, tokens=1, window=8, length=16),
    Case(first=0, tokens=50, window=8, length=16, q_heads=6),
    Case(first=5, tokens=33, window=8, length=16),
    Case(first=16, tokens=16, window=8, length=16),
    Case(first=31, tokens=32, window=8, length=16, batch=2),
    Case(first=1000, tokens=9, window=8, length=16, q_heads=2),
    Case(first=100, tokens=40, window=40, length=80, head_dim=32),
    Case(first=23, tokens=20, window=5, length=7),
    Case(first=23, tokens=11, window=5, length=10, batch=2),
    Case(first=70, tokens=30, window=24, length=48),
    Case(first=70, tokens=30, window=24, length=40),
    Case(first=33, tokens=6, window=1, length=2),
]


def run(case: Case, dtype: torch.dtype, block_m: int, block_dv: int) -> tuple[torch.Tensor, torch.Tensor]:
    problem = make_problem(case, dtype)
    config = PrefillConfig(block_m, block_n=16, block_dv=block_dv, num_warps=4, num_stages=1, wgmma=False)
    with poisoned_outputs():
        out = prefill_attention_launch(
            problem.q, problem.k, problem.v, *problem.old_caches, problem.input_pos, SCALE, case.window, config
        )
    return out, problem.answer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_exact(case: Case) -> None:
    out, answer = run(case, torch.float32, block_m=16, block_dv=512)
    assert relative_error(out, answer) < 1e-6


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_float16_and_split_values(case: Case) -> None:
    out, answer = run(case, torch.float16, block_m=32, block_dv=case.head_dim // 2)
    assert relative_error(out, answer) < 1e-3
