from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from gemma4.kernels import packed_mma
from gemma4.kernels.activations import dequantize_activations, empty_activations, quantize_activations
from gemma4.kernels.packed_matvec import MMA_ROWS
from gemma4.kernels.packed_mma import launch_packed_mma
from gemma4.kernels.packed_planes import PACKED_FORMATS
from tests.kernels.attention_cases import poisoned_outputs
from tests.kernels.packed_cases import NAMES, assert_product, make_rows, make_weight
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

# Each format once, each capability at least once.
COMPILED = [(80, "q4_k", 8), (86, "q5_0", 5), (89, "q8_0", 4), (90, "q6_k", 8), (100, "q5_k", 8), (120, "q4_1", 4)]
COMPILED += [(90, "q4_0", 8), (90, "q5_1", 4)]


def compiled(name: str, m: int, k: int, capability: int, n: int = 16) -> list[Any]:
    activations = empty_activations(torch.empty(m, k, device="meta"), 2)
    return compile_launches(
        packed_mma, capability, "launch_packed_mma", name, activations, planes(name, n, k), torch.bfloat16
    )


def planes(name: str, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Planes of a weight [n, k], without storage."""
    return tuple(
        torch.empty((n, k // spec.weights, *spec.trailing), dtype=spec.dtype, device="meta")
        for spec in PACKED_FORMATS[name].planes
    )


def test_interpreted() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_packed_mma.py"))


@pytest.mark.parametrize(("capability", "name", "m"), COMPILED)
def test_operands_are_loaded_where_they_are_used(capability: int, name: str, m: int) -> None:
    (kernel,) = compiled(name, m, 1024, capability)
    ptx = kernel.asm["ptx"]
    # A turn is two steps, of eight groups of 32 each in a K-quant, otherwise of four: an instruction for each and every
    # eight columns of x, two with scales of 16, or where both halves of an instruction belong to another group.
    is_super = name.endswith("_k")
    products = (16 if is_super else 8) * (1 if name in ("q4_k", "q5_k", "q8_0") else 2) * (1 if m <= 4 else 2)
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32", ptx)) == products
    # Sixteen sums of x of a step, eight an instruction, each sum as two columns.
    offsets = 2 * 2 * (1 if m <= 4 else 2) if name in ("q4_k", "q5_k") else 0
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k8\S*\.f32\.tf32\.tf32\.f32", ptx)) == offsets
    assert kernel.metadata.shared < SHARED_LIMITS[120]
    # Triton 3.9 gives other layouts and moves operands through shared memory.
    if triton.__version__.startswith("3.6."):
        until_the_store, _ = ptx.rsplit("mma.sync", 1)
        assert not re.search(r"shfl|st\.shared|ld\.shared|cp\.async", until_the_store)
    # The four elements that `bytes_of` packs are copies of one word.
    packed = re.findall(r"// bytes of (\S+) (\S+) (\S+) (\S+)", ptx)
    assert packed
    assert all(len(set(registers)) == 1 for registers in packed)


def test_long_rows_are_split_and_added_up_by_a_second_kernel() -> None:
    product, total = compiled("q8_0", 4, 8192, 90)
    assert product.metadata.name == "packed_mma_kernel"
    assert total.metadata.name == "sum_parts_kernel"


def test_weights_are_fetched_before_the_wait_and_nothing_else() -> None:
    with mock.patch.object(packed_mma, "dependent_launch_options", return_value={"PDL": True, "launch_pdl": True}):
        (kernel,) = compiled("q8_0", 4, 512, 90)
    before, after = kernel.asm["ptx"].split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    assert "st.global" not in before
    assert before.count("L1::evict_first") >= 2 * 2  # both pieces of two eights of rows
    assert "mma.sync" not in before
    assert "st.global" in after


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "planes"), [(4, 2), (5, 2), (6, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name: str, m: int, planes: int) -> None:
    for n, k in ((1, 768), (33, 2048), (31, 21504), (70, 704 if PACKED_FORMATS[name].block == 32 else 256)):
        weight = make_weight(name, n, k, "cuda")
        activations = quantize_activations(make_rows(m, k, torch.bfloat16, "cuda"), planes)
        with poisoned_outputs():
            y = launch_packed_mma(name, activations, weight.planes, torch.float32)
        assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [5376, 21504])
@pytest.mark.parametrize("name", NAMES)
def test_gpu_rows_do_not_depend_on_each_other(name: str, k: int) -> None:
    weight = make_weight(name, 200, k, "cuda")
    xq, xs, xsum = quantize_activations(make_rows(8, k, torch.bfloat16, "cuda"))
    y = launch_packed_mma(name, (xq, xs, xsum), weight.planes, torch.float32)
    for start, stop in ((0, 1), (1, 64), (64, 167), (167, 200)):
        part = launch_packed_mma(name, (xq, xs, xsum), weight.rows(start, stop), torch.float32)
        assert torch.equal(part, y[:, start:stop])
    for rows in (2, 4):
        assert torch.equal(launch_packed_mma(name, (xq, xs, xsum), weight.planes, torch.float32, R=rows), y)
    for start, stop in ((0, MMA_ROWS), (3, 8), (8 - MMA_ROWS, 8)):
        part = (xq[:, :, start:stop].contiguous(), xs[start:stop].contiguous(), xsum[start:stop].contiguous())
        assert torch.equal(launch_packed_mma(name, part, weight.planes, torch.float32), y[start:stop])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_repeats_bit_for_bit(name: str) -> None:
    weight = make_weight(name, 513, 21504, "cuda")
    activations = quantize_activations(make_rows(8, 21504, torch.bfloat16, "cuda"))
    first = launch_packed_mma(name, activations, weight.planes, torch.float32)
    for _ in range(100):
        assert torch.equal(launch_packed_mma(name, activations, weight.planes, torch.float32), first)
