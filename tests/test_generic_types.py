"""Types without a kernel: a model of all of them runs, is described as such, and needs gguf-py only where it must."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from gemma4 import Gemma4
from gemma4.cli import app
from gemma4.inspect_file import inspect_file
from gemma4.quant import codebooks
from gemma4.quant.formats import IQ2STensor, IQ4XSTensor, container_for
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.linear import decoded_linear
from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.plan import KERNEL_TYPES, LOADABLE_TYPES
from tests import q8_k_blocks
from tests.tiny_gguf import Model, Sizes, gemma4

GENERIC = sorted(LOADABLE_TYPES - KERNEL_TYPES)
SIZES = Sizes(4, 256, 512, 4, (2, 1), (64, 128), vocab=320, window=16, context=512, period=2)
TYPES = {
    "matrix": "IQ4_XS",
    "token_embd": "Q3_K",
    "blk.0.attn_q": "Q2_K",
    "blk.0.attn_k": "IQ1_S",
    "blk.0.attn_v": "IQ1_M",
    "blk.0.ffn_gate": "MXFP4",
    "blk.0.ffn_up": "MXFP4",
    "blk.0.ffn_down": "IQ4_NL",
    "blk.1.attn_k": "IQ2_S",
    "blk.1.attn_output": "IQ3_XXS",
    "blk.1.ffn_gate": "IQ3_S",
    "blk.1.ffn_up": "TQ1_0",
    "blk.1.ffn_down": "TQ2_0",
    "blk.2.attn_k": "IQ2_XS",
    "blk.2.attn_v": "IQ2_XXS",
    "blk.3.attn_q": "Q8_K",
    "blk.3.ffn_up": "Q1_0",
    "blk.3.ffn_down": "NVFP4",
}
# Their encoders take many seconds to start. The byte of a block with the top of its float16 scale.
UNENCODED = {"IQ1_S": 1, "IQ2_S": 1, "IQ2_XS": 1, "IQ2_XXS": 1, "IQ1_M": 55}
IDS = [3, 1, 2, 319, 0, 17]


@dataclass
class AnyBits(Model):
    """Blocks of random bits where ggml's encoder is slow, with scales of at most 2^-7."""

    def exact(self, name: str) -> np.ndarray:
        """float32, what the blocks stand for."""
        tensor, blocks = self.tensors[name], self.encoded(name)
        if tensor.type == "Q8_K":
            return q8_k_blocks.decode(blocks)
        kind = gguf.GGMLQuantizationType[tensor.type]
        if tensor.type == "Q1_0":
            return libgguf.dequantize_rows(blocks, kind.value, n_per_row=tensor.shape[-1]).reshape(tensor.shape)
        return gguf.dequantize(blocks, kind).reshape(tensor.shape)

    def encoded(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.type == "Q8_K":
            return q8_k_blocks.encode(self.weights(name))
        if tensor.type not in UNENCODED:
            return super().encoded(name)
        _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.type]]
        blocks = np.random.default_rng(0).integers(0, 256, (tensor.nbytes // size, size), np.uint8)
        # The top of a float16: its sign, then exponents below 2^-7.
        blocks[:, UNENCODED[tensor.type]] &= 0x9F
        return blocks.reshape(tensor.shape[0], -1)


@pytest.fixture(scope="module")
def model() -> AnyBits:
    made = gemma4(SIZES, TYPES)
    return AnyBits(made.metadata, made.tensors, made.values)


@pytest.fixture(scope="module")
def path(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("generic") / "generic.gguf")


def test_logits_are_those_of_the_exact_weights(model: AnyBits, path: Path, tmp_path: Path) -> None:
    assert {GGMLType[tensor.type] for tensor in model.tensors.values()} == {*GENERIC, GGMLType.F32}
    exact = {name: model.exact(name) for name in model.tensors}
    reference = gemma4(SIZES)
    dense = Gemma4.from_gguf(
        Model(reference.metadata, reference.tensors, exact).write(tmp_path / "dense.gguf"), device="cpu"
    )
    packed = Gemma4.from_gguf(path, device="cpu")
    for name, weights in exact.items():
        if weights.ndim > 1:
            assert torch.equal(packed.weight(name).dequantize(), torch.from_numpy(weights)), name
    expected, found = dense.logits(IDS), packed.logits(IDS)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    packed.save_packed(tmp_path / "packed.safetensors")
    again = Gemma4.from_packed(tmp_path / "packed.safetensors", device="cpu")
    assert torch.equal(again.logits(IDS), found)


def test_inspect_names_the_types_without_a_kernel(path: Path, tmp_path: Path) -> None:
    report = inspect_file(path)
    assert report.plan is not None
    assert report.plan.decoded_types == tuple(GENERIC)
    assert report.to_json()["decoded_types"] == [kind.name for kind in GENERIC]
    printed = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    for kind in GENERIC:
        assert f"{kind.name}: no kernel of its own; rows are decoded, then multiplied\n" in printed
    with_kernels = gemma4(types={"matrix": "Q4_K", "ffn_down": "F16"}).write_sparse(tmp_path / "kernels.gguf")
    assert inspect_file(with_kernels).to_json()["decoded_types"] == []
    assert "no kernel" not in CliRunner().invoke(app, ["inspect", str(with_kernels)]).stdout


def test_a_product_is_computed_in_bounded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (50, 136), np.uint8)
    blocks[:, 1] = 0x20
    weight = IQ4XSTensor.from_blocks(torch.from_numpy(blocks), 256)
    expected = weight.dequantize()
    decoded_rows = []

    def decode(blocks: Tensor) -> Tensor:
        decoded_rows.append(len(blocks))
        return whole(blocks)

    whole = IQ4XSTensor.decode
    monkeypatch.setattr(IQ4XSTensor, "decode", staticmethod(decode))
    monkeypatch.setattr("gemma4.quant.linear._CHUNK_BYTES", 7 * 256 * 4)
    assert torch.equal(decoded_linear(torch.eye(256), weight).T, expected)
    assert decoded_rows == [7] * 7 + [1]


class Product(nn.Module):
    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return decoded_linear(x, self.weight.tensor)


def test_a_codebook_first_used_while_tracing_is_not_kept() -> None:
    codebooks._kept.cache_clear()
    blocks = torch.full((5, 82), 0x11, dtype=torch.uint8)
    packed = PackedWeight(GGMLType.IQ2_S, (5, 256))
    packed.assign(IQ2STensor.from_blocks(blocks, 256))
    x = torch.randn(3, 256)
    program = torch.export.export(Product(packed), (x,))
    with FakeTensorMode():
        IQ2STensor.empty(5, 256, "cpu").dequantize()
    assert codebooks._kept.cache_info().currsize == 0
    with torch.inference_mode():
        expected = decoded_linear(x, packed.tensor)
    assert codebooks._kept.cache_info().currsize == 1
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(decoded_linear(x, packed.tensor), expected)


def test_gguf_py_is_imported_for_codebooks_only() -> None:
    code = """
import sys, torch
from gemma4.quant.formats import GGMLType, container_for
for kind in ("Q1_0", "Q2_K", "Q3_K", "Q8_K", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "IQ4_XS"):
    packed = container_for(GGMLType[kind]).empty(2, 256, "cpu")
    assert "gguf" not in sys.modules, kind
    packed.dequantize()
assert "gguf" in sys.modules
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", GENERIC, ids=lambda kind: kind.name)
def test_a_weight_takes_no_more_than_its_file_bytes(kind: GGMLType, model: Model) -> None:
    tensor = next(tensor for tensor in model.tensors.values() if tensor.type == kind.name)
    assert container_for(kind).empty(*tensor.shape, "meta").nbytes == tensor.nbytes
