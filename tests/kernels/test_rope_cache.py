from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4.kernels import rope_cache as module
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.rope_cases import EPS, RopeCase, exact, make_inputs
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

CASES = [
    RopeCase(tokens=1, first=0, q_heads=1, kv_heads=1, head_dim=2, rotated=1, v_norm=True, values=True),
    RopeCase(tokens=5, first=13, q_heads=4, kv_heads=2, head_dim=16, rotated=8, v_norm=True, values=True),
    RopeCase(tokens=3, first=7, q_heads=4, kv_heads=1, head_dim=32, rotated=16, v_norm=False, values=True),
    RopeCase(tokens=2, first=262142, q_heads=8, kv_heads=2, head_dim=64, rotated=8, v_norm=True, values=False),
]
# Gemma 4 31B: sliding layers turn all 128 pairs; full layers turn 64 of 256 and take v from k.
SLIDING = RopeCase(tokens=1, first=5, q_heads=32, kv_heads=16, head_dim=256, rotated=128, v_norm=True, values=True)
FULL = RopeCase(tokens=1, first=5, q_heads=32, kv_heads=4, head_dim=512, rotated=64, v_norm=True, values=False)
REAL = [
    dataclasses.replace(shape, tokens=tokens, first=first)
    for shape in (SLIDING, FULL)
    for tokens, first in ((1, 0), (1, 262143), (3, 2047), (200, 261900))
]


def run(case: RopeCase, x: Any) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = qk_norm_rope(
        x.q, x.k, x.v, x.q_weight, x.k_weight, x.inv_freq, x.input_pos, EPS, case.v_norm
    )
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: RopeCase) -> None:
    x = make_inputs(case, torch.float32)
    for out, answer in zip(run(case, x), exact(x, case.v_norm), strict=True):
        assert out.is_contiguous()
        assert relative_error(out, answer) < 1e-6


def test_cpu_cache_takes_the_slots_of_the_positions() -> None:
    case = CASES[1]
    x = make_inputs(case, torch.float32)
    k_cache, v_cache = torch.zeros(2, 1, 2, 7, 16)
    q = qk_norm_rope_cache(
        x.q, x.k, x.v, x.q_weight, x.k_weight, k_cache, v_cache, x.inv_freq, x.input_pos, EPS, case.v_norm
    )
    slots = [6, 0, 1, 2, 3]  # positions 13 to 17 in 7 slots
    for out, answer in zip((q, k_cache[:, :, slots], v_cache[:, :, slots]), exact(x, case.v_norm), strict=True):
        assert relative_error(out, answer) < 1e-6
    assert not k_cache[:, :, 4:6].any()
    assert not v_cache[:, :, 4:6].any()


def test_kernel_in_the_interpreter() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_rope_cache.py"))


