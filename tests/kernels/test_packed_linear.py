from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma4.kernels import activations as activations_module
from gemma4.kernels import dequantize_planes as dequantize_module
from gemma4.kernels import linear as linear_module
from gemma4.kernels.activations import dequantize_activations, quantize_activations
from gemma4.kernels.dequantize_planes import dequantize_planes, packed_embedding
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.packed_cases import NAMES, assert_product, make_rows, make_weight, meta
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

N, K = 70, 768


def linear(name: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.gemma4, f"{name}_linear")
    return op


class Projection(torch.nn.Module):
    def __init__(self, name: str, planes: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.op = linear(name)
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.planes)


def test_interpreted() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_packed_dequantize.py"))


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpu(name: str, shape: tuple[int, ...]) -> None:
    weight = make_weight(name, N, K)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        x = make_rows(6, K, dtype).flatten()[: torch.Size(shape).numel()].view(shape)
        y = linear(name)(x, *weight.planes)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], N)
        assert_product(y, x, weight.exact, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(name, 300, K)
    x = make_rows(3, K, torch.float32)
    whole = linear(name)(x, *weight.planes)
    monkeypatch.setattr(linear_module, "SCRATCH_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    assert relative_error(linear(name)(x, *weight.planes), whole) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    weight = make_weight(name, N, K)
    torch.library.opcheck(linear(name).default, (make_rows(2, K, torch.float32), *weight.planes))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_export_keeps_the_op_for_any_number_of_rows(name: str) -> None:
    weight = make_weight(name, N, K)
    x = make_rows(5, K, torch.float32)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Projection(name, weight.planes), (x,), dynamic_shapes={"x": {0: rows}})
    assert f"gemma4.{name}_linear.default" in str(program.graph)
    more = make_rows(40, K, torch.float32)
    assert torch.equal(program.module()(more), linear(name)(more, *weight.planes))


def test_compiles_with_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "SCRATCH_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    model = Projection("q4_k", make_weight("q4_k", 300, K).planes)
    x = make_rows(3, K, torch.float32)
    assert relative_error(torch.compile(model, backend="aot_eager")(x), model(x)) < 1e-6


def test_refusals() -> None:
    planes = make_weight("q4_k", N, K).planes
    x = make_rows(2, K, torch.float32)
    for message, bad in (
        ("x must be bfloat16 or float32", x.half()),
        (r"x must be \[..., 768\]", x[:, :256]),
        (r"x must be \[..., 768\]", torch.tensor(1.0)),
        ("x is on meta", x.to("meta")),
    ):
        with pytest.raises(ValueError, match=message):
            linear("q4_k")(bad, *planes)
    with pytest.raises(ValueError, match="planes must be 1 or 2"):
        quantize_activations(x, 3)
    for message, bad in (
        ("K a multiple of 32", x[:, :40]),
        ("K a multiple of 32", x[0]),
        ("must be bfloat16 or", x.half()),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_activations(bad)


@pytest.mark.parametrize(("planes", "bound"), [(1, 2e-2), (2, 6e-5)])
def test_quantized_activations_on_the_cpu(planes: int, bound: float) -> None:
    x = make_rows(2, 736, torch.bfloat16)
    xq, xs, xsum = quantize_activations(x, planes)
    assert relative_error(dequantize_activations(xq, xs), x.double()) < bound
    assert relative_error(xsum, dequantize_activations(xq, xs).unflatten(1, (-1, 16)).double().sum(-1)) < 1e-6
    torch.library.opcheck(torch.ops.gemma4.quantize_activations.default, (x, planes))


def test_embedding() -> None:
    weight = make_weight("q6_k", N, K)
    planes, exact = weight.planes, weight.exact
    ids = torch.tensor([3, 69, 3])
    assert torch.equal(packed_embedding(ids, planes, "q6_k").double(), exact[ids])
    torch.library.opcheck(torch.ops.gemma4.packed_embedding.default, (ids, list(planes), "q6_k"))
    with pytest.raises(ValueError, match=r"ids must be int64 \[T\] on cpu, got torch.int32 \[3\]"):
        packed_embedding(ids.int(), planes, "q6_k")


# Kernels from here on


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_compile(capability: int) -> None:
    x = make_rows(2, K, torch.bfloat16).to("meta")
    launches = compile_launches(activations_module, capability, "launch_quantize_activations", x, 2)
    for name in ("q4_k", "q6_k"):
        arguments = (name, meta(make_weight(name, N, K).planes), torch.bfloat16)
        for ids in (None, torch.empty(3, dtype=torch.int64, device="meta")):
            launches += compile_launches(dequantize_module, capability, "launch_dequantize_planes", *arguments, ids)
    assert all(compiled.metadata.shared < SHARED_LIMITS[120] for compiled in launches)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_decode_is_exact(name: str) -> None:
    weight = make_weight(name, 33, 2048, "cuda")
    with poisoned_outputs():
        assert torch.equal(dequantize_planes(name, weight.planes, torch.float32).double(), weight.exact)
        assert torch.equal(dequantize_planes(name, weight.planes, torch.bfloat16), weight.exact.float().bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_embedded_rows_are_exact(name: str) -> None:
    weight = make_weight(name, 33, 2048, "cuda")
    for ids in ([32], [5, 0, 32, 5], list(range(33)) * 70):
        chosen = torch.tensor(ids, device="cuda")
        with poisoned_outputs():
            out = packed_embedding(chosen, weight.planes, name)
        assert torch.equal(out.double(), weight.exact[chosen])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 8, 9, 100])
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(name, 300, K, "cuda")
    decoded = weight.exact.float().bfloat16().double() if m > 8 else weight.exact
    for scratch in (1 << 24, 1 << 16):
        monkeypatch.setattr(linear_module, "SCRATCH_BYTES", {"cuda": scratch})
        for dtype, exact, tolerance in (
            (torch.float32, weight.exact, 1e-6),
            (torch.bfloat16, decoded, 2**-8 + 1e-4),
        ):
            x = make_rows(m, K, dtype, "cuda")
            with poisoned_outputs():
                y = linear(name)(x, *weight.planes)
            assert_product(y, x, exact, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_gpu_compiled_is_eager(name: str) -> None:
    model = Projection(name, make_weight(name, N, K, "cuda").planes)
    for m in (1, 100):
        x = make_rows(m, K, torch.bfloat16, "cuda")
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 2**-7


@pytest.mark.gpu
def test_gpu_quantized_activations_are_the_reference() -> None:
    x = make_rows(3, 736, torch.bfloat16)
    for gpu, cpu in zip(quantize_activations(x.cuda()), quantize_activations(x), strict=True):
        assert relative_error(gpu.cpu().double(), cpu.double()) < 1e-3
