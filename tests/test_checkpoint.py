"""Saved models: what comes back is what was saved, damage is named, and a failed save changes nothing."""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma4 import Gemma4
from gemma4.quant.atomic_write import FileUnwritableError
from gemma4.quant.dense import BF16Tensor, F32Tensor
from gemma4.quant.errors import (
    FileMissingError,
    Gemma4Error,
    MetadataError,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
)
from gemma4.quant.formats import QuantTensor
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.packed_io import load_packed, save_packed
from tests.anonymous_memory import Meter
from tests.tiny_gguf import Model, gemma3, gemma4
from tests.tiny_vocabulary import vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [2, 270, 263, 281, 300]
TYPES = {
    "matrix": "Q4_K",
    "token_embd": "Q6_K",
    "attn_q": "Q5_K",
    "attn_k": "Q4_0",
    "attn_v": "Q8_0",
    "attn_output": "BF16",
    "ffn_down": "Q5_0",
    "blk.1.ffn_up": "Q5_1",
    "blk.2.ffn_gate": "Q4_1",
    "blk.3.ffn_gate": "F16",
}


def described(model: Model) -> Model:
    """With a vocabulary, and a value of every kind in the metadata."""
    model.metadata |= vocabulary(suppress_tokens=[5, 6], scores=[0.5 * i for i in range(320)])
    model.metadata |= {
        "general.sampling.temp": 0.5,
        "general.tags": ["text-generation", "日本", 'quote " backslash \\ line\n'],
        "general.flags": [True, False],
        "general.nan": math.nan,
        "general.big": 2**63,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Gemma4:
    path = described(gemma4(types=TYPES, tied=False)).write(tmp_path_factory.mktemp("gguf") / "model.gguf")
    return Gemma4.from_gguf(path, device="cpu")


@pytest.fixture
def saved(loaded: Gemma4, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    loaded.save_packed(path)
    return path


Edit = Callable[[dict[str, QuantTensor], dict[str, str]], object]


def edited(path: Path, edit: Edit) -> Path:
    """A saved model with its tensors and strings changed, checksum and all."""
    tensors, strings = load_packed(path)
    edit(tensors, strings)
    save_packed(path.with_name("edited.safetensors"), tensors, strings)
    return path.with_name("edited.safetensors")


def put(name: str, weight: QuantTensor, tensors: dict[str, QuantTensor], _: object) -> None:
    tensors[name] = weight


def refused(path: Path, error: type[Gemma4Error], field: str | None) -> str:
    with pytest.raises(error) as caught:
        Gemma4.from_packed(path, device="cpu")
    assert type(caught.value) is error
    assert caught.value.field == field
    assert caught.value.path == path
    return str(caught.value)


def assert_equal_models(a: Gemma4, b: Gemma4) -> None:
    left, right = dict(a.model.named_parameters()), dict(b.model.named_parameters())
    assert left.keys() == right.keys()
    for name, parameter in left.items():
        assert parameter.dtype == right[name].dtype, name
        assert torch.equal(parameter, right[name]), name
        assert not right[name].is_meta
        assert not right[name].requires_grad


# What comes back


def test_everything_comes_back(loaded: Gemma4, saved: Path) -> None:
    again = Gemma4.from_packed(saved, device="cpu")
    assert again.config == loaded.config
    assert again.plan == loaded.plan
    assert "layers.0.mlp.gate_up_proj.weight" in again.plan  # one weight of two tensors
    assert again.sampling == loaded.sampling
    assert again.sampling.temperature == 0.5
    assert_equal_models(loaded, again)
    assert torch.equal(again.logits(IDS), loaded.logits(IDS))
    name = "blk.0.ffn_up.weight"
    assert torch.equal(again.weight(name).to_blocks(), loaded.weight(name).to_blocks())


def test_metadata_come_back_as_plain_values(loaded: Gemma4, saved: Path) -> None:
    again = Gemma4.from_packed(saved, device="cpu")
    kept = {key: value for key, value in loaded.metadata.items() if key.startswith(("general.", "tokenizer."))}
    assert len(kept) > 12
    assert again.metadata.keys() == kept.keys()
    assert math.isnan(again.metadata["general.nan"])
    for key in kept.keys() - {"general.nan"}:
        assert kept[key] == again.metadata[key], key
        assert type(again.metadata[key]) in (str, int, float, bool, list), key
    assert again.tokenizer.encode("the end é") == loaded.tokenizer.encode("the end é")
    assert again.tokenizer.suppress_ids == (5, 6)
    messages = [{"role": "user", "content": "abc"}]
    assert again.chat(messages, 4) == loaded.chat(messages, 4)


@pytest.mark.parametrize("make", [gemma4, gemma3])
def test_a_saved_model_saves_to_the_same_bytes(make: Callable[..., Model], tmp_path: Path) -> None:
    path = make(types={"matrix": "Q8_0"}, layers=2).write(tmp_path / "model.gguf")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    Gemma4.from_gguf(path, device="cpu").save_packed(first)
    Gemma4.from_packed(first, device="cpu").save_packed(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_model_held_dense(tmp_path: Path) -> None:
    path = gemma4(types={"matrix": "Q4_K"}, layers=2).write(tmp_path / "model.gguf")
    dense = Gemma4.from_gguf(path, device="cpu", dequantize=True)
    dense.save_packed(tmp_path / "dense.safetensors")
    again = Gemma4.from_packed(tmp_path / "dense.safetensors", device="cpu")
    assert again.weight("blk.0.ffn_up.weight").ggml_type is GGMLType.F32
    assert torch.equal(again.logits(IDS), dense.logits(IDS))


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = Gemma4.from_gguf(gemma4(layers=2).write(tmp_path / "model.gguf"), device="cpu")
    model.save_packed(tmp_path / "tied.safetensors")
    assert "lm_head.weight" not in load_packed(tmp_path / "tied.safetensors")[0]
    again = Gemma4.from_packed(tmp_path / "tied.safetensors", device="cpu")
    assert again.model.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_dtype_and_length_are_chosen_when_loading(loaded: Gemma4, saved: Path) -> None:
    half = Gemma4.from_packed(saved, device="cpu", dtype=torch.bfloat16, max_seq_len=10**9)
    assert half.max_seq_len == loaded.config.context_length
    assert half.model.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits(IDS), loaded.logits(IDS), rtol=0, atol=0.3)
    assert not torch.equal(half.logits(IDS), loaded.logits(IDS))


def test_the_gguf_file_is_not_needed_any_more(tmp_path: Path) -> None:
    gguf = described(gemma4(layers=2)).write(tmp_path / "model.gguf")
    Gemma4.from_gguf(gguf, device="cpu").save_packed(tmp_path / "model.safetensors")
    gguf.unlink()
    assert Gemma4.from_packed(tmp_path / "model.safetensors", device="cpu").generate("abc", 2) is not None


# Damage


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"model.norm.weight": torch.ones(4)}, path)
    assert "not a file of packed weights" in refused(path, MetadataError, "packed.version")
    save_packed(path, {"a": F32Tensor(torch.ones(2, 4))}, {})
    assert "not a saved model" in refused(path, MetadataError, "gemma4.config")
    refused(tmp_path / "none.safetensors", FileMissingError, None)


