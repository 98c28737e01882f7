from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma4.kernels import tied_rope_cache as module
from gemma4.kernels.rope_cache import qk_norm_rope
from gemma4.kernels.tied_rope_cache import (
    keys_and_values,
    natural_order,
    tied_norm_rope,
    tied_norm_rope_cache,
    tied_order,
    tied_queries,
)
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.rope_cases import EPS, RopeCase, exact, make_inputs
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches

CASES = [
    RopeCase(tokens=1, first=0, q_heads=2, kv_heads=1, head_dim=16, rotated=2, v_norm=True, values=False),
    RopeCase(tokens=5, first=13, q_heads=4, kv_heads=2, head_dim=32, rotated=4, v_norm=True, values=False),
    RopeCase(tokens=2, first=262142, q_heads=8, kv_heads=2, head_dim=64, rotated=16, v_norm=True, values=False),
]
FULL = RopeCase(tokens=1, first=5, q_heads=32, kv_heads=4, head_dim=512, rotated=64, v_norm=True, values=False)


def test_tied_order() -> None:
    assert tied_order(torch.arange(16), 4).tolist() == [0, 1, 8, 9, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]
    x = torch.randn(3, 16)
    assert torch.equal(natural_order(tied_order(x, 4), 4), x)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_keys_and_values(case: RopeCase) -> None:
    x = make_inputs(case, torch.float32)
    weights, rotated = (x.q_weight, x.k_weight), 2 * case.rotated
    queries, rows = tied_norm_rope(x.q, x.k, *weights, x.inv_freq, x.input_pos, EPS, rotated)
    q, k, v = exact(x, v_norm=True)
    keys, values = keys_and_values(rows, rotated)
    assert relative_error(natural_order(values, rotated), v) < 1e-6
    group = case.q_heads // case.kv_heads
    scores = torch.einsum("bhtd,bhnd->bhtn", queries.double(), keys.double().repeat_interleave(group, 1))
    assert relative_error(scores, torch.einsum("bhtd,bhnd->bhtn", q, k.repeat_interleave(group, 1))) < 1e-6
    assert relative_error(tied_queries(q.float(), x.k_weight, rotated), queries) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_two_tensors(case: RopeCase) -> None:
    """In bfloat16: the turned part of the key and the value have the same bits."""
    x = make_inputs(case, torch.bfloat16)
    weights, rotated = (x.q_weight, x.k_weight), 2 * case.rotated
    queries, rows = tied_norm_rope(x.q, x.k, *weights, x.inv_freq, x.input_pos, EPS, rotated)
    q, k, v = qk_norm_rope(x.q, x.k, None, *weights, x.inv_freq, x.input_pos, EPS, True)
    assert torch.equal(rows[..., :rotated], tied_order(k, rotated)[..., :rotated])
    assert torch.equal(natural_order(rows[..., rotated:], rotated), v)
    assert torch.equal(queries[..., :rotated], tied_order(q, rotated)[..., :rotated])


def test_cache_takes_the_slots_of_the_positions() -> None:
    x = make_inputs(CASES[1], torch.float32)
    args = (x.q, x.k, x.q_weight, x.k_weight)
    cache = torch.zeros(1, 2, 7, 40)
    queries = tied_norm_rope_cache(*args, cache, x.inv_freq, x.input_pos, EPS)
    expected = tied_norm_rope(*args, x.inv_freq, x.input_pos, EPS, 8)
    assert torch.equal(queries, expected[0])
    assert torch.equal(cache[:, :, [6, 0, 1, 2, 3]], expected[1])  # positions 13 to 17 in 7 slots
    assert not cache[:, :, 4:6].any()


