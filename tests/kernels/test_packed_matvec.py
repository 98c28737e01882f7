from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from gemma4.kernels import linear, packed_matvec
from gemma4.kernels.activations import dequantize_activations, quantize_activations
from gemma4.kernels.packed_matvec import MMA_ROWS, launch_packed_matvec
from gemma4.kernels.packed_planes import PACKED_FORMATS
from tests.kernels.attention_cases import poisoned_outputs
from tests.kernels.packed_cases import NAMES, Weight, assert_product, make_rows, make_weight, meta
from tests.kernels.triton_without_gpu import SHARED_LIMITS, compile_launches, run_interpreted

K = 768
# Every projection of Gemma 4 31B: q, k, v, o, gate|up and down; sliding and full layers.
REAL_SHAPES = [(8192, 5376), (4096, 5376), (2048, 5376), (16384, 5376), (5376, 8192), (5376, 16384), (43008, 5376)]
REAL_SHAPES += [(5376, 21504)]


def matvec(name: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.gemma4, f"{name}_matvec")
    return op


def inputs(name: str, m: int = 2, device: str = "cpu") -> tuple[Weight, tuple[Tensor, ...]]:
    return make_weight(name, 33, K, device), quantize_activations(make_rows(m, K, torch.bfloat16, device))


def test_interpreted() -> None:
    assert " passed" in run_interpreted(Path(__file__).with_name("interpreted_packed_matvec.py"))


@pytest.mark.parametrize("name", NAMES)
def test_cpu(name: str) -> None:
    weight, activations = inputs(name)
    y = matvec(name)(*activations, *weight.planes, out_dtype=torch.float32)
    assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    weight, activations = inputs(name)
    torch.library.opcheck(matvec(name).default, (*activations, *weight.planes))  # type: ignore[attr-defined]


def test_export_keeps_the_op() -> None:
    weight, activations = inputs("q4_k")

    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return matvec("q4_k")(*tensors)

    program = torch.export.export(Model(), (*activations, *weight.planes))
    assert "gemma4.q4_k_matvec.default" in str(program.graph)
    assert torch.equal(program.module()(*activations, *weight.planes), matvec("q4_k")(*activations, *weight.planes))