@pytest.mark.parametrize("key", ["gemma4.config", "gemma4.plan", "gemma4.gguf_metadata"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}x", "[" * 100_000])
def test_damaged_descriptions_are_named(saved: Path, key: str, content: str) -> None:
    path = edited(saved, lambda _, strings: strings.update({key: content}))
    message = refused(path, MetadataError, key)
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("key", ["gemma4.config", "gemma4.plan", "gemma4.gguf_metadata"])
def test_missing_descriptions_are_named(saved: Path, key: str) -> None:
    path = edited(saved, lambda _, strings: strings.pop(key))
    assert "key is missing" in refused(path, MetadataError, key)


def change_json(key: str, change: Callable[[Any], object]) -> Edit:
    def edit(_: object, strings: dict[str, str]) -> None:
        value = json.loads(strings[key])
        change(value)
        strings[key] = json.dumps(value)

    return edit


def test_a_damaged_field_is_named(saved: Path) -> None:
    path = edited(saved, change_json("gemma4.config", lambda config: config["layers"][1].update(head_dim=0)))
    assert "layers.1.head_dim" in refused(path, MetadataError, "gemma4.config")
    path = edited(saved, change_json("gemma4.plan", lambda plan: plan["entries"][2].update(type=1234)))
    assert "entries.2.type" in refused(path, MetadataError, "gemma4.plan")


def test_a_missing_weight_is_named(saved: Path) -> None:
    name = "layers.1.self_attn.q_proj.weight"
    refused(edited(saved, lambda tensors, _: tensors.pop(name)), MissingTensorError, name)


def test_a_weight_too_many_is_named(saved: Path) -> None:
    refused(edited(saved, partial(put, "extra", F32Tensor(torch.ones(1, 4)))), UnexpectedTensorError, "extra")


@pytest.mark.parametrize("name", ["layers.0.mlp.down_proj.weight", "norm.weight", "layers.2.layer_scalar"])
def test_a_weight_of_another_shape_or_type_is_named(saved: Path, name: str) -> None:
    n, k = load_packed(saved)[0][name].shape
    others = F32Tensor(torch.ones(n, 2 * k)), F32Tensor(torch.ones(n + 1, k)), BF16Tensor(torch.ones(n, k).bfloat16())
    for other in others:
        path = edited(saved, partial(put, name, other))
        assert f"{list(other.shape)}" in refused(path, ShapeError, name)


@pytest.mark.parametrize(
    "name", ["layers.3.mlp.up_proj.weight", "layers.0.layer_scalar", "layers.0.input_layernorm.weight"]
)
def test_a_plan_without_a_weight_is_refused(saved: Path, name: str) -> None:
    def edit(tensors: dict[str, QuantTensor], strings: dict[str, str]) -> None:
        del tensors[name]
        plan = json.loads(strings["gemma4.plan"])
        plan["entries"] = [entry for entry in plan["entries"] if entry["target"] != name]
        strings["gemma4.plan"] = json.dumps(plan)

    assert name in refused(edited(saved, edit), MetadataError, "gemma4.plan")


def test_a_plan_with_a_weight_of_no_use_is_refused(saved: Path) -> None:
    def edit(tensors: dict[str, QuantTensor], strings: dict[str, str]) -> None:
        plan = json.loads(strings["gemma4.plan"])
        entry = next(e for e in plan["entries"] if e["target"] == "norm.weight")
        plan["entries"].append({**entry, "target": "layers.0.stray.weight"})
        strings["gemma4.plan"] = json.dumps(plan)
        tensors["layers.0.stray.weight"] = tensors["norm.weight"]

    refused(edited(saved, edit), UnexpectedTensorError, "layers.0.stray.weight")


def test_a_cut_file_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(Gemma4Error) as caught:
            Gemma4.from_packed(saved, device="cpu")
        assert caught.value.path == saved


# Saving


def test_a_failed_save_leaves_the_old_file(loaded: Gemma4, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(FileUnwritableError, match="No space left"):
        loaded.save_packed(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_metadata_that_cannot_be_read_leave_the_old_file(loaded: Gemma4, saved: Path) -> None:
    before = saved.read_bytes()
    broken = Gemma4(
        loaded.model, loaded.plan, {**loaded.metadata, "general.object": object()}, path=saved, max_seq_len=8
    )
    with pytest.raises(TypeError):
        broken.save_packed(saved)
    assert saved.read_bytes() == before


def test_a_model_without_weights_is_not_saved(loaded: Gemma4, tmp_path: Path) -> None:
    plan = loaded.plan
    hollow = type(loaded.model)(loaded.config, plan, torch.float32, torch.device("cpu"))
    with pytest.raises(ShapeError, match="meta"):
        Gemma4(hollow, plan, {}, path=tmp_path, max_seq_len=8).save_packed(tmp_path / "hollow.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_over_the_file_that_is_mapped(saved: Path) -> None:
    again = Gemma4.from_packed(saved, device="cpu")
    before, logits = saved.read_bytes(), again.logits(IDS)
    again.save_packed(saved)
    assert saved.read_bytes() == before
    assert torch.equal(again.logits(IDS), logits)


def test_loading_on_a_cpu_maps_the_file(tmp_path: Path) -> None:
    model = gemma4(layers=2, hidden=512, ffn=8192)
    model.values |= {n: np.ones(t.shape, np.float32) for n, t in model.tensors.items() if len(t.shape) > 1}
    Gemma4.from_gguf(model.write(tmp_path / "model.gguf"), device="cpu").save_packed(tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 50 << 20
    script = f"""
import torch
from gemma4 import Gemma4
from tests.anonymous_memory import Meter
with Meter() as meter:
    model = Gemma4.from_packed({str(tmp_path / "model.safetensors")!r}, device="cpu")
print(meter.peak_bytes)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) < size // 4


def test_the_meter_notices_memory() -> None:
    with Meter() as meter, mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(64 << 20))
        time.sleep(0.2)
    assert meter.peak_bytes > 60 << 20


def test_the_file_keeps_the_blocks_of_the_gguf(loaded: Gemma4, saved: Path) -> None:
    again = Gemma4.from_packed(saved, device="cpu")
    with GGUFFile.open(loaded.path) as file:
        for tensor in file.tensors.values():
            if len(tensor.shape) == 2:
                assert again.weight(tensor.name).to_blocks().numpy().tobytes() == bytes(file.data(tensor.name))