def rejected(message: str, **changes: Any) -> Any:
    return pytest.param(message, changes, id="-".join(changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("q must be", q=torch.zeros(3, 63)),
        rejected("k must be", q=torch.zeros(2, 64)),
        rejected("contiguous rows", q=torch.zeros(64, 3).t()),
        rejected("k must be torch.float32", k=torch.zeros(3, 32, dtype=torch.float64)),
        rejected("v must be", v=torch.zeros(3, 16)),
        rejected("power of two", q_weight=torch.ones(24), q=torch.zeros(3, 48), k=torch.zeros(3, 48), v=None),
        rejected("contiguous float32", q_weight=torch.ones(16, dtype=torch.bfloat16)),
        rejected("k_weight must be", k_weight=torch.ones(8)),
        rejected("inv_freq must be", inv_freq=torch.ones(16)),
        rejected("input_pos must be", input_pos=torch.zeros(2, dtype=torch.int64)),
        rejected("k_cache must be", k_cache=torch.zeros(2, 2, 8, 16), v_cache=torch.zeros(2, 2, 8, 16)),
        rejected("v_cache must have", v_cache=torch.zeros(1, 2, 9, 16)),
    ],
)
def test_rejects(message: str, changes: dict[str, Any]) -> None:
    valid: dict[str, Any] = {"q": torch.zeros(3, 64), "k": torch.zeros(3, 32), "v": torch.zeros(3, 32)}
    valid |= {"q_weight": torch.ones(16), "k_weight": torch.ones(16), "inv_freq": torch.ones(8)}
    valid |= {"k_cache": torch.zeros(1, 2, 8, 16), "v_cache": torch.zeros(1, 2, 8, 16)}
    valid |= {"input_pos": torch.arange(3), "eps": EPS, "v_norm": True}
    qk_norm_rope_cache(**valid)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_cache(**(valid | changes))


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_opcheck(case: RopeCase) -> None:
    x = make_inputs(case, torch.float32)
    heads, norm = (x.q, x.k, x.v, x.q_weight, x.k_weight), (x.inv_freq, x.input_pos, EPS, case.v_norm)
    torch.library.opcheck(torch.ops.gemma4.qk_norm_rope.default, (*heads, *norm))
    caches = torch.zeros(2, 1, case.kv_heads, 8, case.head_dim)
    args = (*heads, caches[0].clone(), caches[1].clone(), *norm)
    torch.library.opcheck(torch.ops.gemma4.qk_norm_rope_cache.default, args)


class DecodeStep(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, 2, 8, 16))
        self.register_buffer("v_cache", torch.zeros(1, 2, 8, 16))

    def forward(self, q: Tensor, k: Tensor, weight: Tensor, inv_freq: Tensor, input_pos: Tensor) -> Tensor:
        args = (q, k, None, weight, weight, self.k_cache, self.v_cache, inv_freq, input_pos, EPS, True)
        out: Tensor = torch.ops.gemma4.qk_norm_rope_cache(*args)
        return out


def test_export_keeps_the_node_and_the_mutation() -> None:
    x = make_inputs(CASES[1], torch.float32)
    args = (x.q, x.k, x.q_weight, x.inv_freq, x.input_pos)
    program = torch.export.export(DecodeStep(), args)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gemma4.qk_norm_rope_cache.default"]
    exported, eager = program.module(), DecodeStep()
    assert torch.equal(exported(*args), eager(*args))
    assert torch.equal(exported.k_cache, eager.k_cache)
    assert eager.k_cache.any()


@pytest.mark.parametrize("into_cache", [False, True])
@pytest.mark.parametrize("case", [SLIDING, FULL], ids=["sliding", "full"])
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_compiles_for_the_device(capability: int, case: RopeCase, into_cache: bool) -> None:
    x = make_inputs(case, torch.bfloat16)
    caches = torch.empty(2, 1, case.kv_heads, 64, case.head_dim, dtype=torch.bfloat16)
    args = (x.q, x.k, x.v, x.q_weight, x.k_weight, *caches, x.inv_freq, x.input_pos, EPS, True, into_cache)
    (kernel,) = compile_launches(module, capability, "qk_norm_rope_launch", *args)
    assert kernel.metadata.shared <= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", REAL, ids=str)
def test_gpu(case: RopeCase, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    x = make_inputs(case, dtype, "cuda")
    with poisoned_outputs():
        outs = run(case, x)
    for out, answer in zip(outs, exact(x, case.v_norm), strict=True):
        assert relative_error(out, answer) < tolerance
    k_cache, v_cache = torch.zeros(2, 1, case.kv_heads, 2048, case.head_dim, dtype=dtype, device="cuda")
    q = qk_norm_rope_cache(
        x.q, x.k, x.v, x.q_weight, x.k_weight, k_cache, v_cache, x.inv_freq, x.input_pos, EPS, case.v_norm
    )
    slots = x.input_pos % 2048
    for cached, out in zip((q, k_cache[:, :, slots], v_cache[:, :, slots]), outs, strict=True):
        assert relative_error(cached, out) < tolerance
    assert int((k_cache != 0).any(-1).sum()) == case.kv_heads * case.tokens
