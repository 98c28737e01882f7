from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4.kernels import prefill_attention, tied_decode_attention
from gemma4.kernels.activations import dequantize_activations, quantize_activations_reference
from gemma4.kernels.decode_attention import choose_config, decode_attention
from gemma4.kernels.prefill_attention import choose_config as choose_prefill_config
from gemma4.kernels.rope_cache import qk_norm_rope
from gemma4.kernels.split_merge import head_rows
from gemma4.kernels.tied_decode_attention import tied_decode_attention as decode
from gemma4.kernels.tied_decode_attention import tied_decode_attention_quantize as decode_quantize
from gemma4.kernels.tied_decode_attention import tied_decode_attention_reference as decode_reference
from gemma4.kernels.tied_prefill_attention import tied_prefill_attention as prefill
from gemma4.kernels.tied_prefill_attention import tied_prefill_attention_reference as prefill_reference
from tests.kernels.attention_cases import SCALE, Case, poisoned_outputs, relative_error
from tests.kernels.rope_cases import EPS
from tests.kernels.tied_cases import make_tied
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

DECODE = [
    Case(first=0, tokens=1, window=0, length=9, head_dim=32),
    Case(first=29, tokens=5, window=0, length=40, batch=2, q_heads=6, head_dim=64),
    Case(first=100, tokens=8, window=0, length=108, q_heads=8, kv_heads=1, head_dim=64),
]
PREFILL = [
    Case(first=0, tokens=7, window=0, length=9, head_dim=32),
    Case(first=29, tokens=11, window=0, length=40, batch=2, q_heads=6, head_dim=64),
]
# Gemma 4 31B: full layers have 32 x 4 heads of 512.
FULL = Case(first=0, tokens=1, window=0, length=33000, q_heads=32, kv_heads=4, head_dim=512)
REAL_DECODE = [
    *(dataclasses.replace(FULL, first=first) for first in (0, 31, 32, 511, 4000, 32767)),
    *(dataclasses.replace(FULL, first=5000, tokens=t) for t in range(2, 9)),
    dataclasses.replace(FULL, first=2500, batch=2, tokens=3),
]
REAL_PREFILL = [
    *(dataclasses.replace(FULL, first=first, tokens=300, length=9000) for first in (0, 1, 2048, 8001)),
    *(dataclasses.replace(FULL, first=333, tokens=tokens, length=900) for tokens in (1, 17, 257)),
    dataclasses.replace(FULL, first=2500, batch=2, tokens=40, length=3000),
]


@pytest.mark.parametrize("function", [decode, decode_reference])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_cpu(case: Case, function: Callable[..., Tensor]) -> None:
    problem = make_tied(case)
    out = function(problem.q, problem.new_cache, problem.input_pos, SCALE)
    assert relative_error(out, problem.answer) < 1e-6


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_quantize_cpu(case: Case) -> None:
    problem = make_tied(case)
    args = (problem.q, problem.new_cache, problem.input_pos, SCALE)
    expected = quantize_activations_reference(head_rows(decode_reference(*args)))
    for out, x in zip(decode_quantize(*args), expected, strict=True):
        assert torch.equal(out, x)


@pytest.mark.parametrize("function", [prefill, prefill_reference])
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_cpu(case: Case, function: Callable[..., Tensor]) -> None:
    problem = make_tied(case)
    out = function(problem.q, problem.rows, problem.old_cache, problem.input_pos, SCALE)
    assert relative_error(out, problem.answer) < 1e-6


@pytest.mark.parametrize("first", [24, 392])
def test_rounds_no_more_than_two_tensors(first: int) -> None:
    """bfloat16 projections, float64 truth: one tensor's error is that of two, and they differ by as much."""
    problem = make_tied(dataclasses.replace(FULL, first=first, tokens=8, length=first + 8), torch.bfloat16)
    x = problem.inputs
    q, k, v = qk_norm_rope(x.q, x.k, None, x.q_weight, x.k_weight, x.inv_freq, x.input_pos, EPS, True)
    two = decode_attention(q[:, :, first:], k, v, problem.input_pos, SCALE, 0)
    one = decode(problem.q, problem.new_cache, problem.input_pos, SCALE)
    error = relative_error(two, problem.answer)
    assert error < 1e-2
    assert relative_error(one, problem.answer) < 1.1 * error
    assert relative_error(one, two) < 1.5 * error


