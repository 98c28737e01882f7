from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4.kernels import decode_attention as module
from gemma4.kernels import split_merge
from gemma4.kernels.activations import dequantize_activations, empty_activations, quantize_activations_reference
from gemma4.kernels.decode_attention import (
    choose_config,
    decode_attention,
    decode_attention_quantize,
    decode_attention_reference,
    split_count,
)
from gemma4.kernels.split_merge import head_rows
from tests.kernels.attention_cases import SCALE, Case, make_problem, poisoned_outputs, relative_error
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

CASES = [
    Case(first=0, tokens=1, window=0, length=9),
    Case(first=5, tokens=4, window=0, length=9),
    Case(first=0, tokens=1, window=4, length=8),
    Case(first=29, tokens=5, window=4, length=8, batch=2, q_heads=6),
    Case(first=100, tokens=8, window=6, length=13),
    Case(first=33, tokens=2, window=1, length=2),
]
# Gemma 4 31B: sliding layers 32 x 16 heads of 256, full layers 32 x 4 heads of 512.
SLIDING = Case(first=0, tokens=1, window=1024, length=2048, q_heads=32, kv_heads=16, head_dim=256)
FULL = Case(first=0, tokens=1, window=0, length=33000, q_heads=32, kv_heads=4, head_dim=512)
REAL = [
    *(dataclasses.replace(SLIDING, first=first) for first in (0, 1, 1022, 1023, 2047, 2048, 30000)),
    *(dataclasses.replace(SLIDING, first=3000, tokens=t) for t in range(2, 9)),
    *(dataclasses.replace(FULL, first=first) for first in (0, 31, 32, 511, 4000, 32767)),
    *(dataclasses.replace(FULL, first=5000, tokens=t) for t in range(2, 9)),
    dataclasses.replace(SLIDING, first=2500, batch=2, tokens=3),
    dataclasses.replace(FULL, first=2500, batch=2, tokens=3),
    Case(first=700, tokens=1, window=512, length=1024, q_heads=4, kv_heads=1, head_dim=256),  # Gemma 3 270M
]


@pytest.mark.parametrize("function", [decode_attention, decode_attention_reference])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case, function: Callable[..., Tensor]) -> None:
    problem = make_problem(case)
    out = function(problem.q, *problem.new_caches, problem.input_pos, SCALE, case.window)
    assert relative_error(out, problem.answer) < 1e-6


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("case", [dataclasses.replace(case, head_dim=32) for case in CASES], ids=str)
def test_cpu_quantize(case: Case, planes: int) -> None:
    problem = make_problem(case)
    args = (problem.q, *problem.new_caches, problem.input_pos, SCALE, case.window)
    expected = quantize_activations_reference(head_rows(decode_attention_reference(*args)), planes)
    for out, x in zip(decode_attention_quantize(*args, planes), expected, strict=True):
        assert torch.equal(out, x)


def test_kernels_in_the_interpreter() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_decode_attention.py"))


def rejected(message: str, **changes: Any) -> Any:
    return pytest.param(message, changes, id="-".join(changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("4 dimensions", q=torch.zeros(1, 4, 16)),
        rejected("does not fit", k=torch.zeros(1, 3, 8, 16), v=torch.zeros(1, 3, 8, 16)),
        rejected("one shape", v=torch.zeros(1, 2, 9, 16)),
        rejected("one dtype", k=torch.zeros(1, 2, 8, 16, dtype=torch.float64)),
        rejected("power of two", q=torch.zeros(1, 4, 1, 24), k=torch.zeros(1, 2, 8, 24), v=torch.zeros(1, 2, 8, 24)),
        rejected("contiguous", q=torch.zeros(1, 4, 1, 32)[..., ::2]),
        rejected("input_pos", input_pos=torch.zeros(1, dtype=torch.int32)),
        rejected("input_pos", input_pos=torch.zeros(2, dtype=torch.int64)),
        rejected("or more", window=-1),
        rejected("do not fit a cache of 8", window=9),
        rejected("1 to 8 tokens", q=torch.zeros(1, 4, 9, 16), input_pos=torch.arange(9)),
    ],
)
def test_rejects(message: str, changes: dict[str, Any]) -> None:
    kv = torch.zeros(1, 2, 8, 16)
    valid = {"q": torch.zeros(1, 4, 1, 16), "k": kv, "v": kv, "input_pos": torch.zeros(1, dtype=torch.int64)}
    valid |= {"scale": 1.0, "window": 0}
    decode_attention(**valid)
    with pytest.raises(ValueError, match=message):
        decode_attention(**(valid | changes))


def test_rejects_other_planes() -> None:
    kv = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match="planes must be 1 or 2"):
        decode_attention_quantize(torch.zeros(1, 4, 1, 16), kv, kv, torch.zeros(1, dtype=torch.int64), 1.0, 0, 3)


