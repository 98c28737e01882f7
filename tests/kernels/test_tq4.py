from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gemma4.kernels import prefill_attention, tq4_decode, tq4_prefill, tq4_rows
from gemma4.kernels.pieces import SLICED_BYTES, SliceShape
from gemma4.kernels.prefill_attention import choose_config
from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_prefill import slice_shape
from gemma4.kernels.tq4_sdpa import tq4_sdpa, tq4_sdpa_reference
from gemma4.kernels.tq4_write import tq4_write
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.tq4_cases import SCALE, Case, empty_cache, make_problem
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

CASES = [
    Case(first=0, tokens=1, length=9),
    Case(first=29, tokens=5, length=40, bits=4, q_heads=6),
    Case(first=11, tokens=30, length=41, head_dim=128, turned=64),
    Case(first=33, tokens=2, length=64, bits=4, q_heads=8, kv_heads=1, head_dim=128, turned=64),
]
# Full layers of Gemma 4 31B, of Gemma 4 E2B, and of Gemma 3 270M.
LAYERS = {
    "tied": Case(first=0, tokens=1, length=33000, q_heads=32, kv_heads=4, head_dim=512, turned=128),
    "512": Case(first=0, tokens=1, length=9000, q_heads=8, kv_heads=1, head_dim=512, turned=512),
    "256": Case(first=0, tokens=1, length=9000, q_heads=4, kv_heads=1, head_dim=256, turned=256),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case) -> None:
    problem = make_problem(case)
    found = tq4_sdpa_reference(problem.q, problem.cache, problem.k_weight, problem.input_pos, SCALE)
    assert relative_error(found, problem.answer) < 1e-6
    assert relative_error(tq4_sdpa(*problem.arguments()), problem.answer) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_write_on_cpu(case: Case) -> None:
    problem = make_problem(case)
    cache = empty_cache(case)
    tq4_write(problem.k[:, :, case.first :], problem.v[:, :, case.first :], *cache, problem.input_pos)
    for found, expected in zip(cache[:4], problem.cache[:4], strict=True):
        new = slice(case.first, case.first + case.tokens)
        assert torch.equal(found[:, :, new], expected[:, :, new])
        untouched = found[:, :, : case.first]
        assert untouched.isnan().all() if untouched.is_floating_point() else (untouched == 0xA5).all()
    if case.first:
        assert cache.first_key.isnan().all()
    else:
        assert torch.equal(cache.first_key, problem.cache.first_key)


def test_kernels_in_the_interpreter() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_tq4.py"))


