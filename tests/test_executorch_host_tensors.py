"""What of an exported model is in host memory, and when."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4
from gemma4.config import CacheKind
from gemma4.export.host_tensors import host_tensors
from tests.tiny_gguf import TINY, gemma4

NORM, GATE, DOWN = (
    "model.norm.weight",
    "model.layers.0.mlp.gate_up_proj.weight.qs",
    "model.layers.1.mlp.down_proj.weight",
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = gemma4(TINY, types={"matrix": "Q4_K", "token_embd": "Q6_K"})
    return model.write(tmp_path_factory.mktemp("host") / "m.gguf")


def test_every_tensor_has_the_loaded_model_s_bytes(gguf: Path) -> None:
    loaded = Gemma4.from_gguf(gguf, device="cpu", max_seq_len=64).model
    expected = {f"model.{name}": tensor for name, tensor in loaded.named_parameters(remove_duplicate=False)}
    with host_tensors(gguf, max_seq_len=64) as tensors:
        assert {name for name in tensors if not name.startswith("cache.")} == expected.keys()
        assert len(tensors) == len(list(tensors))
        for name, tensor in expected.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)


def test_one_weight_at_a_time_is_in_memory(gguf: Path) -> None:
    with host_tensors(gguf, max_seq_len=64) as tensors:
        planes = {name: tensors[name] for name in tensors if name.startswith(DOWN)}
        assert len(planes) > 1
        assert tensors._unpacked is not None
        unpacked = weakref.ref(tensors._unpacked[1])
        held = {parameter.data_ptr() for parameter in tensors._unpacked[1].parameters()}
        assert {plane.data_ptr() for plane in planes.values()} == held
        del planes
        assert unpacked() is not None
        tensors[NORM]
        assert unpacked() is None


def test_names_of_one_weight_have_one_content(gguf: Path) -> None:
    with host_tensors(gguf, max_seq_len=64, kv_cache=CacheKind.TURBOQUANT) as tensors:
        head, embeddings = "model.lm_head.weight.qs", "model.embed_tokens.weight.qs"
        assert tensors.content(head) == tensors.content(embeddings)
        assert tensors[head].data_ptr() == tensors[embeddings].data_ptr()
        contents = {name: tensors.content(name) for name in tensors}
        for name, content in contents.items():
            assert content.endswith(" zeros") == (name.startswith("cache.") and not tensors[name].any())
        assert any(content.endswith(" zeros") for content in contents.values())
        assert len(set(contents.values())) > len(contents) // 2