def test_opcheck() -> None:
    problem = make_problem(Case(first=29, tokens=3, window=4, length=8))
    args = (problem.q, problem.new_caches[0].nan_to_num(), problem.new_caches[1].nan_to_num(), problem.input_pos)
    torch.library.opcheck(torch.ops.gemma4.decode_attention.default, (*args, SCALE, 4))
    torch.library.opcheck(torch.ops.gemma4.decode_attention_quantize.default, (*args, SCALE, 4))


class Attend(torch.nn.Module):
    """Dense heads, and the activations that stand for them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> tuple[Tensor, ...]:
        args = (q, k, v, input_pos, SCALE, 4)
        return torch.ops.gemma4.decode_attention(*args), *torch.ops.gemma4.decode_attention_quantize(*args)


def check_attend(outs: tuple[Tensor, ...], answer: Tensor) -> None:
    assert relative_error(outs[0], answer) < 1e-6
    assert relative_error(dequantize_activations(outs[1], outs[2]), head_rows(answer)) < 1e-4


def test_export_keeps_the_nodes() -> None:
    problem = make_problem(Case(first=29, tokens=1, window=4, length=8))
    args = (problem.q, *problem.new_caches, problem.input_pos)
    program = torch.export.export(Attend(), args)
    targets = [str(node.target) for node in program.graph.nodes if "gemma4" in str(node.target)]
    assert targets == ["gemma4.decode_attention.default", "gemma4.decode_attention_quantize.default"]
    check_attend(program.module()(*args), problem.answer)


def test_compiles_on_cpu() -> None:
    problem = make_problem(Case(first=29, tokens=1, window=4, length=8))
    args = (problem.q, *problem.new_caches, problem.input_pos)
    check_attend(torch.compile(Attend(), backend="aot_eager", fullgraph=True)(*args), problem.answer)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("shape", [SLIDING, FULL], ids=["sliding", "full"])
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_chosen_configuration_fits_the_device(capability: int, shape: Case, tokens: int) -> None:
    rows = shape.q_heads // shape.kv_heads * tokens
    config = choose_config(module.CONFIGS, rows, shape.head_dim, 2 * shape.head_dim, 2, SHARED_LIMITS[capability])
    q = torch.empty(1, shape.q_heads, tokens, shape.head_dim, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(1, shape.kv_heads, shape.length, shape.head_dim, dtype=torch.bfloat16, device="meta")
    input_pos = torch.empty(tokens, dtype=torch.int64, device="meta")
    args = (q, kv, kv, input_pos, 1.0, shape.window, config, 33)
    (split,) = compile_launches(module, capability, "split_attention_launch", *args)
    bound = config.shared_bytes(shape.head_dim, 2 * shape.head_dim, 2)
    assert split.metadata.shared <= bound <= SHARED_LIMITS[capability]
    partials = split_merge.empty_partials(q, shape.kv_heads, 33)
    for out in ((q,), empty_activations(q.view(tokens, -1), 2)):
        (merge,) = compile_launches(split_merge, capability, "launch_merge", partials, tokens, out)
        assert merge.metadata.shared <= 32 << 10


def test_splits_fill_the_device_once() -> None:
    config = dataclasses.replace(module.CONFIGS[0], programs_per_sm=1)
    assert split_count(config, heads=4, rows=8, max_keys=131072, multiprocessors=132) == 33
    assert split_count(config, heads=16, rows=2, max_keys=1024, multiprocessors=132) == 8
    assert split_count(config, heads=1, rows=2, max_keys=65, multiprocessors=132) == 9
    assert split_count(config, heads=400, rows=2, max_keys=65, multiprocessors=132) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_gpu(case: Case) -> None:
    problem = make_problem(case, torch.bfloat16, "cuda")
    args = (problem.q, *problem.new_caches, problem.input_pos, SCALE, case.window)
    with poisoned_outputs():
        out = decode_attention(*args)
        again = decode_attention(*args)
        rows = decode_attention_quantize(*args)
    assert relative_error(out, problem.answer) < 8e-3
    assert torch.equal(out, again)
    error = relative_error(dequantize_activations(*rows[:2]), head_rows(problem.answer))
    # Not rounded to bfloat16 between the two steps; int8 planes keep 3e-5.
    assert error <= relative_error(out, problem.answer) + 3e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_float32(case: Case) -> None:
    problem = make_problem(case, torch.float32, "cuda")
    with poisoned_outputs():
        out = decode_attention(problem.q, *problem.new_caches, problem.input_pos, SCALE, case.window)
    assert relative_error(out, problem.answer) < 1e-6


@pytest.mark.gpu
def test_one_cuda_graph_serves_every_position() -> None:
    case = dataclasses.replace(SLIDING, first=5000)
    problem = make_problem(case, torch.bfloat16, "cuda")
    q, (k, v), input_pos = problem.q.clone(), problem.new_caches, problem.input_pos.clone()
    k, v = k.nan_to_num(), v.nan_to_num()
    decode_attention(q, k, v, input_pos, SCALE, case.window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, input_pos, SCALE, case.window)
    for position in (0, 77, 1500, 5000):
        input_pos.fill_(position)
        graph.replay()
        expected = decode_attention_reference(q, k, v, input_pos, SCALE, case.window)
        assert relative_error(out, expected) < 8e-3
