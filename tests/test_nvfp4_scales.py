"""NVFP4 files: the scale tensors beside the matrices multiply their products, input scales are left aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gemma4 import Gemma4
from gemma4.inspect_file import inspect_file
from gemma4.quant.errors import ShapeError, UnexpectedTensorError
from tests.family_gguf import with_experts, with_per_layer_inputs
from tests.tiny_gguf import Model, Sizes, Tensor, gemma4

K_EQ_V = Sizes(4, 128, 192, 4, (2, 1), (32, 64), vocab=64, window=16, context=512, period=2)
ALL_V = Sizes(4, 128, 192, 4, (2, 2), (32, 64), vocab=64, window=16, context=512, period=2, k_eq_v=False)
IDS = [3, 1, 2, 63, 0, 17, 40, 9]
KEPT = ("ffn_gate_inp.weight", "per_layer_model_proj.weight")
# In files with experts these two are the router's; a converter multiplies the down projections' scales into the latter.
ROUTER_SCALES = ("ffn_gate_inp.scale", "ffn_down_exps.scale")

# And how the scale of X.weight is called: X.scale or X.weight.scale.
MODELS: dict[str, tuple[Callable[[], Model], str]] = {
    "dense": (lambda: gemma4(K_EQ_V, tied=False), ""),
    "per-layer inputs": (lambda: with_per_layer_inputs(ALL_V, 2, 64, keeps_unused=True), ""),
    "experts": (lambda: with_experts(K_EQ_V, 4, 2, 64, joined=False), ""),
    "experts, other names": (lambda: with_experts(K_EQ_V, 4, 2, 64, joined=False), ".weight"),
    "joined experts": (lambda: with_experts(K_EQ_V, 4, 2, 64, joined=True), ""),
}


def nvfp4(model: Model, suffix: str = "") -> Model:
    """Every matrix but embeddings and router as NVFP4, with a scale and an input scale; suffix: of its name there."""
    rng = np.random.default_rng(1)
    for name, tensor in list(model.tensors.items()):
        if len(tensor.shape) == 1 or name.endswith(KEPT):
            continue
        model.retype(name, "Q8_0" if "token_embd" in name else "NVFP4")
        base = name.removesuffix(".weight") + suffix
        if "token_embd" not in name and f"{base}.scale" not in model.tensors:
            shape = tensor.shape[:-2] or (1,)
            model.tensors |= {f"{base}.{kind}": Tensor(shape, "F32") for kind in ("scale", "input_scale")}
            model.values[f"{base}.scale"] = rng.uniform(0.5, 2, shape).astype(np.float32)
    return model


def multiplied(model: Model) -> Model:
    """The same model in float32, each matrix times its scale, without the scale tensors."""
    made = Model(model.metadata, {}, {})
    for name, tensor in model.tensors.items():
        if name.endswith("scale") and not name.endswith(ROUTER_SCALES):
            continue
        exact = gguf.dequantize(model.encoded(name), gguf.GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
        for scale in (f"{name.removesuffix('.weight')}.scale", f"{name}.scale"):
            if scale in model.tensors and not scale.endswith(ROUTER_SCALES):
                exact = exact * model.weights(scale).reshape(-1, *[1] * (exact.ndim - 1))
        made.tensors[name], made.values[name] = Tensor(tensor.shape, "F32"), exact
    return made


@pytest.mark.parametrize(("make", "suffix"), MODELS.values(), ids=MODELS)
def test_products_are_multiplied_by_the_scales(make: Callable[[], Model], suffix: str, tmp_path: Path) -> None:
    model = nvfp4(make(), suffix)
    scaled = Gemma4.from_gguf(model.write(tmp_path / "nvfp4.gguf"), device="cpu")
    reference = Gemma4.from_gguf(multiplied(model).write(tmp_path / "float.gguf"), device="cpu")
    for length in (len(IDS), 1):
        found, expected = scaled.logits(IDS[:length]), reference.logits(IDS[:length])
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    name = "blk.0.ffn_up.weight"
    exact = gguf.dequantize(model.encoded(name), gguf.GGMLQuantizationType.NVFP4)
    assert np.array_equal(scaled.weight(name).dequantize().numpy(), exact)


def test_scales_go_along_with_saved_and_with_dense_weights(tmp_path: Path) -> None:
    path = nvfp4(with_experts(K_EQ_V, 4, 2, 64, joined=False)).write(tmp_path / "nvfp4.gguf")
    scaled = Gemma4.from_gguf(path, device="cpu")
    scaled.save_packed(tmp_path / "saved.safetensors")
    again = Gemma4.from_packed(tmp_path / "saved.safetensors", device="cpu")
    assert torch.equal(again.logits(IDS), scaled.logits(IDS))
    dense = Gemma4.from_gguf(path, device="cpu", dequantize=True)
    torch.testing.assert_close(dense.logits(IDS), scaled.logits(IDS), rtol=0, atol=1e-4)


def test_a_file_without_scales_needs_none(tmp_path: Path) -> None:
    model = gemma4(K_EQ_V, {"matrix": "NVFP4", "token_embd": "Q8_0"})
    packed = Gemma4.from_gguf(model.write(tmp_path / "nvfp4.gguf"), device="cpu")
    reference = Gemma4.from_gguf(multiplied(model).write(tmp_path / "float.gguf"), device="cpu")
    torch.testing.assert_close(packed.logits(IDS), reference.logits(IDS), rtol=0, atol=1e-4)


def test_input_scales_are_named_as_not_loaded(tmp_path: Path) -> None:
    report = inspect_file(nvfp4(gemma4(K_EQ_V)).write_sparse(tmp_path / "nvfp4.gguf"))
    assert report.plan is not None
    what = "input scales, for products with 4-bit activations"
    assert report.to_json()["not_loaded"] == {what: 26}
    assert f"not loaded: 26 tensors of {what}\n" in report.plan.describe()
    assert "layers.3.mlp.down_proj.scale" in report.plan


def test_scales_where_none_belongs(tmp_path: Path) -> None:
    def refusal(edit: Callable[[Model], None]) -> str:
        model = nvfp4(gemma4(K_EQ_V))
        edit(model)
        report = inspect_file(model.write_sparse(tmp_path / "bad.gguf"))
        assert isinstance(report.unsupported, UnexpectedTensorError | ShapeError)
        return str(report.unsupported)

    def twice(model: Model) -> None:
        model.tensors["blk.0.attn_q.weight.scale"] = Tensor((1,), "F32")

    assert "blk.0.attn_q.scale" in refusal(lambda model: model.retype("blk.0.attn_q.weight", "Q8_0"))
    assert "[2]" in refusal(lambda model: model.reshape("blk.0.attn_q.scale", 2))
    assert "several transforms fill layers.0.self_attn.q_proj.scale" in refusal(twice)
    assert "token_embd.scale" in refusal(lambda model: model.tensors.update({"token_embd.scale": Tensor((1,), "F32")}))
