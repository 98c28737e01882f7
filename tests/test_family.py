"""Whole files in the shape of E2B, E4B and 26B-A4B: plans of full-size headers, and small quantized ones that run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4
from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.quant.errors import MissingTensorError, UnexpectedTensorError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from tests.family_gguf import with_experts, with_per_layer_inputs
from tests.tiny_gguf import GEMMA4_26B, GEMMA4_E2B, GEMMA4_E4B, Model, Sizes, Tensor

SMALL = Sizes(4, 256, 512, 8, (2, 2), (32, 64), vocab=320, window=16, context=512, period=2, k_eq_v=False)

Plan = Callable[[Model], LoadPlan]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    def make(model: Model) -> LoadPlan:
        with GGUFFile.open(model.write_sparse(tmp_path / "model.gguf")) as file:
            return plan_load(file, Gemma4Config.from_gguf(file))

    return make


@pytest.mark.parametrize("keeps_unused", [False, True])
@pytest.mark.parametrize(("sizes", "shared"), [(GEMMA4_E2B, 20), (GEMMA4_E4B, 18)], ids=["E2B", "E4B"])
def test_plan_of_the_small_sizes(plan: Plan, sizes: Sizes, shared: int, keeps_unused: bool) -> None:
    made = plan(with_per_layer_inputs(sizes, shared, 256, keeps_unused=keeps_unused))
    targets = made.by_target()
    assert targets["embed_tokens_per_layer.weight"].shape == (sizes.vocab, 256 * sizes.layers)
    last = sizes.layers - 1
    assert not any(f"layers.{last}.self_attn.{name}.weight" in made for name in ("k_proj", "v_proj", "k_norm"))
    assert f"layers.{last}.self_attn.q_proj.weight" in made
    assert str(made.fusions[0]) == f"fused gate+up on {sizes.layers} of {sizes.layers} MLP layers (0 left)"


@pytest.mark.parametrize("joined", [False, True])
def test_plan_of_a_mixture_of_experts(plan: Plan, joined: bool) -> None:
    targets = plan(with_experts(GEMMA4_26B, 128, 8, 704, joined=joined)).by_target()
    name, rows = ("gate_up_proj", 1408) if joined else ("up_proj", 704)
    assert targets[f"layers.29.experts.{name}.weight"].shape == (128 * rows, 2816)
    assert targets["layers.29.experts.down_proj.weight"].shape == (128 * 2816, 704)


def test_missing_and_unexpected(plan: Plan) -> None:
    model = with_per_layer_inputs(SMALL, 2, 256, keeps_unused=False)
    del model.tensors["blk.1.proj.weight"]
    with pytest.raises(MissingTensorError, match=r"blk\.1\.proj\.weight"):
        plan(model)
    model = with_experts(SMALL, 4, 2, 64, joined=True)
    model.tensors["blk.0.ffn_up_exps.weight"] = Tensor((4, 64, SMALL.hidden), "Q4_K")
    with pytest.raises(UnexpectedTensorError, match="ffn_up_exps"):
        plan(model)


MODELS = {
    "per-layer inputs": with_per_layer_inputs(SMALL, 2, 256, keeps_unused=False),
    "joined experts": with_experts(SMALL, 8, 2, 256, joined=True),
    "experts": with_experts(SMALL, 8, 2, 256, joined=False),
}
any_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def prompt(length: int) -> list[int]:
    ids: list[int] = torch.randint(0, SMALL.vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


@any_model
def test_packed_equals_dense(model: Model, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model.gguf")
    ids = prompt(40)
    packed = Gemma4.from_gguf(path, device="cpu")
    dense = Gemma4.from_gguf(path, device="cpu", dequantize=True)
    torch.testing.assert_close(packed.logits(ids), dense.logits(ids), rtol=1e-4, atol=1e-4)
    assert packed.generate_ids(ids, 4) == dense.generate_ids(ids, 4)
    packed.save_packed(tmp_path / "saved.safetensors")
    again = Gemma4.from_packed(tmp_path / "saved.safetensors", device="cpu")
    assert torch.equal(again.logits(ids), packed.logits(ids))


@any_model
def test_decoding_on_quantized_rows(model: Model, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model.gguf")
    exact = Gemma4.from_gguf(path, device="cpu")
    quantized = Gemma4.from_gguf(path, device="cpu")
    quantized.model.max_packed_rows = 8
    for length in (1, 5):
        torch.testing.assert_close(quantized.logits(prompt(length)), exact.logits(prompt(length)), rtol=0, atol=5e-3)


def divergence(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """Mean over positions of the KL divergence of logits [T, V] from exact ones."""
    exact, rounded = exact.cpu().log_softmax(-1), rounded.cpu().log_softmax(-1)
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


@pytest.mark.gpu
@any_model
def test_on_a_gpu(model: Model, tmp_path: Path) -> None:
    path = model.write(tmp_path / "model.gguf")
    ids = prompt(60)
    exact = Gemma4.from_gguf(path, device="cpu").logits(ids)
    torch.testing.assert_close(
        Gemma4.from_gguf(path, device="cuda", dtype=torch.float32).logits(ids).cpu(), exact, rtol=0, atol=1e-3
    )
    half = Gemma4.from_gguf(path, device="cuda")
    # bfloat16 alone sends some tokens to other experts, on any device.
    half_on_cpu = divergence(exact, Gemma4.from_gguf(path, device="cpu", dtype=torch.bfloat16).logits(ids))
    assert divergence(exact, half.logits(ids)) < 1.5 * half_on_cpu + 1e-3
    assert len(half.generate_ids(ids, 8)) == 8