def rejected(message: str, **changes: Any) -> Any:
    return pytest.param(message, changes, id="-".join(changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("q must be", q=torch.zeros(4, 1, 128)),
        rejected("q must be", q=torch.zeros(1, 4, 1, 256)[..., ::2]),
        rejected("do not share", q=torch.zeros(1, 3, 1, 128)),
        rejected("power of two", q=torch.zeros(1, 4, 1, 32)),
        rejected("v_codes must have 64 or 96", v_codes=torch.zeros(1, 2, 8, 80, dtype=torch.uint8)),
        rejected("k_scale must be float32 .1, 2, 7", k_codes=torch.zeros(1, 2, 7, 96, dtype=torch.uint8)),
        rejected("v_codes must be uint8", v_codes=torch.zeros(1, 2, 8, 96, dtype=torch.int8)),
        rejected("k_scale must be", k_scale=torch.zeros(1, 2, 8, dtype=torch.float16)),
        rejected("v_scale must be", v_scale=torch.zeros(1, 2, 9)),
        rejected("v_scale: expected strides .8, 1. .*got .16, 2", v_scale=torch.zeros(1, 2, 16)[..., ::2]),
        rejected("first_key must be float32 .1, 2, 128", first_key=torch.zeros(1, 2, 192)),
        rejected("first_key must be", first_key=torch.zeros(1, 2, 128, dtype=torch.float16)),
        rejected(
            "where, and only where",
            k_codes=torch.zeros(1, 2, 8, 48, dtype=torch.uint8),
            first_key=torch.zeros(1, 2, 192),
        ),
        rejected("where, and only where", k_weight=torch.zeros(128)),
        rejected(
            "k_weight must be",
            k_codes=torch.zeros(1, 2, 8, 48, dtype=torch.uint8),
            first_key=torch.zeros(1, 2, 192),
            k_weight=torch.zeros(64),
        ),
        rejected("input_pos", input_pos=torch.zeros(1, dtype=torch.int32)),
        rejected("input_pos", input_pos=torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_rejects(message: str, changes: dict[str, Any]) -> None:
    codes, scales = torch.zeros(1, 2, 8, 96, dtype=torch.uint8), torch.zeros(1, 2, 8)
    valid = {"q": torch.zeros(1, 4, 1, 128), "k_codes": codes, "k_scale": scales, "v_codes": codes, "v_scale": scales}
    valid |= {"first_key": torch.zeros(1, 2, 128), "k_weight": None, "scale": 1.0}
    valid["input_pos"] = torch.zeros(1, dtype=torch.int64)
    tq4_sdpa(**valid)
    with pytest.raises(ValueError, match=message):
        tq4_sdpa(**(valid | changes))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        rejected("alike", k=torch.zeros(1, 2, 2, 128)),
        rejected("alike", v=torch.zeros(1, 2, 1, 128, dtype=torch.float64)),
        rejected("along D", k=torch.zeros(1, 2, 1, 256)[..., ::2]),
        rejected("input_pos", input_pos=torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_write_rejects(message: str, changes: dict[str, Any]) -> None:
    codes, scales = torch.zeros(1, 2, 8, 96, dtype=torch.uint8), torch.zeros(1, 2, 8)
    valid = {"k": torch.ones(1, 2, 1, 128), "v": torch.ones(1, 2, 1, 128), "input_pos": torch.tensor([3])}
    cache = {"k_codes": codes, "k_scale": scales, "v_codes": codes.clone(), "v_scale": scales.clone()}
    cache["first_key"] = torch.zeros(1, 2, 128)
    tq4_write(**valid, **cache)
    assert scales[0, 0].nonzero().tolist() == [[3]]
    with pytest.raises(ValueError, match=message):
        tq4_write(**(valid | changes), **cache)


def test_opcheck() -> None:
    problem = make_problem(CASES[0])
    cache = tuple(x.nan_to_num() if x.is_floating_point() else x for x in problem.cache)
    args = (problem.q, *cache, problem.k_weight, problem.input_pos, SCALE)
    torch.library.opcheck(torch.ops.gemma4.tq4_sdpa.default, args)
    new = (problem.k[:, :, -1:], problem.v[:, :, -1:])
    torch.library.opcheck(torch.ops.gemma4.tq4_write.default, (*new, *cache, problem.input_pos))


class Step(torch.nn.Module):
    """Writes and attends; the cache is zero buffers."""

    def __init__(self, case: Case, k_weight: Tensor | None) -> None:
        super().__init__()
        self.k_weight = k_weight
        for name, tensor in empty_cache(case)._asdict().items():
            self.register_buffer(name, torch.zeros_like(tensor))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        cache = tuple(getattr(self, name) for name in TQ4Cache._fields)
        tq4_write(k, v, *cache, input_pos)
        out: Tensor = tq4_sdpa(q, *cache, self.k_weight, input_pos, SCALE)
        return out


@pytest.mark.parametrize("tokens", [1, None], ids=["decode", "prefill"])
def test_export_keeps_the_nodes_and_needs_only_zero_caches(tokens: int | None) -> None:
    case = Case(first=0, tokens=tokens or 12, length=24, q_heads=4, head_dim=128, turned=64)
    problem = make_problem(case)
    step = Step(case, problem.k_weight)
    example = (problem.q, problem.k, problem.v, problem.input_pos)
    open_length = torch.export.Dim("tokens", min=2, max=16)
    shapes = None if tokens else ({2: open_length}, {2: open_length}, {2: open_length}, {0: open_length})
    program = torch.export.export(step, example, dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("gemma4.")] == ["gemma4.tq4_write.default", "gemma4.tq4_sdpa.default"]
    names = set(program.graph_signature.buffers)
    assert names == set(TQ4Cache._fields)
    assert relative_error(program.module()(*example), problem.answer) < 1e-6


def on_meta(shape: Case) -> tuple[Tensor, TQ4Cache, Tensor]:
    """Queries, cache and positions of a launch, without storage."""
    q = torch.empty(1, shape.q_heads, shape.tokens, shape.head_dim, dtype=torch.bfloat16, device="meta")
    input_pos = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    return q, TQ4Cache(*(x.to("meta") for x in empty_cache(shape))), input_pos


TARGETS = [(80, "512", 4), (90, "tied", 6), (120, "tied", 6)]


@pytest.mark.parametrize(("capability", "name", "bits"), TARGETS)
def test_decode_fits_the_device(capability: int, name: str, bits: int) -> None:
    shape = dataclasses.replace(LAYERS[name], bits=bits, length=1024)
    widths, limit = (shape.turned, shape.head_dim, bits), SHARED_LIMITS[capability]
    config = tq4_decode.choose_config(shape.q_heads // shape.kv_heads, *widths, limit)
    q, cache, input_pos = on_meta(shape)
    queries = q.new_empty(*q.shape[:3], shape.head_dim + shape.turned * shape.is_tied, dtype=torch.float16)
    args = (queries, cache, input_pos, 1.0, q, config, 66)
    kernel, merge = compile_launches(tq4_decode, capability, "tq4_decode_launch", *args)
    assert kernel.metadata.shared <= config.shared_bytes(*widths) <= limit
    assert merge.metadata.shared <= limit


@pytest.mark.parametrize(("capability", "name", "bits"), TARGETS)
def test_prefill_fits_the_device(capability: int, name: str, bits: int) -> None:
    shape = dataclasses.replace(LAYERS[name], tokens=300, bits=bits, length=1024)
    limit = SHARED_LIMITS[capability]
    config = choose_config(shape.head_dim, 2, capability == 90, limit)
    q, cache, input_pos = on_meta(shape)
    k_weight = torch.empty(shape.head_dim, device="meta") if shape.is_tied else None
    args = (q, cache, k_weight, input_pos, 1.0, config, SliceShape(300, shape.kv_heads, 1024))
    with mock.patch.object(tq4_prefill, "launch_tq4_rows") as launch_rows:
        (kernel,) = compile_launches(tq4_prefill, capability, "tq4_prefill_launch", *args)
    (rows,) = compile_launches(tq4_rows, capability, "launch_tq4_rows", *launch_rows.call_args.args)
    assert kernel.metadata.shared <= config.shared_bytes(shape.head_dim, 2) <= limit
    assert rows.metadata.shared <= limit


def test_slices_are_bounded() -> None:
    for layer, tokens, expected in (
        ("tied", 2048, (1024, 1, 6528)),
        ("tied", 100, (100, 4, 2816)),
        ("512", 1024, (1024, 1, 6528)),
        ("256", 2048, (2048, 1, 21376)),
    ):
        q, _, _ = on_meta(dataclasses.replace(LAYERS[layer], tokens=tokens, length=1))
        shape = slice_shape(q, LAYERS[layer].kv_heads)
        state = shape.heads * shape.tokens * (LAYERS[layer].q_heads // LAYERS[layer].kv_heads)
        rows = shape.heads * shape.keys * 2 * LAYERS[layer].head_dim * 2
        assert shape == expected
        assert state * (4 * LAYERS[layer].head_dim + 16) + rows <= SLICED_BYTES


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_every_device_has_a_configuration(name: str, bits: int, tokens: int) -> None:
    shape = LAYERS[name]
    widths = (shape.turned, shape.head_dim, bits)
    for limit in SHARED_LIMITS.values():
        rows = shape.q_heads // shape.kv_heads * tokens
        assert tq4_decode.choose_config(rows, *widths, limit).shared_bytes(*widths) <= limit


def test_superset_has_small_tiles() -> None:
    assert {config.block_n for config in tq4_decode.CONFIGS} >= {16, 32, 64}
    assert {config.block_n for config in prefill_attention.CONFIGS} >= {16, 32, 64}
    assert {config.block_m for config in prefill_attention.CONFIGS} >= {16, 32, 64, 128}


REAL = [
    *(dataclasses.replace(shape, first=first, bits=6) for shape in LAYERS.values() for first in (0, 63, 64, 5000)),
    *(dataclasses.replace(shape, first=3000, bits=4) for shape in LAYERS.values()),
    *(dataclasses.replace(LAYERS["tied"], first=4000, tokens=t) for t in (2, 3, 4, 8, 9, 65, 700)),
    *(dataclasses.replace(shape, first=100, tokens=300, bits=4) for shape in LAYERS.values()),
    dataclasses.replace(LAYERS["256"], tokens=1500),
    dataclasses.replace(LAYERS["512"], first=1000, tokens=333),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_gpu(case: Case) -> None:
    problem = make_problem(case, torch.bfloat16, "cuda")
    with poisoned_outputs():
        out = tq4_sdpa(*problem.arguments())
        again = tq4_sdpa(*problem.arguments())
    assert relative_error(out, problem.answer) < 8e-3
    assert torch.equal(out, again)


@pytest.mark.gpu
def test_gpu_slices_change_no_bit() -> None:
    case = dataclasses.replace(LAYERS["tied"], first=3000, tokens=500, length=5000)
    problem = make_problem(case, torch.bfloat16, "cuda")
    config = choose_config(case.head_dim, 2, *prefill_attention.device_limits(problem.q.device))
    results = []
    for shape in (SliceShape(500, 4, 5120), SliceShape(500, 1, 1024), SliceShape(200, 2, 2048)):
        with poisoned_outputs():
            args = (problem.q, problem.cache, problem.k_weight, problem.input_pos, SCALE, config, shape)
            results.append(tq4_prefill.tq4_prefill_launch(*args))
    few = problem.cache.first_slots(3584)
    results.append(tq4_sdpa(problem.q, *few, problem.k_weight, problem.input_pos, SCALE))
    for found in results[1:]:
        assert torch.equal(found, results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASES[1], *REAL[::3]], ids=str)
def test_gpu_write(case: Case) -> None:
    problem = make_problem(case, torch.bfloat16, "cuda")
    cache = empty_cache(case, "cuda")
    tq4_write(problem.k[:, :, case.first :], problem.v[:, :, case.first :], *cache, problem.input_pos)
    new = slice(case.first, case.first + case.tokens)
    for found, expected in zip(cache[:4], problem.cache[:4], strict=True):
        if found.is_floating_point():
            torch.testing.assert_close(found[:, :, new], expected[:, :, new], rtol=1e-4, atol=0)
        else:  # a coordinate on the border of two cells may fall into either
            assert (found[:, :, new] != expected[:, :, new]).float().mean() < 1e-3
        untouched = found[:, :, : case.first]
        assert untouched.isnan().all() if untouched.is_floating_point() else (untouched == 0xA5).all()
    if case.first:
        assert cache.first_key.isnan().all()
    else:
        torch.testing.assert_close(cache.first_key, problem.cache.first_key, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_one_cuda_graph_serves_every_position() -> None:
    case = dataclasses.replace(LAYERS["tied"], first=5000)
    problem = make_problem(case, torch.bfloat16, "cuda")
    q, input_pos = problem.q.clone(), problem.input_pos.clone()
    cache = TQ4Cache(*(x.nan_to_num() if x.is_floating_point() else x for x in problem.cache))
    tq4_sdpa(q, *cache, problem.k_weight, input_pos, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tq4_sdpa(q, *cache, problem.k_weight, input_pos, SCALE)
    for position in (0, 77, 1500, 5000):
        input_pos.fill_(position)
        graph.replay()
        expected = tq4_sdpa_reference(q, cache, problem.k_weight, input_pos, SCALE)
        assert relative_error(out, expected) < 8e-3
