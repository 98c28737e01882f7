"""Hugging Face checkpoints: what transformers recorded of small models is what we write, read and compute.

The recordings are of transformers 5.23.0: the names, shapes and config.json it saves, and its float32 logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from gemma4 import Gemma4
from gemma4.cli import app
from gemma4.config import Gemma4Config
from gemma4.hf_checkpoint import HFCheckpoint
from gemma4.hf_config import config_from_model, metadata_from_config
from gemma4.hf_export import export_hf
from gemma4.quant.errors import (
    FileMissingError,
    Gemma4Error,
    MalformedError,
    MetadataError,
    MissingTensorError,
    TruncatedError,
    UnexpectedTensorError,
    UnsupportedArchitectureError,
    UnsupportedFeatureError,
    UnsupportedTypeError,
)
from gemma4.quant.gguf_file import GGUFFile, TensorInfo
from tests.family_gguf import FULL_SIZE
from tests.hf_models import HF_MODELS, IDS
from tests.test_nvfp4_scales import K_EQ_V, multiplied, nvfp4
from tests.tiny_gguf import Model, gemma3, gemma4
from tests.tiny_vocabulary import TURN_END, vocabulary

SHARD_BYTES = 60_000
every_model = pytest.mark.parametrize("name", HF_MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The GGUF file and the exported directory of each model."""
    root = tmp_path_factory.mktemp("hf")
    made = {}
    for name, make in HF_MODELS.items():
        path = make().write(root / f"{name}.gguf")
        export_hf(path, root / name, shard_bytes=SHARD_BYTES)
        made[name] = (path, root / name)
    return made


@pytest.fixture(scope="module")
def dense(folders: dict[str, tuple[Path, Path]]) -> Path:
    return folders["dense"][1]


