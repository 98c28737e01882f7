"""Gate and up projections as one matrix: the same numbers, and left alone where they cannot be joined."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma4 import Gemma4
from gemma4.model import MLP, DecoderLayer, Stream
from gemma4.quant.gguf_file import GGUFFile
from gemma4.rows import DenseRows, PackedRows, RowMaker
from tests.kernels.triton_without_gpu import run_interpreted
from tests.tiny_gguf import Model, gemma4

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, FFN, LAYERS = 512, 1536, 4
TOKENS = [1, 4, 33]


@pytest.fixture(scope="module")
def q4_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All matrices Q4_K."""
    return sized({"matrix": "Q4_K"}).write(tmp_path_factory.mktemp("q4_k") / "q4_k.gguf")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer each of Q6_K pairs, of both mixed pairs, and of Q4_K pairs."""
    types = {"matrix": "Q4_K"}
    for layer, (gate, up) in enumerate([("Q6_K", "Q6_K"), ("Q4_K", "Q6_K"), ("Q6_K", "Q4_K"), ("Q4_K", "Q4_K")]):
        types |= {f"blk.{layer}.ffn_gate": gate, f"blk.{layer}.ffn_up": up}
    return sized(types).write(tmp_path_factory.mktemp("mixed") / "mixed.gguf")


def sized(types: dict[str, str]) -> Model:
    return gemma4(types=types, layers=LAYERS, hidden=HIDDEN, ffn=FFN)


def both(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Gemma4, Gemma4]:
    """The model fused and not."""
    fused, plain = (Gemma4.from_gguf(path, device=device, dtype=dtype, fuse=fuse) for fuse in (True, False))
    return fused, plain


def mlp_of(model: Gemma4, layer: int) -> MLP:
    decoder = model.model.layers[layer]
    assert isinstance(decoder, DecoderLayer)
    return decoder.mlp


def rows(tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, HIDDEN] like the output of a norm."""
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)


@torch.inference_mode()
def run(model: Gemma4, layer: int, x: Tensor, make: RowMaker | None = None) -> Tensor:
    make = make or DenseRows(x.dtype)
    return mlp_of(model, layer)(Stream(x, make.plain(x)), make)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest of b."""
    return float((a - b).abs().max() / b.abs().max())


def dense_mlp(path: Path, layer: int, x: Tensor) -> Tensor:
    """The MLP in float64 with the weights of the file as gguf-py decodes them."""
    weights = []
    with GGUFFile.open(path) as file:
        for role in ("gate", "up", "down"):
            tensor = file.tensors[f"blk.{layer}.ffn_{role}.weight"]
            blocks = np.frombuffer(file.data(tensor.name), np.uint8).reshape(tensor.shape[0], -1)
            weights.append(torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType(tensor.type))).double())
    gate, up, down = weights
    x = x.double()
    return (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T


@pytest.mark.parametrize("tokens", TOKENS)
def test_fused_equals_unfused(q4_k: Path, tokens: int) -> None:
    fused, plain = both(q4_k)
    x = rows(tokens)
    for layer in range(LAYERS):
        assert mlp_of(fused, layer).is_fused
        assert not mlp_of(plain, layer).is_fused
        expected = run(plain, layer, x)
        assert expected.shape == (tokens, HIDDEN)
        assert expected.abs().max() > 0.01
        assert largest_difference(run(fused, layer, x), expected) < 1e-6


@pytest.mark.parametrize("tokens", [1, 4])
def test_fused_equals_unfused_on_quantized_rows(q4_k: Path, tokens: int) -> None:
    fused, plain = both(q4_k)
    expected = run(plain, 0, rows(tokens), PackedRows())
    assert torch.equal(run(fused, 0, rows(tokens), PackedRows()), expected)
    assert largest_difference(expected, run(plain, 0, rows(tokens))) < 1e-4


def test_fused_equals_unfused_in_the_matvec_kernel() -> None:
    assert "2 passed" in run_interpreted(Path(__file__).with_name("interpreted_mlp_fusion.py"))


@pytest.mark.parametrize("tokens", TOKENS)
def test_fused_equals_exact_weights(q4_k: Path, tokens: int) -> None:
    fused, _ = both(q4_k)
    x = rows(tokens)
    for layer in range(LAYERS):
        expected = dense_mlp(q4_k, layer, x)
        assert largest_difference(run(fused, layer, x), expected) < 1e-5


def test_gate_comes_before_up(q4_k: Path) -> None:
    fused, plain = both(q4_k)
    joined = mlp_of(fused, 0).gate_up_proj.weight.tensor.dequantize()
    for part, name in ((joined[:FFN], "gate_proj"), (joined[FFN:], "up_proj")):
        assert torch.equal(part, mlp_of(plain, 0).get_submodule(name).weight.tensor.dequantize())
    assert joined.shape == (2 * FFN, HIDDEN)


@pytest.mark.parametrize("tokens", TOKENS)
def test_other_pairs_are_left_alone_and_right(mixed: Path, tokens: int) -> None:
    model = Gemma4.from_gguf(mixed, device="cpu")
    assert [mlp_of(model, layer).is_fused for layer in range(LAYERS)] == [False, False, False, True]
    x = rows(tokens)
    for layer in range(LAYERS):
        assert largest_difference(run(model, layer, x), dense_mlp(mixed, layer, x)) < 1e-5, layer


def test_the_log_counts_fused_layers(q4_k: Path, mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gemma4")
    Gemma4.from_gguf(mixed, device="cpu")
    left = "1 Q6_K+Q6_K, 1 Q4_K+Q6_K, 1 Q6_K+Q4_K"
    assert f"fused gate+up on 1 of 4 MLP layers (3 left: {left})" in caplog.messages
    caplog.clear()
    Gemma4.from_gguf(q4_k, device="cpu")
    assert "fused gate+up on 4 of 4 MLP layers (0 left)" in caplog.messages
    caplog.clear()
    Gemma4.from_gguf(q4_k, device="cpu", fuse=False)
    assert "fused gate+up on 0 of 4 MLP layers (4 left: 4 because fusing is off)" in caplog.messages


def test_whole_models_agree(q4_k: Path) -> None:
    fused, plain = both(q4_k)
    ids = list(range(5, 45))
    assert largest_difference(fused.logits(ids), plain.logits(ids)) < 1e-6
    assert fused.generate_ids(ids, 8) == plain.generate_ids(ids, 8)


@pytest.mark.gpu
def test_fused_equals_unfused_on_a_gpu(q4_k: Path) -> None:
    fused, plain = both(q4_k, "cuda", torch.bfloat16)
    for layer in range(LAYERS):
        for tokens in (1, 4):
            x = rows(tokens, "cuda", torch.bfloat16)
            assert torch.equal(run(fused, layer, x, PackedRows()), run(plain, layer, x, PackedRows()))
            assert torch.equal(run(fused, layer, x), run(plain, layer, x))
        x = rows(33, "cuda", torch.bfloat16)
        assert largest_difference(run(fused, layer, x).float(), run(plain, layer, x).float()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_gpu_agrees_with_exact_weights(q4_k: Path, tokens: int) -> None:
    model, _ = both(q4_k, "cuda", torch.bfloat16)
    x = rows(tokens, "cuda", torch.bfloat16)
    expected = dense_mlp(q4_k, 0, x.float().cpu())
    make = PackedRows() if tokens <= 8 else None
    assert largest_difference(run(model, 0, x, make).float().cpu(), expected) < 2e-2
