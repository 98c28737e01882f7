"""The packed matvec kernels in the interpreter; run by test_packed_matvec.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels import linear
from gemma4.kernels.activations import dequantize_activations, quantize_activations_reference
from gemma4.kernels.packed_matvec import MMA_ROWS, launch_packed_matvec
from gemma4.kernels.packed_planes import PACKED_FORMATS
from tests.kernels.attention_cases import poisoned_outputs
from tests.kernels.packed_cases import NAMES, assert_product, make_rows, make_weight

# N, K in blocks of 32 (a K-quant takes a multiple of 8), M, activation planes
CASES = [(1, 8, 1, 2), (7, 1, 2, 1), (5, 23, 1, 2)]
TILES = [
    {"KL": 8, "RL": 4, "KW": 2, "R": 4},
    {"KL": 4, "RL": 8, "KW": 4, "R": 1, "UNROLL": 2},
    {"KL": 32, "RL": 2, "KW": 1, "R": 2},
]


@pytest.mark.parametrize(("n", "groups", "m", "planes"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_matvec(name: str, n: int, groups: int, m: int, planes: int) -> None:
    block = PACKED_FORMATS[name].block
    k = -(-groups * 32 // block) * block
    weight = make_weight(name, n, k)
    activations = quantize_activations_reference(make_rows(m, k, torch.bfloat16), planes)
    kernel = getattr(linear, f"{name}_matvec_kernel")
    with poisoned_outputs():
        y = launch_packed_matvec(kernel, name, activations, weight.planes, torch.float32)
    assert y.shape == (m, n)
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_most_rows(name: str) -> None:
    test_matvec(name, 3, 8, MMA_ROWS - 1, 2)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", ["q4_k", "q5_1"])
def test_every_tile_covers_the_weight(name: str, tile: dict[str, int]) -> None:
    weight = make_weight(name, 33, 512)
    activations = quantize_activations_reference(make_rows(2, 512, torch.bfloat16))
    kernel = getattr(linear, f"{name}_matvec_kernel")
    with poisoned_outputs():
        y = launch_packed_matvec(kernel, name, activations, weight.planes, torch.float32, **tile)
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


def test_bfloat16_output_is_rounded_once() -> None:
    weight = make_weight("q4_k", 9, 256)
    activations = quantize_activations_reference(make_rows(1, 256, torch.bfloat16))
    y = launch_packed_matvec(linear.q4_k_matvec_kernel, "q4_k", activations, weight.planes, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 2**-8)
