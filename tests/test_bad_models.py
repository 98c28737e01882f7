"""What `Gemma4.from_gguf` does with files that are no model it can run: one typed error, before any weight is read."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gemma4 import Gemma4, opening
from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.model import TextModel
from gemma4.quant.errors import (
    FileMissingError,
    Gemma4Error,
    MetadataError,
    MissingPartError,
    MissingTensorError,
    NotGGUFError,
    ShapeError,
    TruncatedError,
    UnexpectedTensorError,
    UnsupportedArchitectureError,
    UnsupportedTypeError,
)
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.loader import load_weights
from gemma4.quant.plan import LoadPlan
from tests.tiny_gguf import GEMMA4_31B, Model, gemma3, gemma4, q4_k_m

pytestmark = pytest.mark.usefixtures("one_thread")

Refuse = Callable[..., str]
CPU = torch.device("cpu")
MIXED = {
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


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """refuse(file, error, field) is the message of the error, checked for its parts."""

    def no_weights(*_: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(opening, "load_weights", no_weights)

    def refuse(file: Model | Path, error: type[Gemma4Error], field: str | None) -> str:
        path = file if isinstance(file, Path) else file.write_sparse(tmp_path / "bad.gguf")
        start = time.process_time()
        with pytest.raises(error) as caught:
            Gemma4.from_gguf(path, device="cpu")
        assert time.process_time() - start < 1
        assert type(caught.value) is error
        assert caught.value.path == path
        assert caught.value.field == field
        message = str(caught.value)
        assert message.startswith(f"{path}: {field}: " if field else f"{path}: ")
        return message

    return refuse


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma4(types=MIXED).write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def opened(path: Path) -> tuple[GGUFFile, TextModel, LoadPlan]:
    file = GGUFFile.open(path)
    config = Gemma4Config.from_gguf(file)
    plan = plan_load(file, config)
    return file, TextModel(config, plan, torch.float32, CPU), plan


@pytest.mark.parametrize(("make", "tied"), [(gemma4, True), (gemma4, False), (gemma3, False)])
def test_a_good_model_gets_every_weight_of_its_file(tmp_path: Path, make: Callable[..., Model], tied: bool) -> None:
    model = make(types=MIXED, tied=tied)
    loaded = Gemma4.from_gguf(model.write(tmp_path / "good.gguf"), device="cpu")
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())
    for name, tensor in model.tensors.items():
        if name in loaded.plan.in_config:
            continue
        kind = gguf.GGMLQuantizationType[tensor.type]
        expected = torch.from_numpy(gguf.dequantize(model.encoded(name), kind))
        if len(tensor.shape) > 1:
            found = loaded.weight(name).dequantize()
        else:
            found = loaded.model.get_parameter(loaded.plan.source(name)[0].target)
        assert torch.equal(found, expected.view(found.shape)), name
    assert torch.isfinite(loaded.logits([1, 2, 3])).all()


@pytest.mark.parametrize(
    ("architecture", "word"),
    [("llama", "supported are gemma3, gemma4"), ("clip", "mmproj"), ("gemma4-assistant", "drafter")],
)
def test_other_architecture(refuse: Refuse, architecture: str, word: str) -> None:
    model = gemma4()
    model.metadata["general.architecture"] = architecture
    message = refuse(model, UnsupportedArchitectureError, "general.architecture")
    assert architecture in message
    assert word in message


def test_gemma4_keys_under_the_name_of_gemma3(refuse: Refuse) -> None:
    model = gemma4()
    model.metadata["general.architecture"] = "gemma3"
    assert "missing" in refuse(model, MetadataError, "gemma3.block_count")


@pytest.mark.parametrize("name", [n for n in gemma4().tensors if not n.startswith(("blk.1", "blk.2"))])
def test_missing_tensor(refuse: Refuse, name: str) -> None:
    model = gemma4()
    del model.tensors[name]
    refuse(model, MissingTensorError, name)


def test_missing_layer(refuse: Refuse) -> None:
    model = gemma4()
    model.tensors = {name: tensor for name, tensor in model.tensors.items() if not name.startswith("blk.3.")}
    message = refuse(model, MetadataError, "gemma4.block_count")
    assert "found 4" in message
    assert "3 blocks" in message


def test_extra_tensor(refuse: Refuse) -> None:
    for name in ("vision.patch_embd.weight", "blk.0.attn_q.bias", "blk.1.attn_qkv.weight", "output_norm.bias"):
        model = gemma4()
        model.tensors[name] = model.tensors["blk.0.attn_q.weight"]
        assert "no place" in refuse(model, UnexpectedTensorError, name)


@pytest.mark.parametrize("name", [n for n in gemma4(tied=False).tensors if not n.startswith(("blk.1", "blk.2"))])
def test_wrong_shape(refuse: Refuse, name: str) -> None:
    model = gemma4(tied=False)
    shape = model.tensors[name].shape
    model.values.pop(name, None)
    model.reshape(name, *shape[:-1], 2 * shape[-1])
    message = refuse(model, ShapeError, name)
    assert f"{2 * shape[-1]}" in message
    assert f"{shape[-1]}" in message


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("embedding_length", "token_embd.weight"),
        ("feed_forward_length", "blk.0.ffn_gate.weight"),
        ("attention.head_count", "blk.0.attn_q.weight"),
    ],
)
def test_metadata_of_another_size(refuse: Refuse, key: str, name: str) -> None:
    model = gemma4()
    model.metadata[f"gemma4.{key}"] *= 2
    refuse(model, ShapeError, name)


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_would_turn_every_output_to_nan(refuse: Refuse, key: str, value: float) -> None:
    model = gemma4()
    model.metadata[f"gemma4.{key}"] = value
    message = refuse(model, MetadataError, f"gemma4.{key}")
    assert f"found {value!r}" in message
    assert "expected a positive" in message


def test_types_without_support_are_listed_at_once(refuse: Refuse) -> None:
    types = {"ffn_up": "I32", "ffn_gate": "I32", "ffn_down": "Q8_1", "attn_q": "F64", "attn_k": "I8"}
    message = refuse(gemma4(types=types), UnsupportedTypeError, "blk.0.attn_q.weight")
    for kind in ("I32", "Q8_1", "F64", "I8"):
        assert f"{kind}: blk.0." in message
    assert "supported are BF16, F16, F32, IQ1_M" in message


def test_type_that_no_one_knows(refuse: Refuse, tmp_path: Path) -> None:
    model = gemma4()
    path = model.write_sparse(tmp_path / "strange.gguf")
    data, name = bytearray(path.read_bytes()), b"blk.2.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16
    data[at : at + 4] = (142).to_bytes(4, "little")
    path.write_bytes(data)
    assert "142" in refuse(path, UnsupportedTypeError, name.decode())


def test_experts_announced_but_absent(refuse: Refuse) -> None:
    model = gemma4()
    keys = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 64}
    model.metadata |= {f"gemma4.{key}": value for key, value in keys.items()}
    assert "ffn_down_exps.weight" in refuse(model, MissingTensorError, "blk.0.ffn_gate_exps.weight")


def test_vocabulary_without_a_model(refuse: Refuse) -> None:
    model = gemma4()
    model.tensors.clear()
    assert "0 blocks" in refuse(model, MetadataError, "gemma4.block_count")


def test_a_vocabulary_of_another_size(refuse: Refuse) -> None:
    model = gemma4()
    model.metadata["tokenizer.ggml.tokens"] = [str(i) for i in range(321)]
    message = refuse(model, MetadataError, "tokenizer.ggml.tokens")
    assert "321" in message
    assert "320" in message


def test_a_file_cut_anywhere(tiny: Path, refuse: Refuse, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    with GGUFFile.open(tiny) as file:
        first = min(tensor.offset for tensor in file.tensors.values())
        end = max(tensor.offset + tensor.nbytes for tensor in file.tensors.values())
    rng = np.random.default_rng(0)
    cuts = {0, 1, 3, 4, 8, 23, 24, first - 1, first, first + 1, end - 1}
    cuts |= {int(cut) for cut in rng.integers(24, first, 24)} | {int(cut) for cut in rng.integers(first, end, 24)}
    path = tmp_path / "cut.gguf"
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(TruncatedError) as caught:
            Gemma4.from_gguf(path, device="cpu")
        assert caught.value.path == path
        assert str(cut) in str(caught.value)
    shutil.copyfile(tiny, path)
    with path.open("r+b") as file_:
        file_.truncate(end - 1)
    refuse(path, TruncatedError, "blk.3.layer_output_scale.weight")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
        (b"PK\3\4" + bytes(64), "PyTorch checkpoint"),
        (bytes(4096), "zero bytes"),
        (b"GGUG" + bytes(64), "GGUF"),
    ],
)
def test_not_a_gguf(refuse: Refuse, tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert word in refuse(path, NotGGUFError, "magic")


def test_no_file(refuse: Refuse, tmp_path: Path) -> None:
    refuse(tmp_path / "none.gguf", FileMissingError, None)


def test_missing_split_part(refuse: Refuse, tmp_path: Path) -> None:
    first = gemma4(types={"matrix": "Q8_0"}).write(tmp_path / "model.gguf", split_tensors=20)
    assert first.name == "model-00001-of-00003.gguf"
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    assert "model-00002-of-00003.gguf" in refuse(first, MissingPartError, "split.count")


def test_split_file_from_any_part(tmp_path: Path) -> None:
    model = gemma4(types={"matrix": "Q8_0"}, layers=2)
    whole = Gemma4.from_gguf(model.write(tmp_path / "whole.gguf"), device="cpu").logits([3, 1, 2])
    first = model.write(tmp_path / "model.gguf", split_tensors=10)
    for part in (first, first.with_name(first.name.replace("00001", "00003"))):
        assert torch.equal(Gemma4.from_gguf(part, device="cpu").logits([3, 1, 2]), whole)


def test_a_31b_file_is_refused_before_its_weights_are_touched(refuse: Refuse) -> None:
    model = gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B))
    del model.tensors["blk.59.ffn_down.weight"]
    refuse(model, MissingTensorError, "blk.59.ffn_down.weight")


def test_a_plan_that_leaves_a_weight_unfilled(tiny: Path) -> None:
    file, model, plan = opened(tiny)
    without = next(entry for entry in plan.entries if entry.target == "layers.2.self_attn.q_proj.weight")
    incomplete = replace(plan, entries=tuple(entry for entry in plan.entries if entry != without))
    with pytest.raises(MissingTensorError) as caught:
        load_weights(model, incomplete, file, CPU)
    assert str(caught.value.field).startswith(without.target)
    file.close()


def test_a_plan_for_another_model(tiny: Path) -> None:
    file, model, plan = opened(tiny)
    stray = replace(plan.entries[-1], target="layers.9.input_layernorm.weight")
    with pytest.raises(UnexpectedTensorError) as caught:
        load_weights(model, replace(plan, entries=(*plan.entries, stray)), file, CPU)
    assert caught.value.field == stray.target
    file.close()
