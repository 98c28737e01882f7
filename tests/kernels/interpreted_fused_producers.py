"""The kernels between matrix products, in the interpreter; run by test_fused_producers.py in its own process."""

from __future__ import annotations

import pytest
import torch

from gemma4.kernels import linear
from gemma4.kernels.activations import dequantize_activations, empty_activations, quantize_activations_reference
from gemma4.kernels.fused_norm import close_branch_reference, launch_fused_norm, rms_norm_reference
from gemma4.kernels.gelu_mul import gelu_mul_reference, launch_gelu_mul
from gemma4.kernels.packed_matvec import launch_packed_matvec
from gemma4.kernels.split_merge import Partials, head_rows, merge_heads, merge_quantized
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.packed_cases import assert_product, make_weight

SIZES = [(1, 32), (5, 96), (3, 256), (8, 704), (2, 1536)]
TOLERANCE = {1: 2e-2, 2: 1e-4}
SUM_TOLERANCE = {1: 1e-1, 2: 1e-3}  # sums of 16 cancel


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("m", "k"), SIZES)
@pytest.mark.parametrize("has_scale", [False, True])
def test_residual_norm(m: int, k: int, planes: int, has_scale: bool) -> None:
    h, y = torch.randn(m, k), 3 * torch.randn(m, k)
    post, weight = torch.rand(k) + 0.5, torch.rand(k) + 0.5
    scale = torch.tensor([0.4]) if has_scale else None
    with poisoned_outputs():
        xq, xs, xsum = empty_activations(h, planes)
        dense = torch.empty_like(h)
        out = launch_fused_norm(h, y, post, scale, weight, 1e-6, (xq, xs, xsum))
        same = launch_fused_norm(h, y, post, scale, weight, 1e-6, (dense,))
    h_ref = close_branch_reference(h, y, post, scale, 1e-6)
    assert relative_error(out, h_ref) < 1e-6
    assert torch.equal(same, out)
    x, own = torch.empty_like(h), h.clone()
    assert launch_fused_norm(own, y, post, scale, weight, 1e-6, (x,), in_place=True) is own
    assert relative_error(own, out) < 1e-6
    assert relative_error(x, dense) < 1e-6
    exact = rms_norm_reference(h_ref, weight, 1e-6)
    assert relative_error(dense, exact) < 1e-6
    xq_ref, xs_ref, xsum_ref = quantize_activations_reference(exact, planes)
    assert relative_error(dequantize_activations(xq, xs), exact) < TOLERANCE[planes]
    assert relative_error(dequantize_activations(xq, xs), dequantize_activations(xq_ref, xs_ref)) < TOLERANCE[planes]
    assert relative_error(xsum, xsum_ref) < SUM_TOLERANCE[planes]


@pytest.mark.parametrize(("m", "k"), SIZES)
def test_norm_alone(m: int, k: int) -> None:
    x, weight = torch.randn(m, k), torch.rand(k) + 0.5
    with poisoned_outputs():
        xq, xs, xsum = empty_activations(x, 2)
        dense = torch.empty_like(x)
        same = launch_fused_norm(x, None, None, None, weight, 1e-6, (xq, xs, xsum))
        launch_fused_norm(x, None, None, None, weight, 1e-6, (dense,))
    assert same is x
    exact = rms_norm_reference(x, weight, 1e-6)
    assert relative_error(dense, exact) < 1e-6
    assert relative_error(dequantize_activations(xq, xs), exact) < 1e-4
    assert relative_error(xsum, exact.unflatten(1, (-1, 16)).sum(-1)) < SUM_TOLERANCE[2]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("m", "k"), SIZES)
@pytest.mark.parametrize("is_fused", [False, True])
def test_gelu_mul(m: int, k: int, planes: int, is_fused: bool) -> None:
    both = 2 * torch.randn(m, 2 * k)
    gate, up = both.chunk(2, -1)
    if not is_fused:
        gate, up = gate.contiguous(), up.contiguous()
    with poisoned_outputs():
        xq, xs, xsum = empty_activations(gate, planes)
        dense = torch.empty(gate.shape)
        launch_gelu_mul(gate, up, (xq, xs, xsum))
        launch_gelu_mul(gate, up, (dense,))
    exact = gelu_mul_reference(gate, up)
    assert relative_error(dense, exact) < 1e-6
    assert relative_error(dequantize_activations(xq, xs), exact) < TOLERANCE[planes]
    assert relative_error(xsum, exact.unflatten(1, (-1, 16)).sum(-1)) < SUM_TOLERANCE[planes]


@pytest.mark.parametrize(("name", "m"), [("q8_0", 4), ("q5_0", 7)])  # on tensor cores and not
@pytest.mark.parametrize("producer", ["norm", "gelu", "merge"])
def test_products_read_what_is_stored(producer: str, name: str, m: int) -> None:
    x, y = torch.randn(m, 192), torch.randn(m, 192)
    weight = torch.rand(192) + 0.5
    with poisoned_outputs():
        activations, dense = empty_activations(x, 2), torch.empty_like(x)
        if producer == "merge":
            partials = Partials(torch.randn(1, 3, 2, m, 64), torch.randn(1, 3, 2, m), torch.rand(1, 3, 2, m) + 0.5)
            q = torch.empty(1, 3, m, 64)
            activations, dense = merge_quantized(partials, q, 2), head_rows(merge_heads(partials, q))
        for out in (activations, (dense,)):
            if producer == "norm":
                launch_fused_norm(x, y, weight, None, weight, 1e-6, out)
            elif producer == "gelu":
                launch_gelu_mul(x, y, out)
        packed = make_weight(name, 3, 192)
        kernel = getattr(linear, f"{name}_matvec_kernel")
        product = launch_packed_matvec(kernel, name, activations, packed.planes, torch.float32)
    assert_product(product, dense, packed.exact, 1e-4)