def test_refusals() -> None:
    weight, (xq, xs, xsum) = inputs("q4_k")
    qs, codes, dm = weight.planes
    nine = quantize_activations(make_rows(9, K, torch.bfloat16))
    bad: list[tuple[str, tuple[object, ...]]] = [
        ("qs must be \\[N, K/...\\]", (xq, xs, xsum, qs[0], codes, dm)),
        ("K must be a positive multiple of 256", (xq, xs, xsum, qs[:, :64], codes, dm)),
        ("codes must have shape", (xq, xs, xsum, qs, codes[:-1], dm)),
        ("dm must be torch.float16", (xq, xs, xsum, qs, codes, dm.float())),
        ("qs must be contiguous", (xq, xs, xsum, qs.T.contiguous().T, codes, dm)),
        ("codes is on meta", (xq, xs, xsum, qs, codes.to("meta"), dm)),
        ("xq must be int8", (xq[..., :-1], xs, xsum, qs, codes, dm)),
        ("xq must be int8", (xq.int(), xs, xsum, qs, codes, dm)),
        ("M must be 1 to 8", (*nine, qs, codes, dm)),
        ("xq must be int8 .* for M = 1", (xq, xs[:1], xsum, qs, codes, dm)),
        ("xs must be float32", (xq, xs.double(), xsum, qs, codes, dm)),
        ("xsum must be float32", (xq, xs, xsum.double(), qs, codes, dm)),
        ("xs must be contiguous", (xq, xs.T.contiguous().T, xsum, qs, codes, dm)),
        ("xsum is on meta", (xq, xs, xsum.to("meta"), qs, codes, dm)),
        ("xq is on meta", (*meta((xq, xs, xsum)), qs, codes, dm)),
        ("out_dtype must be", (xq, xs, xsum, qs, codes, dm, torch.float64)),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            matvec("q4_k")(*arguments)


# Kernels from here on


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(("name", "k", "m"), [("q4_k", 5376, 1), ("q6_k", 21504, 1), ("q5_0", 704, 3)])
def test_compiles(name: str, k: int, m: int, capability: int) -> None:
    weight, activations = make_weight(name, 2, k), quantize_activations(make_rows(m, k, torch.bfloat16))
    kernel = getattr(linear, f"{name}_matvec_kernel")
    arguments = (kernel, name, meta(activations), meta(weight.planes), torch.bfloat16)
    (compiled,) = compile_launches(packed_matvec, capability, "launch_packed_matvec", *arguments)
    assert compiled.metadata.shared < SHARED_LIMITS[120]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_passes_through_shared_memory_before_the_reduction(name: str) -> None:
    weight, activations = make_weight(name, 2, K), quantize_activations(make_rows(2, K, torch.bfloat16))
    kernel = getattr(linear, f"{name}_matvec_kernel")
    arguments = (kernel, name, meta(activations), meta(weight.planes), torch.bfloat16)
    (compiled,) = compile_launches(packed_matvec, 90, "launch_packed_matvec", *arguments)
    assert compiled.metadata.num_warps == 4
    assert compiled.metadata.shared <= 4 * 512  # bytes: the sums of a few rows of each warp on their way to the store
    assert compiled.asm["ptx"].count(".v4.b32") >= 2 * 2 + 2  # weights and activations, 16 bytes a load


@pytest.mark.parametrize("name", NAMES)
def test_tensor_cores_take_many_rows(name: str) -> None:
    planes = meta(make_weight(name, 2, K).planes)
    kernel = getattr(linear, f"{name}_matvec_kernel")
    for m in range(1, 9):
        activations = meta(quantize_activations(make_rows(m, K, torch.bfloat16)))
        with (
            mock.patch.object(packed_matvec, "launch_packed_mma") as tensor_cores,
            mock.patch.object(packed_matvec, "wrap_triton") as own,
        ):
            launch_packed_matvec(kernel, name, activations, planes, torch.bfloat16)
        assert (tensor_cores.called, own.called) == (m >= MMA_ROWS, m < MMA_ROWS)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "planes"), [(1, 2), (2, 1), (3, 2), (5, 2), (8, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name: str, m: int, planes: int) -> None:
    for n, k in ((1, K), (33, 2048), (31, 21504), (70, 704 if PACKED_FORMATS[name].block == 32 else 256)):
        weight = make_weight(name, n, k, "cuda")
        activations = quantize_activations(make_rows(m, k, torch.bfloat16, "cuda"), planes)
        with poisoned_outputs():
            y = matvec(name)(*activations, *weight.planes, out_dtype=torch.float32)
        assert_product(y, dequantize_activations(*activations[:2]), weight.exact, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_repeats_bit_for_bit(name: str) -> None:
    weight = make_weight(name, 513, 5376, "cuda")
    activations = quantize_activations(make_rows(2, 5376, torch.bfloat16, "cuda"))
    first = matvec(name)(*activations, *weight.planes, out_dtype=torch.float32)
    for _ in range(250):
        assert torch.equal(matvec(name)(*activations, *weight.planes, out_dtype=torch.float32), first)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [5376, 21504])
@pytest.mark.parametrize("name", NAMES)
def test_gpu_rows_do_not_depend_on_each_other(name: str, k: int) -> None:
    weight = make_weight(name, 200, k, "cuda")
    activations = quantize_activations(make_rows(1, k, torch.bfloat16, "cuda"))
    fused = matvec(name)(*activations, *weight.planes, out_dtype=torch.float32)
    for start, stop in ((0, 1), (1, 64), (64, 167), (167, 200)):
        part = matvec(name)(*activations, *weight.rows(start, stop), out_dtype=torch.float32)
        assert torch.equal(part, fused[:, start:stop])
    kernel = getattr(linear, f"{name}_matvec_kernel")
    for rows in (1, 2, 4):
        y = launch_packed_matvec(kernel, name, activations, weight.planes, torch.float32, R=rows)
        assert torch.equal(y, fused)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
@pytest.mark.parametrize(("n", "k"), REAL_SHAPES, ids=str)
def test_gpu_real_shapes(name: str, n: int, k: int) -> None:
    weight = make_weight(name, n, k)
    planes = tuple(plane.cuda() for plane in weight.planes)
    x = make_rows(1, k, torch.bfloat16, "cuda")
    with poisoned_outputs():
        y = matvec(name)(*quantize_activations(x), *planes, out_dtype=torch.float32)
    assert_product(y, x, weight.exact.cuda(), 1e-4)