def recorded(data_dir: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((data_dir / "hf" / f"{name.replace(' ', '-')}.json").read_text())
    return value


def recorded_logits(data_dir: Path, name: str) -> Tensor:
    with np.load(data_dir / "hf" / "logits.npz") as file:
        return torch.from_numpy(file[name])


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def copy_of(folder: Path, target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint in one file."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


# Against transformers


@every_model
def test_what_is_written_is_what_transformers_would_save(
    name: str, folders: dict[str, tuple[Path, Path]], data_dir: Path
) -> None:
    expected, (_, folder) = recorded(data_dir, name), folders[name]
    found = stored(folder)
    assert {key: list(tensor.shape) for key, tensor in found.items()} == expected["tensors"]
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    ours, theirs = config_of(folder), expected["config"]
    full = {"head_dim": ours.pop("global_head_dim")}
    full_kv_heads = ours.pop("num_global_key_value_heads")
    if full_kv_heads is not None:
        full["num_key_value_heads"] = full_kv_heads
    layers = [str(i) for i, kind in enumerate(ours["layer_types"]) if kind == "full_attention"]
    assert theirs["per_layer_config"] == dict.fromkeys(layers, full)
    assert {key: theirs[key] for key in ours} == ours


@every_model
def test_logits_are_those_of_transformers(
    name: str, folders: dict[str, tuple[Path, Path]], data_dir: Path, tmp_path: Path
) -> None:
    path, folder = folders[name]
    expected = recorded_logits(data_dir, name)
    assert expected.std() > 0.9
    theirs = copy_of(folder, tmp_path / "theirs", recorded(data_dir, name)["config"], stored(folder))
    for model in (
        Gemma4.from_gguf(path, device="cpu"),
        Gemma4.from_pretrained(folder, device="cpu"),
        Gemma4.from_pretrained(theirs, device="cpu"),
    ):
        torch.testing.assert_close(model.logits(IDS), expected, rtol=0, atol=5e-5)


# Writing


def test_shards_and_their_index(dense: Path) -> None:
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    shards = sorted(dense.glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    total = 0
    for path in shards:
        assert path.stat().st_size < SHARD_BYTES + 4096
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == path.name
                total += file.get_tensor(name).nbytes
    assert index["weight_map"] == {}
    assert index["metadata"]["total_size"] == total


def test_quantized_weights_are_rounded_once(tmp_path: Path) -> None:
    model = nvfp4(gemma4(K_EQ_V))
    export_hf(model.write(tmp_path / "nvfp4.gguf"), tmp_path / "out")
    found = stored(tmp_path / "out")
    exact = multiplied(model)
    for name, hf in (("blk.1.ffn_down", "layers.1.mlp.down_proj"), ("token_embd", "embed_tokens")):
        expected = torch.from_numpy(exact.values[f"{name}.weight"]).to(torch.bfloat16)
        assert torch.equal(found[f"model.{hf}.weight"], expected)
    assert not any("scale" in name for name in found)


def test_a_slice_at_a_time_is_in_memory(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma4.hf_export._SLICE_WEIGHTS", 200)
    largest = 0
    whole = torch.frombuffer

    def frombuffer(buffer: Any, **options: Any) -> Tensor:
        nonlocal largest
        tensor = whole(buffer, **options)
        largest = max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "frombuffer", frombuffer)
    for name in ("dense", "split experts"):
        path, folder = folders[name]
        export_hf(path, tmp_path / name, shard_bytes=SHARD_BYTES)
        assert {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} == {
            f.name: f.read_bytes() for f in folder.iterdir()
        }
    assert largest <= 2 * 200


def test_an_interrupted_export_leaves_nothing(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = folders["dense"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemma4.hf_export._index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hf(path, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(Gemma4Error, match="exists already"):
        export_hf(path, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_tokenizer_template_and_sampling_go_along(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model = gemma4(vocab=320)
    metadata = vocabulary(suppress_tokens=[7, 9], padding_token_id=0) | {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "general.sampling.top_k": 5,
        "general.sampling.temp": 0.5,
    }
    path = Model(model.metadata | metadata, model.tensors, model.values).write(tmp_path / "model.gguf")
    done = CliRunner().invoke(app, ["convert", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    ours, theirs = Gemma4.from_gguf(path, device="cpu"), Gemma4.from_pretrained(tmp_path / "out", device="cpu")
    text = "the ßé 日本 <|turn>"
    assert theirs.tokenizer.encode(text) == ours.tokenizer.encode(text)
    assert theirs.tokenizer.eog_ids == ours.tokenizer.eog_ids >= {1, TURN_END}
    assert theirs.tokenizer.suppress_ids == (7, 9)
    assert theirs.sampling == ours.sampling
    assert theirs.chat_template.source == ours.chat_template.source
    from tokenizers import Tokenizer

    stored_tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert stored_tokenizer.encode("the ßé 日本").ids == ours.tokenizer.encode("the ßé 日本")
    assert stored_tokenizer.decode(ours.tokenizer.encode("the ßé 日本")) == "the ßé 日本"


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    def refusal(model: Model) -> str:
        with pytest.raises(UnsupportedFeatureError) as caught:
            export_hf(model.write_sparse(tmp_path / "odd.gguf"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "gemma3" in refusal(gemma3())
    assert "one kind" in refusal(gemma4(period=3))
    assert "intermediate sizes" in refusal(gemma4(ffn=(256, 256, 512, 768)))
    odd = gemma4()
    odd.values["rope_freqs.weight"] = np.full_like(odd.values["rope_freqs.weight"], 2)
    assert "RoPE factors" in refusal(odd)
    assert "KV heads" in refusal(gemma4(k_eq_v=False))


@dataclass
class OtherMetadata:
    """A file with the tensors of another."""

    file: GGUFFile
    metadata: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.file.tensors

    def data(self, name: str) -> memoryview:
        return self.file.data(name)


@pytest.mark.parametrize("size", FULL_SIZE)
def test_configurations_of_the_family_come_back(size: str, tmp_path: Path) -> None:
    with GGUFFile.open(FULL_SIZE[size]().write_sparse(tmp_path / "model.gguf")) as file:
        config = Gemma4Config.from_gguf(file)
        written = json.loads(json.dumps(config_from_model(config, file.path)))
        metadata, factors = metadata_from_config(written, file.path)
        assert Gemma4Config.from_gguf(OtherMetadata(file, {"general.name": config.name} | metadata)) == config
    assert np.array_equal(np.float32(factors), np.float32(config.rope_freq_factors or ()))


# Reading


def test_a_multimodal_checkpoint(dense: Path, data_dir: Path, tmp_path: Path) -> None:
    """The names and config.json of the published checkpoints: the text model inside another."""
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in stored(dense).items()}
    others = (
        "model.vision_tower.a.weight",
        "model.audio_tower.b.weight",
        "model.embed_vision.embedding_projection.weight",
    )
    tensors |= {name: torch.zeros(4, 4) for name in others}
    tensors["model.audio_tower.clip"] = torch.zeros(3, dtype=torch.int64)
    config = {"model_type": "gemma4", "text_config": config_of(dense), "vision_config": {}, "tie_word_embeddings": True}
    model = Gemma4.from_pretrained(copy_of(dense, tmp_path / "whole", config, tensors), device="cpu")
    torch.testing.assert_close(model.logits(IDS), recorded_logits(data_dir, "dense"), rtol=0, atol=5e-5)
    assert [(group.what, len(group.names)) for group in model.plan.not_loaded] == [("vision and audio", 3)]


def test_the_unified_models_have_defaults_of_their_own(dense: Path, data_dir: Path, tmp_path: Path) -> None:
    config = recorded(data_dir, "dense")["config"] | {"model_type": "gemma4_unified_text"}
    for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "max_position_embeddings"):
        del config[key]
    model = Gemma4.from_pretrained(copy_of(dense, tmp_path / "unified", config, stored(dense)), device="cpu")
    torch.testing.assert_close(model.logits(IDS), recorded_logits(data_dir, "dense"), rtol=0, atol=5e-5)
    assert model.config.context_length == 262144


def test_a_tied_head_may_be_stored_too(dense: Path, data_dir: Path, tmp_path: Path) -> None:
    tensors = stored(dense)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = Gemma4.from_pretrained(copy_of(dense, tmp_path / "tied", config_of(dense), tensors), device="cpu")
    assert model.plan.is_head_tied


Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]
DAMAGES: dict[str, tuple[Edit, type[Gemma4Error], str]] = {
    "no model of ours": (
        lambda config, _: config.update(model_type="llama"),
        UnsupportedArchitectureError,
        "model_type: found 'llama'",
    ),
    "quantized": (
        lambda config, _: config.update(quantization_config={"quant_method": "fp8"}),
        UnsupportedFeatureError,
        "quantization_config",
    ),
    "no causal attention": (
        lambda config, _: config.update(use_bidirectional_attention="all"),
        UnsupportedFeatureError,
        "use_bidirectional_attention",
    ),
    "a weight is missing": (
        lambda _, tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
        MissingTensorError,
        r"blk\.2\.ffn_up\.weight",
    ),
    "the embeddings are missing": (
        lambda _, tensors: tensors.pop("model.embed_tokens.weight"),
        MissingTensorError,
        "embed_tokens",
    ),
    "a weight too many": (
        lambda _, tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        UnexpectedTensorError,
        r"q_proj\.bias",
    ),
    "twice": (
        lambda _, tensors: tensors.update({"model.language_model.norm.weight": torch.zeros(64)}),
        UnexpectedTensorError,
        "twice",
    ),
    "integers": (
        lambda _, tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
        UnsupportedTypeError,
        "I8",
    ),
    "layers": (lambda config, _: config.update(num_hidden_layers=5), MetadataError, "layer_types"),
    "a count": (lambda config, _: config.update(hidden_size="64"), MetadataError, "hidden_size: found '64'"),
    "no softcap": (
        lambda config, _: config.update(final_logit_softcapping=None),
        MetadataError,
        "final_logit_softcapping",
    ),
    "rope": (lambda config, _: config["rope_parameters"].pop("full_attention"), MetadataError, "rope_parameters"),
    "flag": (lambda config, _: config.update(enable_moe_block=1), MetadataError, "enable_moe_block"),
}


@pytest.mark.parametrize(("edit", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints(edit: Edit, error: type[Gemma4Error], message: str, dense: Path, tmp_path: Path) -> None:
    config, tensors = config_of(dense), stored(dense)
    edit(config, tensors)
    with pytest.raises(error, match=message) as caught:
        Gemma4.from_pretrained(copy_of(dense, tmp_path / "damaged", config, tensors), device="cpu")
    assert caught.value.path is not None


def test_damaged_files(dense: Path, tmp_path: Path) -> None:
    folder = copy_of(dense, tmp_path / "damaged", config_of(dense), stored(dense))
    path = folder / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    for data, error in (
        (good[:-1], TruncatedError),
        (good[:100], TruncatedError),
        (good[:4], TruncatedError),
        ((2**62).to_bytes(8, "little") + good[8:], MalformedError),
        (good[:8] + b"[" + good[9:], MalformedError),
        (good[:8] + good[8 : 8 + length].replace(b'"BF16"', b'"QQ16"', 1) + good[8 + length :], MalformedError),
        (good[:8] + good[8 : 8 + length].replace(b'"shape":[', b'"shape":[9', 1) + good[8 + length :], MalformedError),
    ):
        path.write_bytes(data)
        with pytest.raises(error) as caught:
            HFCheckpoint.open(folder)
        assert caught.value.path == path
    path.unlink()
    with pytest.raises(FileMissingError):
        HFCheckpoint.open(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(MalformedError, match="not JSON"):
        HFCheckpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileMissingError, match="checkpoint directory"):
        HFCheckpoint.open(folder)
    index = {"weight_map": {"a": "../escape.safetensors"}}
    (folder / "config.json").write_text(json.dumps(config_of(dense)))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MetadataError, match="same directory"):
        HFCheckpoint.open(folder)


def test_loading_copies_no_shard(dense: Path) -> None:
    with HFCheckpoint.open(dense) as file:
        assert file.tensors["token_embd.weight"].nbytes == len(file.data("token_embd.weight"))
        assert file.data("blk.0.attn_q.weight").obj is file.data("blk.0.attn_q.weight").obj
        kind = gguf.GGMLQuantizationType(file.tensors["blk.0.attn_q.weight"].type)
        assert kind is gguf.GGMLQuantizationType.BF16
        with pytest.raises(MissingTensorError):
            file.data("absent")
