"""The tensor-core packed matmul in the interpreter; run by test_packed_mma.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.activations import dequantize_activations, quantize_activations_reference
from gemma4.kernels.packed_mma import launch_packed_mma
from gemma4.kernels.packed_planes import PACKED_FORMATS
from tests.kernels.attention_cases import poisoned_outputs
from tests.kernels.packed_cases import NAMES, assert_product, make_rows, make_weight

# N, K in blocks of 32 (a K-quant takes a multiple of 8), M, activation planes
CASES = [(9, 5, 8, 2), (2, 1, 5, 1)]


@pytest.mark.parametrize(("n", "groups", "m", "planes"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_product(name: str, n: int, groups: int, m: int, planes: int) -> None:
    block = PACKED_FORMATS[name].block
    k = -(-groups * 32 // block) * block
    weight = make_weight(name, n, k)
    activations = quantize_activations_reference(make_rows(m, k, torch.bfloat16), planes)
    with poisoned_outputs():
        y = launch_packed_mma(name, activations, weight.planes, torch.float32)
    assert y.shape == (m, n)
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


@pytest.mark.parametrize("name", ["q4_k", "q5_0"])
def test_half_of_the_columns(name: str) -> None:
    test_product(name, 3, 22, 4, 2)


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("q6_k", {"SPLIT": 3}),
        ("q5_1", {"KW": 4, "R": 4}),
        ("q4_k", {"KW": 2}),
    ],
)
def test_every_tile_covers_the_weight(name: str, tile: dict[str, int]) -> None:
    weight = make_weight(name, 19, 768)
    activations = quantize_activations_reference(make_rows(4, 768, torch.bfloat16))
    with poisoned_outputs():
        y = launch_packed_mma(name, activations, weight.planes, torch.float32, **tile)
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


# Not with offsets of a K-quant, which a BLAS sums here: in another order for another shape.
def test_rows_do_not_depend_on_each_other() -> None:
    weight = make_weight("q6_k", 20, 512)
    xq, xs, xsum = quantize_activations_reference(make_rows(8, 512, torch.bfloat16))
    y = launch_packed_mma("q6_k", (xq, xs, xsum), weight.planes, torch.float32, SPLIT=2)
    part = launch_packed_mma("q6_k", (xq, xs, xsum), weight.rows(11, 20), torch.float32, SPLIT=2, R=4)
    assert torch.equal(part, y[:, 11:])
    fewer = (xq[:, :, 2:6].contiguous(), xs[2:6].contiguous(), xsum[2:6].contiguous())
    assert torch.equal(launch_packed_mma("q6_k", fewer, weight.planes, torch.float32, SPLIT=2), y[2:6])


def test_bfloat16_output_is_rounded_once() -> None:
    weight = make_weight("q4_k", 9, 512)
    activations = quantize_activations_reference(make_rows(4, 512, torch.bfloat16))
    y = launch_packed_mma("q4_k", activations, weight.planes, torch.bfloat16, SPLIT=2)
    assert y.dtype == torch.bfloat16
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 2**-8)
