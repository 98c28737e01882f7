"""The Triton kernels of decode_attention in the interpreter; run by test_decode_attention.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.activations import dequantize_activations, launch_quantize_activations
from gemma4.kernels.decode_attention import DecodeConfig, split_attention_launch
from gemma4.kernels.split_merge import head_rows, merge_heads, merge_quantized
from tests.kernels.attention_cases import SCALE, Case, make_problem, poisoned_outputs, relative_error
from tests.kernels.triton_without_gpu import allow_loops_over_tensors

allow_loops_over_tensors()

CASES = [
    *(Case(first=37, tokens=t, window=0, length=64, q_heads=6) for t in (1, 2, 7)),
    *(Case(first=37, tokens=t, window=8, length=16, q_heads=6) for t in (1, 3, 8)),
    *(Case(first=first, tokens=1, window=8, length=16) for first in (0, 7, 8, 15, 16, 1000)),
    *(Case(first=first, tokens=3, window=5, length=7) for first in (0, 3, 4, 5, 20)),
    Case(first=0, tokens=1, window=0, length=1),
    Case(first=63, tokens=1, window=0, length=64),
    Case(first=100, tokens=1, window=40, length=80, batch=2, head_dim=32),
    Case(first=45, tokens=5, window=0, length=51, batch=2, q_heads=8, kv_heads=1),
    Case(first=33, tokens=2, window=1, length=2),
]


def run(case: Case, dtype: torch.dtype, splits: int, block_r: int) -> tuple[torch.Tensor, torch.Tensor]:
    problem = make_problem(case, dtype)
    config = DecodeConfig(block_r=block_r, block_n=16, num_warps=4, num_stages=1, programs_per_sm=1)
    with poisoned_outputs():
        partials = split_attention_launch(
            problem.q, *problem.new_caches, problem.input_pos, SCALE, case.window, config, splits
        )
        return merge_heads(partials, problem.q), problem.answer


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_exact(case: Case, splits: int) -> None:
    out, answer = run(case, torch.float32, splits, 16)
    assert relative_error(out, answer) < 1e-6


@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_float16(case: Case, splits: int) -> None:
    out, answer = run(case, torch.float16, splits, 32)
    assert relative_error(out, answer) < 1e-3


def test_strided_queries() -> None:
    case = Case(first=20, tokens=4, window=8, length=16)
    problem = make_problem(case)
    q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    config = DecodeConfig(block_r=16, block_n=16, num_warps=4, num_stages=1, programs_per_sm=1)
    partials = split_attention_launch(q, *problem.new_caches, problem.input_pos, SCALE, case.window, config, 2)
    assert relative_error(merge_heads(partials, q), problem.answer) < 1e-6


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case(first=20, tokens=1, window=8, length=16, head_dim=64),
        Case(first=37, tokens=3, window=0, length=64, q_heads=6, head_dim=128),
        Case(first=9, tokens=2, window=0, length=16, batch=2, q_heads=3, kv_heads=1, head_dim=64),
        Case(first=9, tokens=2, window=0, length=16, batch=2, q_heads=6, kv_heads=3, head_dim=16),  # units of 4 heads
    ],
    ids=str,
)
def test_quantized_heads_have_the_bits_of_two_steps(case: Case, planes: int) -> None:
    problem = make_problem(case, torch.float16)
    config = DecodeConfig(block_r=16, block_n=16, num_warps=4, num_stages=1, programs_per_sm=1)
    with poisoned_outputs():
        partials = split_attention_launch(
            problem.q, *problem.new_caches, problem.input_pos, SCALE, case.window, config, 3
        )
        heads = merge_heads(partials, problem.q.float())
        rows = merge_quantized(partials, problem.q, planes)
        two_steps = launch_quantize_activations(head_rows(heads), planes)
    assert all(torch.equal(x, y) for x, y in zip(rows, two_steps, strict=True))
    error = relative_error(dequantize_activations(*rows[:2]), head_rows(problem.answer))
    assert error < (1e-3 if planes == 2 else 2e-2)
