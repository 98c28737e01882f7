from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4.kernels import prefill_attention as module
from gemma4.kernels.prefill_attention import choose_config, prefill_attention, prefill_attention_reference
from tests.kernels.attention_cases import SCALE, Case, make_problem, poisoned_outputs, relative_error
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

CASES = [
    Case(first=0, tokens=1, window=0, length=9),
    Case(first=0, tokens=7, window=4, length=8),
    Case(first=5, tokens=4, window=0, length=9),
    Case(first=29, tokens=8, window=4, length=8, batch=2, q_heads=6),
    Case(first=100, tokens=21, window=6, length=13),
    Case(first=33, tokens=2, window=1, length=2),
]
# Gemma 4 31B: sliding layers 32 x 16 heads of 256, full layers 32 x 4 heads of 512.
SLIDING = Case(first=0, tokens=512, window=1024, length=2048, q_heads=32, kv_heads=16, head_dim=256)
FULL = Case(first=0, tokens=300, window=0, length=9000, q_heads=32, kv_heads=4, head_dim=512)
REAL = [
    *(dataclasses.replace(SLIDING, first=first) for first in (0, 1023, 1024, 2048, 3001)),
    *(dataclasses.replace(SLIDING, first=2500, tokens=tokens) for tokens in (1, 9, 65, 1500)),
    dataclasses.replace(SLIDING, first=1800, length=2000),
    *(dataclasses.replace(FULL, first=first) for first in (0, 1, 2048, 8001)),
    *(dataclasses.replace(FULL, first=333, tokens=tokens) for tokens in (1, 17, 257)),
    dataclasses.replace(SLIDING, first=2500, batch=2, tokens=40),
    dataclasses.replace(FULL, first=2500, batch=2, tokens=40),
    Case(first=700, tokens=600, window=512, length=1024, q_heads=4, kv_heads=1, head_dim=256),  # Gemma 3 270M
    Case(first=700, tokens=100, window=0, length=1024, q_heads=8, kv_heads=4, head_dim=128),
]


def arguments(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[tuple[Any, ...], Tensor]:
    problem = make_problem(case, dtype, device)
    args = (problem.q, problem.k, problem.v, *problem.old_caches, problem.input_pos, SCALE, case.window)
    return args, problem.answer


@pytest.mark.parametrize("function", [prefill_attention, prefill_attention_reference])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case, function: Callable[..., Tensor]) -> None:
    args, answer = arguments(case)
    assert relative_error(function(*args), answer) < 1e-6


def test_kernel_in_the_interpreter() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_prefill_attention.py"))


def rejected(message: str, **changes: Any) -> Any:
    return pytest.param(message, changes, id="-".join(changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("k_new", k_new=torch.zeros(1, 2, 2, 16), v_new=torch.zeros(1, 2, 2, 16)),
        rejected("k_new", k_cache=torch.zeros(1, 1, 8, 16), v_cache=torch.zeros(1, 1, 8, 16)),
        rejected("does not fit", k_cache=torch.zeros(1, 2, 8, 32), v_cache=torch.zeros(1, 2, 8, 32)),
        rejected("one shape|one dtype", k_cache=torch.zeros(1, 2, 8, 16, dtype=torch.float64)),
        rejected("k_cache must hold", k_cache=torch.zeros(1, 8, 2, 16).transpose(1, 2)),
        rejected("k_new must hold", k_new=torch.zeros(1, 3, 2, 16).transpose(1, 2)),
        rejected("input_pos", input_pos=torch.zeros(4, dtype=torch.int64)),
        rejected("do not fit a cache of 8|does not fit a cache of 8", window=10),
    ],
)
def test_rejects(message: str, changes: dict[str, Any]) -> None:
    new, cache = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 8, 16)
    valid = {"q": torch.zeros(1, 4, 3, 16), "k_new": new, "v_new": new, "k_cache": cache, "v_cache": cache}
    valid |= {"input_pos": torch.arange(3), "scale": 1.0, "window": 0}
    prefill_attention(**valid)
    with pytest.raises(ValueError, match=message):
        prefill_attention(**(valid | changes))


def test_opcheck() -> None:
    args, _ = arguments(Case(first=29, tokens=8, window=4, length=8))
    finite = tuple(x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    torch.library.opcheck(torch.ops.gemma4.prefill_attention.default, finite)


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor) -> Tensor:
        out: Tensor = torch.ops.gemma4.prefill_attention(q, k, v, k_cache, v_cache, input_pos, SCALE, 4)
        return out


def test_export_keeps_the_node_for_any_chunk_length() -> None:
    args, _ = arguments(Case(first=29, tokens=8, window=4, length=8))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = ({2: tokens}, {2: tokens}, {2: tokens}, None, None, {0: tokens})
    program = torch.export.export(Attend(), args[:6], dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gemma4.prefill_attention.default"]
    other, answer = arguments(Case(first=17, tokens=13, window=4, length=8))
    assert relative_error(program.module()(*other[:6]), answer) < 1e-6


def test_compiles_on_cpu() -> None:
    args, answer = arguments(Case(first=29, tokens=8, window=4, length=8))
    out = torch.compile(Attend(), backend="aot_eager", fullgraph=True, dynamic=True)(*args[:6])
    assert relative_error(out, answer) < 1e-6


@pytest.mark.parametrize("shape", [SLIDING, FULL], ids=["sliding", "full"])
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_chosen_configuration_fits_the_device(capability: int, shape: Case) -> None:
    config = choose_config(shape.head_dim, 2, capability == 90, SHARED_LIMITS[capability])
    q = torch.empty(1, shape.q_heads, shape.tokens, shape.head_dim, dtype=torch.bfloat16, device="meta")
    new = torch.empty(1, shape.kv_heads, shape.tokens, shape.head_dim, dtype=torch.bfloat16, device="meta")
    old = torch.empty(1, shape.kv_heads, shape.length, shape.head_dim, dtype=torch.bfloat16, device="meta")
    input_pos = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    args = (q, new, new, old, old, input_pos, 1.0, shape.window, config)
    (kernel,) = compile_launches(module, capability, "prefill_attention_launch", *args)
    assert kernel.metadata.shared <= config.shared_bytes(shape.head_dim, 2) <= SHARED_LIMITS[capability]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_gpu(case: Case) -> None:
    args, answer = arguments(case, torch.bfloat16, "cuda")
    with poisoned_outputs():
        out = prefill_attention(*args)
        again = prefill_attention(*args)
    assert relative_error(out, answer) < 8e-3
    assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_float32(case: Case) -> None:
    args, answer = arguments(case, torch.float32, "cuda")
    with poisoned_outputs():
        out = prefill_attention(*args)
    assert relative_error(out, answer) < 1e-6
