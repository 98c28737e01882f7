from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4.kernels import gated_linear as module
from gemma4.kernels.gated_linear import gated_linear
from gemma4.kernels.pieces import piece_rows
from tests.kernels.attention_cases import poisoned_outputs, relative_error
from tests.kernels.packed_cases import NAMES, Weight, make_rows, make_weight

N, K = 320, 768  # of gate, and of up


class GatedProduct(torch.nn.Module):
    def __init__(self, planes: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = gated_linear(x, self.planes, "q4_k")
        return y


@pytest.fixture(params=[1, 3], ids="{} pieces".format)
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    scratch = {1: 1 << 30, 3: 2 * 128 * K * 4}[request.param]
    monkeypatch.setattr(module, "SCRATCH_BYTES", {"cpu": scratch, "cuda": scratch // 2})
    return int(request.param)


def exact(x: Tensor, weight: Weight) -> Tensor:
    gate, up = (x.double() @ weight.exact.to(x.device).T).chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def test_sizes_of_pieces() -> None:
    assert piece_rows(300, 100, 30000) == 300
    assert piece_rows(300, 100, 29999) == 256
    assert piece_rows(21504, 2 * 2 * 5376, 85 << 20) == 3584
    assert piece_rows(5376, 2 * 21504, 85 << 20) == 1792
    assert piece_rows(1000, 1 << 20, 1) == 128


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", NAMES)
def test_cpu(name: str) -> None:
    weight = make_weight(name, 2 * N, K)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = 0.1 * make_rows(11, K, dtype)
        y = gated_linear(x, weight.planes, name)
        assert y.dtype == dtype
        assert relative_error(y, exact(x, weight)) < tolerance


@pytest.mark.usefixtures("pieces")
def test_compiled_it_has_the_same_bits() -> None:
    product = GatedProduct(make_weight("q4_k", 2 * N, K).planes)
    x = make_rows(11, K, torch.float32)
    assert torch.equal(torch.compile(product, backend="aot_eager")(x), product(x))


def test_opcheck() -> None:
    weight = make_weight("q4_k", 64, K)
    torch.library.opcheck(
        torch.ops.gemma4.gated_linear.default, (make_rows(9, K, torch.float32), weight.planes, "q4_k")
    )


def test_export_keeps_the_op_for_any_number_of_rows() -> None:
    product = GatedProduct(make_weight("q4_k", 2 * N, K).planes)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(product, (make_rows(5, K, torch.float32),), dynamic_shapes={"x": {0: rows}})
    assert "gemma4.gated_linear.default" in str(program.graph)
    more = make_rows(40, K, torch.float32)
    assert torch.equal(program.module()(more), product(more))


def test_refusals() -> None:
    planes = make_weight("q4_k", 64, K).planes
    x = make_rows(9, K, torch.float32)
    for message, bad in (
        ("x must be bfloat16 or float32", x.half()),
        (r"x must be bfloat16 or float32 \[M, 768\]", x[:, :256]),
        ("x is on meta", x.to("meta")),
    ):
        with pytest.raises(ValueError, match=message):
            gated_linear(bad, planes, "q4_k")
    with pytest.raises(ValueError, match="got 63 in all"):
        gated_linear(x, tuple(plane[:63] for plane in planes), "q4_k")
    with pytest.raises(ValueError, match="got 48 in all"):
        gated_linear(x.to("meta"), tuple(plane[:48].to("meta") for plane in planes), "q4_k")


@pytest.mark.gpu
@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name: str) -> None:
    weight = make_weight(name, 2 * N, K, "cuda")
    for tokens in (9, 200):
        x = 0.1 * make_rows(tokens, K, torch.bfloat16, "cuda")
        with poisoned_outputs():
            y = gated_linear(x, weight.planes, name)
        assert relative_error(y, exact(x, weight)) < 2e-2
