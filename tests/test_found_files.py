"""Files as people have them: Ollama's blobs, which hold vision and audio too, and files of early converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gemma4 import Gemma4
from gemma4.cli import app
from gemma4.inspect_file import inspect_file
from gemma4.quant.errors import TemplateError, UnsupportedArchitectureError
from gemma4.quant.plan import NotLoaded
from gemma4.tokenizer import tokenizer_from_metadata
from gemma4.vocabulary import TokenType
from tests.family_gguf import quantize, with_experts, with_per_layer_inputs
from tests.tiny_gguf import Model, Sizes, Tensor
from tests.tiny_vocabulary import FIRST_BYTE, TURN, TURN_END, vocabulary

SIZES = Sizes(4, 64, 96, 4, (2, 2), (16, 32), vocab=320, window=16, context=512, period=2, k_eq_v=False)
NOT_TEXT = {
    "v.patch_embd.weight": Tensor((64, 3, 16, 16), "F16"),
    "v.blk.0.attn_q.weight": Tensor((64, 64), "F16"),
    "v.blk.0.ln1.weight": Tensor((64,), "F32"),
    "v.clamp_data": Tensor((32,), "F32"),
    "a.blk.0.conv_dw.weight": Tensor((64, 5), "F32"),
    "a.conv1d.0.weight": Tensor((16, 1, 3, 3), "F16"),
    "mm.input_projection.weight": Tensor((256, 64), "BF16"),
    "mm.a.fc.weight": Tensor((256, 64), "BF16"),
}
ENCODER_KEYS = {
    "gemma4.vision.block_count": 1,
    "gemma4.vision.embedding_length": 64,
    "gemma4.vision.attention.layer_norm_epsilon": 1e-6,
    "gemma4.audio.block_count": 1,
    "gemma4.audio.feed_forward_length": 256,
}


def ollama_vocabulary() -> dict[str, Any]:
    """The tiny vocabulary as Ollama's converter writes it: a model of "llama", bytes as NORMAL, several ends."""
    metadata = vocabulary(model="llama", pre="gemma4", add_bos_token=True, eos_token_ids=[1, TURN_END])
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = [1 if kind == TokenType.BYTE else kind for kind in types]
    metadata["tokenizer.ggml.scores"] = [float(i) for i in range(len(tokens))]
    return metadata


def blob(model: Model) -> Model:
    """The same text model as a part of a file with encoders of images and sound."""
    made = Model(model.metadata | ENCODER_KEYS | ollama_vocabulary(), NOT_TEXT | model.tensors, model.values)
    made.metadata["gemma4.attention.head_count_kv"] = 2  # one number for all layers
    return made


BLOBS = {
    "E4B": quantize(with_per_layer_inputs(SIZES, 2, 32, keeps_unused=True), "Q8_0"),
    "26B-A4B": quantize(with_experts(SIZES, 4, 2, 32, joined=False), "Q8_0"),
}


@pytest.mark.parametrize("text", BLOBS.values(), ids=BLOBS)
def test_the_text_model_of_an_ollama_blob(text: Model, tmp_path: Path) -> None:
    path = blob(text).write(tmp_path / f"sha256-{'0123456789abcdef' * 4}")
    alone = Gemma4.from_gguf(text.write(tmp_path / "text.gguf"), device="cpu")
    model = Gemma4.from_gguf(path, device="cpu")
    ids = [3, 1, 2, 319, 0, 17]
    assert torch.equal(model.logits(ids), alone.logits(ids))
    assert model.plan.not_loaded[0] == NotLoaded("vision and audio", tuple(NOT_TEXT))
    assert model.chat([{"role": "user", "content": "hé"}], max_new_tokens=3, seed=1) is not None
    assert {1, TURN_END} <= model.tokenizer.eog_ids
    ids = model.tokenizer.encode("ßé\x80 the")
    assert ids == tokenizer_from_metadata(vocabulary()).encode("ßé\x80 the")
    assert model.tokenizer.decode(ids) == "ßé\x80 the"
    assert model.tokenizer.token_bytes(FIRST_BYTE + 0x80) == b"\x80"


def test_inspect_lists_what_is_not_text(tmp_path: Path) -> None:
    path = blob(BLOBS["E4B"]).write_sparse(tmp_path / "sha256-0123")
    report = inspect_file(path)
    assert report.unsupported is None
    assert report.to_json()["not_loaded"] == {
        "vision and audio": len(NOT_TEXT),
        "keys and values in layers that read another layer's": 6,
    }
    printed = CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert "not loaded: 8 tensors of vision and audio\n" in printed
    assert "not loaded: 6 tensors of keys and values in layers that read another layer's\n" in printed


def test_a_projector_alone_is_refused(tmp_path: Path) -> None:
    metadata = {"general.architecture": "clip", "clip.has_vision_encoder": True}
    path = Model(metadata, dict(NOT_TEXT)).write_sparse(tmp_path / "mmproj.gguf")
    with pytest.raises(UnsupportedArchitectureError, match="projector"):
        Gemma4.from_gguf(path)
    report = inspect_file(path)
    assert isinstance(report.unsupported, UnsupportedArchitectureError)
    assert len(report.tensors) == len(NOT_TEXT)


def test_bos_once_where_an_early_file_says_none(tmp_path: Path) -> None:
    text = BLOBS["26B-A4B"]
    template = "{{ bos_token }}<|turn>user\n{{ messages[0].content }}<turn|>\n<|turn>model\n"
    metadata = vocabulary(add_bos_token=False) | {"tokenizer.chat_template": template}
    path = Model(text.metadata | metadata, text.tensors, text.values).write(tmp_path / "early.gguf")
    tokenizer = Gemma4.from_gguf(path, device="cpu").tokenizer
    assert tokenizer.encode("the").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("<bos>the", parse_special=True).count(tokenizer.bos_id) == 1


def test_marks_that_a_caller_must_see_are_seen_whatever_their_type() -> None:
    metadata = vocabulary()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens[300:303], types[300:303] = ["<|channel>", "<|tool_call>", "<|think|>"], [3] * 3
    tokenizer = tokenizer_from_metadata(metadata)
    assert tokenizer.decode([300, 301, 302, TURN]) == "<|channel><|tool_call>"
    assert tokenizer.encode("<|channel>", add_bos=False, parse_special=True) == [300]
    assert 300 not in tokenizer.encode("<|channel>")


def test_the_template_of_the_library_in_place_of_a_files_own(tmp_path: Path) -> None:
    text = BLOBS["26B-A4B"]
    metadata = vocabulary() | {"tokenizer.chat_template": "{{ raise_exception('too old') }}"}
    path = Model(text.metadata | metadata, text.tensors, text.values).write(tmp_path / "old.gguf")
    model = Gemma4.from_gguf(path, device="cpu")
    hi = [{"role": "user", "content": "the"}]
    with pytest.raises(TemplateError, match="too old"):
        model.chat(hi, max_new_tokens=1)
    model.use_chat_template("builtin")
    assert isinstance(model.chat(hi, max_new_tokens=1), str)
    said = CliRunner().invoke(
        app, ["chat", str(path), "--template", "builtin", "-n", "1", "--device", "cpu"], input="the\n"
    )
    assert said.exit_code == 0
    assert "too old" not in said.output
    model.use_chat_template("file")
    with pytest.raises(TemplateError, match="too old"):
        model.chat(hi, max_new_tokens=1)
