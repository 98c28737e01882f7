"""The kernels that decode weights and quantize activations, in the interpreter; run in a process of their own."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels.activations import (
    FRAGMENT_ROWS,
    dequantize_activations,
    launch_quantize_activations,
    quantize_activations_reference,
)
from gemma4.kernels.dequantize_planes import launch_dequantize_planes
from gemma4.kernels.packed_planes import PACKED_FORMATS
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.packed_cases import NAMES, make_rows, make_weight


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("name", NAMES)
def test_decoded_weights_are_exact(name: str, n: int) -> None:
    weight = make_weight(name, n, 768 if PACKED_FORMATS[name].block == 256 else 736)
    with poisoned_outputs():
        out = launch_dequantize_planes(name, weight.planes, torch.float32)
    assert torch.equal(out.double(), weight.exact)


@pytest.mark.parametrize("name", NAMES)
def test_embedded_rows_are_exact(name: str) -> None:
    weight = make_weight(name, 33, 768 if PACKED_FORMATS[name].block == 256 else 736)
    ids = torch.tensor([32, 0, 7, 7])
    with poisoned_outputs():
        out = launch_dequantize_planes(name, weight.planes, torch.float32, ids)
    assert torch.equal(out.double(), weight.exact[ids])


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 32), (2, 96), (3, 736), (5, 96), (1, 2048)])
def test_quantized_activations(m: int, k: int, dtype: torch.dtype, planes: int) -> None:
    x = make_rows(m, k, dtype)
    x[:, 32:64] = 0
    with poisoned_outputs():
        xq, xs, xsum = launch_quantize_activations(x, planes)
    reference = quantize_activations_reference(x, planes)
    assert relative_error(xs, reference[1]) < 1e-6
    # A quotient may round to the other neighbour, which moves one step of the scale.
    steps = (dequantize_activations(xq, xs) - dequantize_activations(*reference[:2])).unflatten(1, (-1, 32))
    assert (steps.abs() <= 1.001 * reference[1][..., None]).all()
    sums = dequantize_activations(xq, xs).unflatten(1, (-1, 16)).double().sum(-1)
    assert relative_error(xsum, sums) < 1e-6
    if k % 64:
        padding = xq[:, :, 2:, -1] if m < FRAGMENT_ROWS.value else xq[:, -1, :, :, 8:]
        assert not padding.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_stays_visible(bad: float) -> None:
    x = make_rows(1, 96, torch.float32)
    x[0, 40] = bad
    for _, xs, xsum in (launch_quantize_activations(x, 2), quantize_activations_reference(x, 2)):
        assert xs.isnan().tolist() == [[False, True, False]]
        assert xsum.isnan().tolist() == [[False, False, True, True, False, False]]
