"""Configuration from headers: real sizes, optional keys, and every way a header can be wrong."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from gemma4.config import Gemma4Config, LayerKind
from gemma4.mapping import expected_tensors, plan_load
from gemma4.quant.errors import (
    Gemma4Error,
    MetadataError,
    MissingTensorError,
    ShapeError,
    UnsupportedArchitectureError,
    UnsupportedTypeError,
)
from gemma4.quant.gguf_file import GGUFFile
from tests.tiny_gguf import (
    GEMMA3_27B,
    GEMMA4_12B,
    GEMMA4_26B,
    GEMMA4_31B,
    GEMMA4_E2B,
    GEMMA4_E4B,
    Model,
    Sizes,
    gemma3,
    gemma4,
    q4_k_m,
)

Read = Callable[[Model], Gemma4Config]

# Keys whose absence means that the feature is absent, or that only repeat what others say.
OPTIONAL = {
    "general.name",
    "tokenizer.ggml.model",
    "gemma4.attention.shared_kv_layers",
    "gemma4.embedding_length_per_layer_input",
    "gemma4.rope.dimension_count",
    "gemma4.rope.dimension_count_swa",
}
REQUIRED = [(make, key) for make in (gemma4, gemma3) for key in make().metadata if key not in OPTIONAL]
COUNTS = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window",
    "attention.key_length",
    "attention.value_length",
]
NUMBERS = ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "final_logit_softcapping"]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(model: Model) -> Gemma4Config:
        with GGUFFile.open(model.write_sparse(tmp_path / "model.gguf")) as file:
            return Gemma4Config.from_gguf(file)

    return read


def refused(read: Read, model: Model, error: type[Gemma4Error], field: str, *words: str) -> None:
    with pytest.raises(error) as caught:
        read(model)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert caught.value.path is not None
    assert caught.value.path.name == "model.gguf"
    for word in (field, *words):
        assert word in str(caught.value)


def test_31b(read: Read) -> None:
    config = read(gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B)))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (60, 5376, 262144)
    assert (config.context_length, config.sliding_window) == (262144, 1024)
    assert config.rms_norm_eps == pytest.approx(1e-6)
    assert (config.query_scale, config.final_logit_softcapping, config.rope_scaling_factor) == (1.0, 30.0, 1.0)
    assert (config.rope_theta_full, config.rope_theta_sliding) == (1e6, 1e4)
    assert config.tie_word_embeddings
    assert config.has_v_norm
    assert config.has_layer_scalar
    assert config.rope_freq_factors == (1.0,) * 64 + (float(np.float32(1e30)),) * 192
    assert [i for i, layer in enumerate(config.layers) if layer.kind is LayerKind.FULL] == list(range(5, 60, 6))
    for layer in config.layers:
        is_full = layer.kind is LayerKind.FULL
        assert (layer.num_attention_heads, layer.intermediate_size) == (32, 21504)
        assert (layer.num_key_value_heads, layer.head_dim) == ((4, 512) if is_full else (16, 256))
        assert layer.k_eq_v == is_full


def test_12b(read: Read) -> None:
    config = read(gemma4(GEMMA4_12B, q4_k_m(GEMMA4_12B)))
    assert (config.num_hidden_layers, config.hidden_size) == (48, 3840)
    assert {
        (layer.kind, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, layer.intermediate_size)
        for layer in config.layers
    } == {(LayerKind.FULL, 16, 1, 512, 15360), (LayerKind.SLIDING, 16, 8, 256, 15360)}
    assert sum(layer.k_eq_v for layer in config.layers) == 8


def test_a_31b_header_with_its_vocabulary_takes_under_a_second_and_little_memory(tmp_path: Path) -> None:
    model = gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B))
    model.metadata["tokenizer.ggml.tokens"] = [f"token {i}" for i in range(GEMMA4_31B.vocab)]
    path = model.write_sparse(tmp_path / "31b.gguf")

    def plan_bytes() -> int:
        with GGUFFile.open(path) as file:
            return sum(entry.file_bytes for entry in plan_load(file, Gemma4Config.from_gguf(file)).entries)

    start = time.process_time()
    assert plan_bytes() > 18e9
    assert time.process_time() - start < 1
    tracemalloc.start()
    try:
        plan_bytes()
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_real_270m(real_gguf: Path) -> None:
    with GGUFFile.open(real_gguf) as file:
        config = Gemma4Config.from_gguf(file)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (18, 640, 262144)
    assert [i for i, layer in enumerate(config.layers) if layer.kind is LayerKind.FULL] == [5, 11, 17]
    assert {(layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) for layer in config.layers} == {
        (4, 1, 256)
    }
    assert (config.rope_theta_full, config.rope_theta_sliding, config.query_scale) == (1e6, 1e4, 1 / 16)
    assert config.final_logit_softcapping is None
    assert config.rope_freq_factors is None
    assert not config.has_v_norm
    assert not config.has_layer_scalar


def test_golden_dense_model(unpacked: Callable[[str], Path]) -> None:
    with GGUFFile.open(unpacked("dense-f32.gguf")) as file:
        config = Gemma4Config.from_gguf(file)
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == expected_tensors(config)
    assert [layer.k_eq_v for layer in config.layers] == [False, False, True] * 2


def test_gemma3_27b_scales_queries_by_hidden_size_per_head(read: Read) -> None:
    model = gemma3(GEMMA3_27B)
    model.metadata |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config = read(model)
    assert config.query_scale == pytest.approx(168**-0.5)
    assert config.rope_scaling_factor == 8
    assert read(gemma3()).query_scale == pytest.approx(64**-0.5)


def test_gemma3_keys_that_replace_constants(read: Read) -> None:
    model = gemma3()
    default = read(model)
    assert [layer.kind for layer in default.layers].index(LayerKind.FULL) == 5
    assert (default.rope_theta_sliding, default.final_logit_softcapping) == (1e4, None)
    model.metadata |= {
        "gemma3.attention.sliding_window_pattern": 3,
        "gemma3.rope.freq_base_swa": 5e4,
        "gemma3.final_logit_softcapping": 20.0,
    }
    config = read(model)
    assert [i for i, layer in enumerate(config.layers) if layer.kind is LayerKind.FULL] == [2, 5]
    assert (config.rope_theta_sliding, config.final_logit_softcapping) == (5e4, 20.0)


def test_scalars_stand_for_equal_arrays(read: Read) -> None:
    model = gemma4(kv_heads=(2, 2))
    config = read(model)
    model.metadata |= {"gemma4.attention.head_count_kv": 2, "gemma4.feed_forward_length": [768] * 4}
    assert read(model) == config
    wide = read(gemma4(ffn=(256, 512, 768, 1024)))
    assert [layer.intermediate_size for layer in wide.layers] == [256, 512, 768, 1024]


def test_v_is_k_only_where_all_full_layers_lack_attn_v(read: Read) -> None:
    assert [layer.k_eq_v for layer in read(gemma4()).layers] == [False, True, False, True]
    model = gemma4(k_eq_v=False)
    assert not any(layer.k_eq_v for layer in read(model).layers)
    del model.tensors["blk.3.attn_v.weight"]
    refused(read, model, MissingTensorError, "blk.3.attn_v.weight")


def test_head_is_tied_by_absence(read: Read) -> None:
    assert read(gemma4()).tie_word_embeddings
    assert not read(gemma4(tied=False)).tie_word_embeddings


def test_layer_scalars_are_all_or_none(read: Read) -> None:
    model = gemma4()
    del model.tensors["blk.2.layer_output_scale.weight"]
    refused(read, model, MissingTensorError, "blk.2.layer_output_scale.weight")
    for i in (0, 1, 3):
        del model.tensors[f"blk.{i}.layer_output_scale.weight"]
    assert not read(model).has_layer_scalar


def test_a_model_without_full_layers_needs_no_rope_factors(read: Read) -> None:
    model = gemma4(period=100)
    del model.tensors["rope_freqs.weight"]
    assert read(model).rope_freq_factors is None


def test_config_is_immutable_and_reproducible(read: Read) -> None:
    config = read(gemma4())
    assert config == read(gemma4())
    assert hash(config) == hash(read(gemma4()))
    assert Gemma4Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        config.hidden_size = 1


@pytest.mark.parametrize(("make", "key"), REQUIRED, ids=[key for _, key in REQUIRED])
def test_missing_key(read: Read, make: Callable[[], Model], key: str) -> None:
    model = make()
    del model.metadata[key]
    refused(read, model, MetadataError, key)


@pytest.mark.parametrize("key", sorted(OPTIONAL))
def test_optional_key(read: Read, key: str) -> None:
    model = gemma4()
    del model.metadata[key]
    assert read(model).layers == read(gemma4()).layers


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True, 2**40, [4, 4]], ids=repr)
def test_wrong_count(read: Read, key: str, value: Any) -> None:
    model = gemma4()
    model.metadata[f"gemma4.{key}"] = value
    refused(read, model, MetadataError, f"gemma4.{key}", "found", "expected")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [0.0, 0, -1.0, math.nan, math.inf, "1e6", True, [1.0]], ids=repr)
def test_wrong_number(read: Read, key: str, value: Any) -> None:
    model = gemma4()
    model.metadata[f"gemma4.{key}"] = value
    refused(read, model, MetadataError, f"gemma4.{key}", "found", "expected")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma4.attention.layer_norm_rms_epsilon", 1.0),
        ("gemma4.attention.head_count_kv", [2, 1, 2, 0]),
        ("gemma4.attention.head_count_kv", [2, 1, 2, -1]),
        ("gemma4.attention.head_count_kv", [2, 1, 2]),
        ("gemma4.attention.head_count_kv", [2.0] * 4),
        ("gemma4.attention.head_count_kv", 3),
        ("gemma4.feed_forward_length", [512] * 5),
        ("gemma4.attention.sliding_window_pattern", [True] * 3),
        ("gemma4.attention.sliding_window_pattern", [1, 0, 1, 0]),
        ("gemma4.attention.sliding_window_pattern", True),
        ("gemma4.attention.sliding_window_pattern", "full"),
        ("gemma4.attention.sliding_window_pattern", ["full"] * 4),
        ("gemma4.attention.value_length", 64),
        ("gemma4.attention.value_length_swa", 128),
        ("gemma4.attention.key_length_swa", 0),
        ("gemma4.rope.dimension_count", 64),
        ("gemma4.rope.dimension_count_swa", 0),
        ("gemma4.rope.scaling.type", "yarn"),
        ("gemma4.rope.scaling.type", 1),
        ("gemma4.attention.shared_kv_layers", -1),
        ("gemma4.attention.shared_kv_layers", "0"),
        ("gemma4.expert_count", [0]),
        ("gemma4.block_count", 3),
        ("gemma4.block_count", 5),
        ("gemma4.block_count", 2**31 - 1),
        ("tokenizer.ggml.tokens", ["a", "b"]),
    ],
    ids=str,
)
def test_wrong_value(read: Read, key: str, value: Any) -> None:
    model = gemma4()
    model.metadata[key] = value
    refused(read, model, MetadataError, key, "found", "expected" if key != "gemma4.block_count" else "blocks")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma3.rope.scaling.type", "yarn"),
        ("gemma3.attention.sliding_window_pattern", 0),
        ("gemma3.attention.head_count", 0),
        ("gemma3.final_logit_softcapping", 0.0),
        ("gemma3.block_count", 2**31 - 1),
    ],
    ids=str,
)
def test_wrong_gemma3_value(read: Read, key: str, value: Any) -> None:
    model = gemma3()
    model.metadata[key] = value
    refused(read, model, MetadataError, key, "found")


def test_gemma3_linear_scaling_needs_its_factor(read: Read) -> None:
    model = gemma3()
    model.metadata["gemma3.rope.scaling.type"] = "linear"
    refused(read, model, MetadataError, "gemma3.rope.scaling.factor", "missing")


def test_odd_head_size(read: Read) -> None:
    model = gemma4(head_dim=(63, 128))
    refused(read, model, MetadataError, "gemma4.attention.key_length", "63", "even")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_wrong_rope_factor(read: Read, value: float) -> None:
    model = gemma4()
    model.values["rope_freqs.weight"][5] = value
    refused(read, model, MetadataError, "rope_freqs.weight", str(value), "positive")


def test_wrong_rope_factors_tensor(read: Read) -> None:
    model = gemma4()
    model.retype("rope_freqs.weight", "F16")
    refused(read, model, UnsupportedTypeError, "rope_freqs.weight", "F16", "F32")
    model = gemma4()
    model.reshape("rope_freqs.weight", 63)
    model.values.clear()
    refused(read, model, ShapeError, "rope_freqs.weight", "63", "64")
    model.reshape("rope_freqs.weight", 1 << 40)
    refused(read, model, ShapeError, "rope_freqs.weight")
    model.reshape("rope_freqs.weight", 8, 8)
    refused(read, model, ShapeError, "rope_freqs.weight")
    del model.tensors["rope_freqs.weight"]
    refused(read, model, MissingTensorError, "rope_freqs.weight")


def test_wrong_embedding(read: Read) -> None:
    model = gemma4()
    model.reshape("token_embd.weight", 320, 255)
    refused(read, model, ShapeError, "token_embd.weight", "255", "256")
    model.reshape("token_embd.weight", 320 * 256)
    refused(read, model, ShapeError, "token_embd.weight", "2 dimensions")
    del model.tensors["token_embd.weight"]
    refused(read, model, MissingTensorError, "token_embd.weight")


def small(sizes: Sizes, shared: int) -> Model:
    """A file of E2B's or E4B's metadata."""
    model = gemma4(sizes)
    model.metadata |= {
        "gemma4.embedding_length_per_layer_input": 256,
        "gemma4.attention.shared_kv_layers": shared,
        "gemma4.attention.head_count_kv": sizes.kv_heads[0],
    }
    return model


@pytest.mark.parametrize(("sizes", "shared"), [(GEMMA4_E2B, 20), (GEMMA4_E4B, 18)], ids=["E2B", "E4B"])
def test_layers_that_share_keys_and_values(read: Read, sizes: Sizes, shared: int) -> None:
    config = read(small(sizes, shared))
    own = sizes.layers - shared
    assert config.hidden_size_per_layer_input == 256
    assert [layer.kv_source for layer in config.layers[:own]] == [None] * own
    for i, layer in enumerate(config.layers[own:], own):
        assert layer.kv_source == (own - 1 if sizes.is_full(i) else own - 2)
        assert config.layers[layer.kv_source].kind is layer.kind
    assert [layer.intermediate_size for layer in config.layers] == [sizes.ffn_of(i) for i in range(sizes.layers)]
    assert not any(layer.k_eq_v for layer in config.layers)


@pytest.mark.parametrize("shared", [34, 19, 35, 36])
def test_layers_with_nothing_to_share(read: Read, shared: int) -> None:
    refused(read, small(GEMMA4_E2B, shared), MetadataError, "gemma4.attention.shared_kv_layers", str(shared))


def test_mixture_of_experts(read: Read) -> None:
    model = gemma4(GEMMA4_26B)
    keys = {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 704}
    model.metadata |= {f"gemma4.{key}": value for key, value in keys.items()}
    config = read(model)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (128, 8, 704)
    assert not config.has_joined_experts
    for key in ("expert_used_count", "expert_feed_forward_length"):
        value = model.metadata.pop(f"gemma4.{key}")
        refused(read, model, MetadataError, f"gemma4.{key}")
        model.metadata[f"gemma4.{key}"] = value
    model.metadata["gemma4.expert_used_count"] = 129
    refused(read, model, MetadataError, "gemma4.expert_used_count", "128 experts")


def test_router_without_expert_count(read: Read) -> None:
    model = gemma4()
    model.tensors["blk.0.ffn_gate_inp.weight"] = model.tensors["blk.0.attn_q.weight"]
    refused(read, model, MetadataError, "gemma4.expert_count", "router")


def test_vocabulary_only_file(unpacked: Callable[[str], Path]) -> None:
    with GGUFFile.open(unpacked("ggml-vocab-gemma-4.gguf")) as file, pytest.raises(MetadataError, match="block"):
        Gemma4Config.from_gguf(file)


@pytest.mark.parametrize(
    ("architecture", "word"),
    [("llama", "gemma4"), ("gemma3n", "gemma4"), ("clip", "mmproj"), ("gemma4-assistant", "drafter")],
)
def test_other_architectures(read: Read, architecture: str, word: str) -> None:
    model = gemma4()
    model.metadata["general.architecture"] = architecture
    refused(read, model, UnsupportedArchitectureError, "general.architecture", architecture, word)


@pytest.mark.parametrize("value", [4, ["gemma4"]])
def test_architecture_of_another_type(read: Read, value: Any) -> None:
    model = gemma4()
    model.metadata["general.architecture"] = value
    refused(read, model, MetadataError, "general.architecture", "expected a string")


@pytest.mark.parametrize("name", ["blk", "blk.", "blk.x.y", "blk." + "9" * 5000 + ".attn_q.weight", "blk.-1.y"])
def test_strange_block_names_are_typed_errors(tmp_path: Path, name: str) -> None:
    model = gemma4()
    model.rename("blk.3.attn_q.weight", name)
    with GGUFFile.open(model.write_sparse(tmp_path / "model.gguf")) as file, pytest.raises(Gemma4Error):
        plan_load(file, Gemma4Config.from_gguf(file))
