from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma4.kernels import fused_norm
from gemma4.kernels import gelu_mul as gelu_mul_module
from gemma4.kernels.activations import dequantize_activations, empty_activations
from gemma4.kernels.fused_norm import (
    close_branch_reference,
    residual_norm,
    residual_norm_,
    residual_norm_quantize,
    rms_norm,
    rms_norm_quantize,
    rms_norm_reference,
)
from gemma4.kernels.gelu_mul import gelu_mul, gelu_mul_quantize, gelu_mul_reference
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.triton_without_gpu import compile_launches, run_interpreted

EPS = 1e-6


def rows(m: int, k: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, y = torch.randn(m, k, device=device), torch.randn(m, k, device=device)
    return h, y, torch.rand(k, device=device) + 0.5, torch.rand(k, device=device) + 0.5


def test_interpreted() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_fused_producers.py"))


@pytest.mark.parametrize("m", [1, 8])
def test_ops_on_the_cpu(m: int) -> None:
    h, y, post, weight = rows(m, 96)
    out, xq, xs, _ = residual_norm_quantize(h, y, post, torch.tensor([0.5]), weight, EPS)
    expected = 0.5 * (h + rms_norm_reference(y, post, EPS))
    torch.testing.assert_close(out, expected)
    assert relative_error(dequantize_activations(xq, xs), rms_norm_reference(expected, weight, EPS)) < 1e-4
    same, x = h.clone(), residual_norm_(h, y, post, torch.tensor([0.5]), weight, EPS, torch.float32)
    assert torch.equal(h, expected)
    assert torch.equal(x, rms_norm_reference(expected, weight, EPS))
    assert torch.equal(residual_norm(same, y, post, torch.tensor([0.5]), weight, EPS, torch.float32)[1], x)
    xq, xs, _ = rms_norm_quantize(h, weight, EPS)
    assert relative_error(dequantize_activations(xq, xs), rms_norm_reference(h, weight, EPS)) < 1e-4
    gate, up = torch.randn(m, 128).chunk(2, -1)
    xq, xs, _ = gelu_mul_quantize(gate, up)
    assert relative_error(dequantize_activations(xq, xs), gelu_mul_reference(gate, up)) < 1e-4


def test_ops_are_sound_for_tracing() -> None:
    h, y, post, weight = rows(2, 64)
    gate, up = torch.randn(2, 128).chunk(2, -1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(rms_norm_quantize, (h, weight, EPS), test_utils=tests)
    torch.library.opcheck(rms_norm, (h, weight, EPS, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(residual_norm, (h, y, post, None, weight, EPS, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(residual_norm_, (h, y, post, None, weight, EPS, torch.bfloat16), test_utils=tests)
    torch.library.opcheck(gelu_mul, (gate, up), test_utils=tests)
    torch.library.opcheck(residual_norm_quantize, (h, y, post, None, weight, EPS), test_utils=tests)
    torch.library.opcheck(gelu_mul_quantize, (gate, up), test_utils=tests)


def test_refusals() -> None:
    h, y, post, weight = rows(2, 64)
    with pytest.raises(ValueError, match="multiple of 32"):
        rms_norm_quantize(torch.randn(2, 40), weight, EPS)
    with pytest.raises(ValueError, match="planes"):
        rms_norm_quantize(h, weight, EPS, 3)
    with pytest.raises(ValueError, match="a weight must be"):
        rms_norm_quantize(h, weight.double(), EPS)
    with pytest.raises(ValueError, match="y must be"):
        residual_norm_quantize(h, y[:1], post, None, weight, EPS)
    with pytest.raises(ValueError, match="row stride"):
        gelu_mul_quantize(torch.randn(2, 64), torch.randn(2, 128)[:, :64])


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiles_without_spilling(capability: int) -> None:
    h, y, post, weight = (t.to("meta") for t in rows(1, 5376))
    gate, up = torch.empty(1, 43008, dtype=torch.bfloat16, device="meta").chunk(2, -1)
    compiled = []
    for out in (empty_activations(h, 2), (h.bfloat16(),)):
        arguments = (h, y, post, post[:1], weight, EPS, out)
        compiled += compile_launches(fused_norm, capability, "launch_fused_norm", *arguments)
    for out in (empty_activations(gate, 2), (gate.contiguous(),)):
        compiled += compile_launches(gelu_mul_module, capability, "launch_gelu_mul", gate, up, out)
    assert all(kernel.metadata.shared <= 32 << 10 for kernel in compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9, 2048])
@pytest.mark.parametrize("k", [32, 96, 256, 1152, 5376])
def test_in_place_on_a_gpu(m: int, k: int) -> None:
    h, y, post, weight = rows(m, k, "cuda")
    scale = torch.tensor([0.4], device="cuda")
    expected, _ = residual_norm(h, y, post, scale, weight, EPS, torch.bfloat16)
    for _ in range(3):
        own = h.clone()
        x = residual_norm_(own, y, post, scale, weight, EPS, torch.float32)
        assert relative_error(own, expected) < 1e-6
        assert relative_error(x, rms_norm_reference(expected, weight, EPS)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("k", [96, 5376, 21504])
def test_gpu(m: int, k: int) -> None:
    h, y, post, weight = rows(m, k, "cuda")
    scale = torch.tensor([0.4], device="cuda")
    with poisoned_outputs():
        out, xq, xs, _ = residual_norm_quantize(h, y.bfloat16(), post, scale, weight, EPS)
        h_dense, x_dense = residual_norm(h, y.bfloat16(), post, scale, weight, EPS, torch.float32)
        gxq, gxs, _ = gelu_mul_quantize(h.bfloat16(), y.bfloat16())
        product = gelu_mul(h, y)
    expected = close_branch_reference(h, y.bfloat16(), post, scale, EPS)
    assert torch.equal(h_dense, out)
    assert relative_error(x_dense, rms_norm_reference(expected, weight, EPS)) < 1e-6
    assert relative_error(out, expected) < 1e-6
    assert relative_error(dequantize_activations(xq, xs), rms_norm_reference(expected, weight, EPS)) < 1e-4
    assert relative_error(product, gelu_mul_reference(h, y)) < 1e-6
    exact = gelu_mul_reference(h.bfloat16().float(), y.bfloat16().float())
    assert relative_error(dequantize_activations(gxq, gxs), exact) < 1e-4