def test_kernels_in_the_interpreter() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_tied.py"))


def rejected(message: str, **changes: Any) -> Any:
    return pytest.param(message, changes, id="-".join(changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("4 dimensions", q=torch.zeros(1, 4, 32)),
        rejected("does not fit", kv=torch.zeros(1, 3, 8, 40)),
        rejected("does not fit", kv=torch.zeros(1, 2, 8, 48)),
        rejected("one dtype", kv=torch.zeros(1, 2, 8, 40, dtype=torch.float64)),
        rejected("power of two", q=torch.zeros(1, 4, 1, 48), kv=torch.zeros(1, 2, 8, 60)),
        rejected("contiguous", q=torch.zeros(1, 4, 1, 64)[..., ::2]),
        rejected("input_pos", input_pos=torch.zeros(2, dtype=torch.int64)),
        rejected("1 to 8 tokens", q=torch.zeros(1, 4, 9, 32), input_pos=torch.arange(9)),
    ],
)
def test_decode_rejects(message: str, changes: dict[str, Any]) -> None:
    valid: dict[str, Any] = {"q": torch.zeros(1, 4, 1, 32), "kv": torch.zeros(1, 2, 8, 40)}
    valid |= {"input_pos": torch.zeros(1, dtype=torch.int64), "scale": 1.0}
    decode(**valid)
    with pytest.raises(ValueError, match=message):
        decode(**(valid | changes))
    with pytest.raises(ValueError, match="planes must be 1 or 2"):
        decode_quantize(**valid, planes=3)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("kv_new", kv_new=torch.zeros(1, 2, 2, 40)),
        rejected("kv_new", kv_cache=torch.zeros(1, 1, 8, 40)),
        rejected("does not fit", kv_cache=torch.zeros(1, 2, 8, 80)),
        rejected("kv_cache must hold", kv_cache=torch.zeros(1, 8, 2, 40).transpose(1, 2)),
        rejected("input_pos", input_pos=torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_prefill_rejects(message: str, changes: dict[str, Any]) -> None:
    valid: dict[str, Any] = {"q": torch.zeros(1, 4, 3, 32), "kv_new": torch.zeros(1, 2, 3, 40)}
    valid |= {"kv_cache": torch.zeros(1, 2, 8, 40), "input_pos": torch.arange(3), "scale": 1.0}
    prefill(**valid)
    with pytest.raises(ValueError, match=message):
        prefill(**(valid | changes))


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, rows: Tensor, old: Tensor, new: Tensor, input_pos: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.gemma4
        return (
            ops.tied_prefill_attention(q, rows, old, input_pos, SCALE),
            ops.tied_decode_attention(q, new, input_pos, SCALE),
            *ops.tied_decode_attention_quantize(q, new, input_pos, SCALE),
        )


def arguments(case: Case) -> tuple[tuple[Tensor, ...], Tensor]:
    problem = make_tied(case)
    return (problem.q, problem.rows, problem.old_cache, problem.new_cache, problem.input_pos), problem.answer


def check_attend(outs: tuple[Tensor, ...], answer: Tensor) -> None:
    assert relative_error(outs[0], answer) < 1e-6
    assert relative_error(outs[1], answer) < 1e-6
    assert relative_error(dequantize_activations(outs[2], outs[3]), head_rows(answer)) < 1e-4


def test_ops_are_sound_for_tracing() -> None:
    q, rows, old, new, input_pos = (x.nan_to_num() for x in arguments(DECODE[1])[0])
    tests = ("test_schema", "test_faketensor")
    for op, args in (
        (torch.ops.gemma4.tied_decode_attention.default, (q, new, input_pos, SCALE)),
        (torch.ops.gemma4.tied_decode_attention_quantize.default, (q, new, input_pos, SCALE)),
        (torch.ops.gemma4.tied_prefill_attention.default, (q, rows, old, input_pos, SCALE)),
    ):
        torch.library.opcheck(op, args, test_utils=tests)


def test_export_keeps_the_nodes() -> None:
    args, answer = arguments(DECODE[1])
    program = torch.export.export(Attend(), args)
    targets = [str(node.target) for node in program.graph.nodes if "gemma4" in str(node.target)]
    names = ["tied_prefill_attention", "tied_decode_attention", "tied_decode_attention_quantize"]
    assert targets == [f"gemma4.{name}.default" for name in names]
    check_attend(program.module()(*args), answer)


def test_compiles_on_cpu() -> None:
    args, answer = arguments(DECODE[1])
    check_attend(torch.compile(Attend(), backend="aot_eager", fullgraph=True)(*args), answer)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_decode_reads_rows_once(capability: int, tokens: int) -> None:
    """The shared memory of the compiled kernel is that of the tiles of one row, which serve as keys and as values."""
    limit = SHARED_LIMITS[capability]
    config = choose_config(tied_decode_attention.CONFIGS, 8 * tokens, 512, 640, 2, limit)
    q = torch.empty(1, 32, tokens, 512, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(1, 4, 33000, 640, dtype=torch.bfloat16, device="meta")
    input_pos = torch.empty(tokens, dtype=torch.int64, device="meta")
    args = (q, kv, input_pos, 1.0, config, 33)
    (split,) = compile_launches(tied_decode_attention, capability, "tied_split_launch", *args)
    assert split.metadata.shared <= config.shared_bytes(512, 640, 2) <= limit


@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_prefill_fits_the_device(capability: int) -> None:
    config = choose_prefill_config(512, 2, capability == 90, SHARED_LIMITS[capability])
    q = torch.empty(1, 32, 300, 512, dtype=torch.bfloat16, device="meta")
    new = torch.empty(1, 4, 300, 640, dtype=torch.bfloat16, device="meta")
    old = torch.empty(1, 4, 9000, 640, dtype=torch.bfloat16, device="meta")
    input_pos = torch.empty(300, dtype=torch.int64, device="meta")
    args = (q, new, new[..., 128:], old, old[..., 128:], input_pos, 1.0, 0, config, 128)
    (kernel,) = compile_launches(prefill_attention, capability, "prefill_attention_launch", *args)
    assert kernel.metadata.shared <= config.shared_bytes(512, 2) <= SHARED_LIMITS[capability]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_DECODE, ids=str)
def test_decode_gpu(case: Case) -> None:
    problem = make_tied(case, torch.bfloat16, "cuda")
    args = (problem.q, problem.new_cache, problem.input_pos, SCALE)
    expected = decode_reference(problem.q.double(), problem.new_cache.double(), problem.input_pos, SCALE)
    with poisoned_outputs():
        out, again = decode(*args), decode(*args)
        rows = decode_quantize(*args)
    assert relative_error(out, expected) < 8e-3
    assert relative_error(out, problem.answer) < 1.5e-2
    assert torch.equal(out, again)
    error = relative_error(dequantize_activations(*rows[:2]), head_rows(expected))
    assert error <= relative_error(out, expected) + 3e-5  # a lone key is exact in bfloat16, not in int8 planes


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_PREFILL, ids=str)
def test_prefill_gpu(case: Case) -> None:
    problem = make_tied(case, torch.bfloat16, "cuda")
    args = (problem.q, problem.rows, problem.old_cache, problem.input_pos, SCALE)
    expected = prefill_reference(*(x.double() for x in args[:3]), problem.input_pos, SCALE)
    with poisoned_outputs():
        out, again = prefill(*args), prefill(*args)
    assert relative_error(out, expected) < 8e-3
    assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=str)
def test_float32_gpu(case: Case) -> None:
    problem = make_tied(case, torch.float32, "cuda")
    with poisoned_outputs():
        chunk = prefill(problem.q, problem.rows, problem.old_cache, problem.input_pos, SCALE)
        if case.tokens <= 8:
            out = decode(problem.q, problem.new_cache, problem.input_pos, SCALE)
            assert relative_error(out, problem.answer) < 1e-6
    assert relative_error(chunk, problem.answer) < 1e-6


@pytest.mark.gpu
def test_one_cuda_graph_serves_every_position() -> None:
    problem = make_tied(dataclasses.replace(FULL, first=5000, length=5001), torch.bfloat16, "cuda")
    q, kv, input_pos = problem.q, problem.new_cache, problem.input_pos.clone()
    decode(q, kv, input_pos, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, kv, input_pos, SCALE)
    for position in (0, 77, 1500, 5000):
        input_pos.fill_(position)
        graph.replay()
        assert relative_error(out, decode_reference(q, kv, input_pos, SCALE)) < 8e-3