def rejected(message: str, **changes: Any) -> Any:
    return pytest.param(message, changes, id="-".join(changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("q must be", q=torch.zeros(3, 63)),
        rejected("k must be torch.float32", k=torch.zeros(3, 32, dtype=torch.float64)),
        rejected("k_weight must be", k_weight=torch.ones(8)),
        rejected("inv_freq must be", inv_freq=torch.ones(16)),
        rejected("input_pos must be", input_pos=torch.zeros(2, dtype=torch.int64)),
        rejected("rotated must be", kv_cache=torch.zeros(1, 2, 8, 19)),
        rejected("rotated must be", kv_cache=torch.zeros(1, 2, 8, 33)),
        rejected("kv_cache must be", kv_cache=torch.zeros(2, 2, 8, 20)),
        rejected("kv_cache must be", kv_cache=torch.zeros(1, 2, 8, 20, dtype=torch.float64)),
        rejected("contiguous rows", kv_cache=torch.zeros(1, 2, 20, 8).transpose(2, 3)),
    ],
)
def test_rejects(message: str, changes: dict[str, Any]) -> None:
    valid: dict[str, Any] = {"q": torch.zeros(3, 64), "k": torch.zeros(3, 32), "kv_cache": torch.zeros(1, 2, 8, 20)}
    valid |= {"q_weight": torch.ones(16), "k_weight": torch.ones(16), "inv_freq": torch.ones(8)}
    valid |= {"input_pos": torch.arange(3), "eps": EPS}
    tied_norm_rope_cache(**valid)
    with pytest.raises(ValueError, match=message):
        tied_norm_rope_cache(**(valid | changes))


def test_opcheck() -> None:
    x = make_inputs(CASES[1], torch.float32)
    args, norm = (x.q, x.k, x.q_weight, x.k_weight), (x.inv_freq, x.input_pos, EPS)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gemma4.tied_norm_rope.default, (*args, *norm, 8), test_utils=tests)
    cached = (*args, torch.zeros(1, 2, 8, 40), *norm)
    torch.library.opcheck(torch.ops.gemma4.tied_norm_rope_cache.default, cached, test_utils=tests)


class DecodeStep(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv", torch.zeros(1, 2, 8, 40))

    def forward(self, q: Tensor, k: Tensor, weight: Tensor, inv_freq: Tensor, input_pos: Tensor) -> Tensor:
        out: Tensor = torch.ops.gemma4.tied_norm_rope_cache(q, k, weight, weight, self.kv, inv_freq, input_pos, EPS)
        return out


def test_export_keeps_the_node_and_the_mutation() -> None:
    x = make_inputs(CASES[1], torch.float32)
    args = (x.q, x.k, x.q_weight, x.inv_freq, x.input_pos)
    program = torch.export.export(DecodeStep(), args)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["gemma4.tied_norm_rope_cache.default"]
    exported, eager = program.module(), DecodeStep()
    assert torch.equal(exported(*args), eager(*args))
    assert torch.equal(exported.kv, eager.kv)
    assert eager.kv.any()


@pytest.mark.parametrize("into_cache", [False, True])
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_compiles_for_the_device(capability: int, into_cache: bool) -> None:
    x = make_inputs(FULL, torch.bfloat16)
    rows = torch.empty(1, FULL.kv_heads, 64, 640, dtype=torch.bfloat16)
    args = (x.q, x.k, x.q_weight, x.k_weight, rows, x.inv_freq, x.input_pos, EPS, into_cache)
    (kernel,) = compile_launches(module, capability, "tied_norm_rope_launch", *args)
    assert kernel.metadata.shared <= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "first"), [(1, 0), (1, 262143), (3, 2047), (200, 261900)])
def test_gpu(tokens: int, first: int, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    x = make_inputs(dataclasses.replace(FULL, tokens=tokens, first=first), dtype, "cuda")
    args = (x.q, x.k, x.q_weight, x.k_weight)
    with poisoned_outputs():
        queries, rows = tied_norm_rope(*args, x.inv_freq, x.input_pos, EPS, 128)
    q, k, v = exact(x, v_norm=True)
    keys, values = keys_and_values(rows, 128)
    assert relative_error(natural_order(values, 128), v) < tolerance
    assert relative_error(queries, tied_queries(q, x.k_weight, 128)) < tolerance
    assert relative_error(keys[..., :128], tied_order(k, 128)[..., :128]) < tolerance
    cache = torch.zeros(1, FULL.kv_heads, 2048, 640, dtype=dtype, device="cuda")
    cached = tied_norm_rope_cache(*args, cache, x.inv_freq, x.input_pos, EPS)
    assert relative_error(cached, queries) < tolerance
    assert relative_error(cache[:, :, x.input_pos % 2048], rows) < tolerance
    assert int((cache != 0).any(-1).sum()) == FULL.kv_heads * tokens
