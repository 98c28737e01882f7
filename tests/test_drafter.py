"""Drafter files: what they hold, which model they belong to, and logits equal to transformers'."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gemma4 import Gemma4
from gemma4.cli import main
from gemma4.config import TARGET, Gemma4Config
from gemma4.drafter import Drafter
from gemma4.drafter_config import DrafterConfig, check_pair, plan_drafter, shared_layer
from gemma4.inspect_file import inspect_file
from gemma4.inspect_tables import print_report
from gemma4.quant.errors import (
    DrafterMismatchError,
    Gemma4Error,
    MetadataError,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
    UnsupportedArchitectureError,
)
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from gemma4.speculate import Draft
from gemma4.terminal_chat import Conversation
from tests.drafter_gguf import HIDDEN, drafter_for
from tests.family_gguf import FULL_SIZE, SHRUNKEN
from tests.tiny_gguf import Model, Tensor, gemma3, gemma4
from tests.tiny_vocabulary import vocabulary

GEMMA4 = "gemma4-assistant."


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Model], tuple[DrafterConfig, LoadPlan]]:
    def read_header(model: Model) -> tuple[DrafterConfig, LoadPlan]:
        with GGUFFile.open(model.write_sparse(tmp_path / "drafter.gguf")) as file:
            config = DrafterConfig.from_gguf(file)
            return config, plan_drafter(file, config)

    return read_header


Read = Callable[[Model], tuple[DrafterConfig, LoadPlan]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Gemma4:
    return Gemma4.from_gguf(gemma4().write(tmp_path_factory.mktemp("target") / "target.gguf"), device="cpu")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_drafters_of_all_sizes(tmp_path: Path, read: Read, name: str) -> None:
    model = FULL_SIZE[name]()
    config, plan = read(drafter_for(model, hidden=1024, heads=32, kind="Q8_0"))
    with GGUFFile.open(model.write_sparse(tmp_path / "model.gguf")) as file:
        own = Gemma4Config.from_gguf(file)
        check_pair(config, {}, own, file.metadata)
    assert config.backbone_hidden_size == own.hidden_size
    assert {layer.kv_source for layer in config.layers} == {TARGET}
    assert plan.by_target()["pre_projection.weight"].shape == (1024, 2 * own.hidden_size)
    assert plan.by_target()["post_projection.weight"].shape == (own.hidden_size, 1024)
    last = {"E2B": (13, 14), "E4B": (22, 23), "12B": (46, 47), "26B-A4B": (28, 29), "31B": (58, 59)}[name]
    assert tuple(shared_layer(own, layer.kind) for layer in config.layers) == (last[0],) * 3 + (last[1],)


@pytest.mark.parametrize("key", ["embedding_length_out", "n_embd_backbone", "backbone_embedding_length"])
@pytest.mark.parametrize("architecture", ["gemma4-assistant", "gemma4_assistant"])
@pytest.mark.parametrize("projections", ["nextn", "mtp"])
def test_names_of_several_converters(read: Read, key: str, architecture: str, projections: str) -> None:
    model = drafter_for(gemma4(), architecture=architecture, backbone_key=key, projections=projections)
    model.tensors["masked_embd_centroids.weight"] = Tensor((16, HIDDEN), "F32")
    config, plan = read(model)
    assert config.backbone_hidden_size == 256
    assert "pre_projection.weight" in plan
    assert "not loaded: 1 tensors of a coarse search of the vocabulary" in plan.describe()


def edited(edit: Callable[[Model], object]) -> Model:
    model = drafter_for(gemma4())
    edit(model)
    return model


def set_key(key: str, value: Any) -> Callable[[Model], object]:
    return lambda model: model.metadata.__setitem__(GEMMA4 + key, value)


DAMAGED: dict[str, tuple[Callable[[Model], object], type[Gemma4Error], str]] = {
    "no target size": (lambda m: m.metadata.pop(GEMMA4 + "embedding_length_out"), MetadataError, "length_out"),
    "no projection": (lambda m: m.tensors.pop("nextn.post_projection.weight"), MissingTensorError, "post_projection"),
    "narrow projection": (lambda m: m.reshape("nextn.pre_projection.weight", HIDDEN, 256), ShapeError, "512"),
    "own keys": (
        lambda m: m.tensors.__setitem__("blk.0.attn_k.weight", Tensor((64, HIDDEN), "F32")),
        UnexpectedTensorError,
        "attn_k",
    ),
    "per-layer inputs": (set_key("embedding_length_per_layer_input", 256), MetadataError, "per-layer"),
    "a missing layer": (set_key("block_count", 5), MetadataError, "block_count"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "error", "word"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_drafters(read: Read, edit: Callable[[Model], object], error: type[Gemma4Error], word: str) -> None:
    with pytest.raises(error, match=word):
        read(edited(edit))


def resized(change: str) -> Model:
    """A drafter made for a target that differs in one thing."""
    head_dim, kv_heads = (64, 128), (2, 1)
    sizes: dict[str, Any] = {
        "vocabulary": {"vocab": 384},
        "hidden size": {"hidden": 512},
        "head size of sliding layers": {"head_dim": (32, head_dim[1])},
        "head size of full layers": {"head_dim": (head_dim[0], 64)},
        "window": {"window": 32},
        "none": {"kv_heads": kv_heads},
    }
    return drafter_for(gemma4(**sizes[change]))


MISMATCHES: dict[str, tuple[Model, str, str]] = {
    "vocabulary": (resized("vocabulary"), "token_embd.weight", "found 384, expected 320, the vocabulary size"),
    "hidden size": (resized("hidden size"), GEMMA4 + "embedding_length_out", "found 512, expected 256, the hidden"),
    "sliding heads": (
        resized("head size of sliding layers"), GEMMA4 + "attention.key_length_swa", "found 32, expected 64"
    ),
    "full heads": (resized("head size of full layers"), GEMMA4 + "attention.key_length", "found 64, expected 128"),
    "window": (resized("window"), GEMMA4 + "attention.sliding_window", "found 32, expected 16, the window"),
    "base": (
        edited(set_key("rope.freq_base_swa", 2e4)), GEMMA4 + "rope.freq_base_swa", "found 20000.0, expected 10000.0"
    ),
    "factors": (
        edited(lambda m: m.values.__setitem__("rope_freqs.weight", np.full(64, 2, np.float32))),
        "rope_freqs.weight",
        "found other factors",
    ),
    "query heads": (
        drafter_for(gemma4(), heads=5), GEMMA4 + "attention.head_count", "found 5, expected a multiple of 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "field", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_wrong_pairs(tmp_path: Path, target: Gemma4, model: Model, field: str, message: str) -> None:
    path = model.write(tmp_path / "drafter.gguf")
    with pytest.raises(DrafterMismatchError, match=message) as caught:
        Drafter.from_gguf(path, target)
    assert (caught.value.path, caught.value.field) == (path, field)


def test_another_vocabulary_of_the_same_size(read: Read, target: Gemma4) -> None:
    config, _ = read(drafter_for(gemma4()))
    tokens = [f"t{i}" for i in range(320)]
    check_pair(config, {"tokenizer.ggml.tokens": tokens}, target.config, {"tokenizer.ggml.tokens": list(tokens)})
    other = [*tokens[:7], "x", *tokens[8:]]
    with pytest.raises(DrafterMismatchError, match="found 'x', expected 't7', token 7 of the target"):
        check_pair(config, {"tokenizer.ggml.tokens": other}, target.config, {"tokenizer.ggml.tokens": tokens})


def test_a_target_without_layers_of_a_kind(read: Read, target: Gemma4) -> None:
    config, _ = read(drafter_for(gemma4()))
    sliding_only = target.config.model_copy(update={"layers": target.config.layers[:1]})
    with pytest.raises(DrafterMismatchError, match="found full layers"):
        check_pair(config, {}, sliding_only, {})


def test_files_in_the_wrong_place(tmp_path: Path, target: Gemma4) -> None:
    drafter = drafter_for(gemma4()).write(tmp_path / "drafter.gguf")
    with pytest.raises(UnsupportedArchitectureError, match="drafter for speculative decoding"):
        Gemma4.from_gguf(drafter, device="cpu")
    with pytest.raises(UnsupportedArchitectureError, match="found 'gemma4', expected a drafter"):
        Drafter.from_gguf(gemma4().write(tmp_path / "model.gguf"), target)
    gemma_3 = Gemma4.from_gguf(gemma3().write(tmp_path / "gemma3.gguf"), device="cpu")
    with pytest.raises(DrafterMismatchError, match="expected a drafter of gemma3"):
        Drafter.from_gguf(drafter, gemma_3)


def test_a_drafter_serves_the_model_it_was_loaded_with(tmp_path: Path, target: Gemma4) -> None:
    drafter = Drafter.from_gguf(drafter_for(gemma4(), kind="Q8_0").write(tmp_path / "drafter.gguf"), target)
    assert not any(parameter.is_meta for parameter in drafter.model.parameters())
    twin = Gemma4.from_gguf(gemma4().write(tmp_path / "twin.gguf"), device="cpu")
    with pytest.raises(DrafterMismatchError, match="another model"):
        twin.stream_ids([1, 2, 3], 4, draft=drafter)
    assert twin.last_speculation is None
    as_draft: Draft = drafter
    as_draft.check_target(target.model)


def test_inspect(tmp_path: Path) -> None:
    report = inspect_file(drafter_for(gemma4(), kind="Q8_0").write(tmp_path / "drafter.gguf"))
    assert report.unsupported is None
    assert isinstance(report.config, DrafterConfig)
    assert report.plan is not None
    assert report.to_json()["config"]["backbone_hidden_size"] == 256
    console = Console(width=132, file=io.StringIO())
    print_report(console, report)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for expected in (
        "drafts for         a gemma4 model of hidden size 256, with which it is loaded",
        "3 (window 16): 8 heads, 1 KV heads, head size 64, 3 read the target's KV",
        "fused gate+up on 0 of 4 MLP layers (4 left: 4 Q8_0+Q8_0)",
    ):
        assert expected in text, text


GOLDEN: dict[str, tuple[Callable[[], Model], int]] = {
    "0": (gemma4, 12),
    "1": (SHRUNKEN["E2B"], 12),
    "2": (gemma4, 100),  # beyond the window
}


@pytest.mark.parametrize("case", GOLDEN)
@torch.inference_mode()
def test_guesses_equal_transformers(tmp_path: Path, data_dir: Path, case: str) -> None:
    make, length = GOLDEN[case]
    model = Gemma4.from_gguf(make().write(tmp_path / "model.gguf"), device="cpu", dequantize=True)
    drafter = Drafter.from_gguf(drafter_for(make()).write(tmp_path / "drafter.gguf"), model)
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    golden = np.load(data_dir / "drafter-transformers.npz")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = drafter.model.register_forward_hook(lambda _, __, output: seen.append(output))
    model.generate_ids(ids, 2, draft=drafter, num_draft_tokens=3)
    hook.remove()
    for (logits, hidden), expected, expected_hidden in zip(
        seen, golden[f"{case}-logits"], golden[f"{case}-hidden"], strict=True
    ):
        torch.testing.assert_close(logits[0], torch.from_numpy(expected), rtol=0, atol=1e-4)
        torch.testing.assert_close(hidden[0], torch.from_numpy(expected_hidden), rtol=0, atol=1e-4)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma4()
    model.metadata |= vocabulary()
    target = str(model.write(tmp_path / "model.gguf"))
    drafter = str(drafter_for(model).write(tmp_path / "drafter.gguf"))

    def generate(*options: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as done:
            main(["generate", target, "-p", "the sea", "-n", "6", "--temperature", "0", "--device", "cpu", *options])
        assert done.value.code == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    plain, _ = generate()
    drafted, summary = generate("--draft", drafter, "--stats")
    assert drafted == plain
    assert "drafter synthetic drafter (gemma4-assistant): 1 M parameters" in summary
    assert re.search(r"; \d+ of \d+ drafts accepted \(\d+ %\) in \d+ rounds; ", summary)
    result = json.loads(generate("--draft", drafter, "--num-draft-tokens", "2", "--json")[0])
    assert result["text"] == plain.removesuffix("\n")
    assert result["acceptance_rate"] == result["accepted"] / result["drafted"]
    typed = io.TextIOWrapper(io.BytesIO(b"the sea\n/reset\nthe land\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    chats: list[Conversation] = []
    answer = Conversation.answer
    monkeypatch.setattr(Conversation, "answer", lambda chat, *args: (chats.append(chat), answer(chat, *args))[1])
    with pytest.raises(SystemExit) as ended:
        main(["chat", target, "-n", "6", "--device", "cpu", "--max-seq-len", "512", "--draft", drafter])
    assert ended.value.code == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"\d+ of \d+ drafts accepted \(\d+ %\) in \d+ rounds", last)
    of_last = chats[0].run.model.last_speculation
    assert len(chats) == 2
    assert of_last is not None
    assert 0 < of_last.drafted < chats[0].drafts.drafted
    other = str(drafter_for(gemma4(hidden=512)).write(tmp_path / "other.gguf"))
    monkeypatch.setattr(Gemma4, "from_gguf", lambda *_, **__: pytest.fail("loaded before its drafter was refused"))
    with pytest.raises(SystemExit) as refused:
        main(["generate", target, "-p", "a", "--device", "cpu", "--draft", other])
    assert refused.value.code == 3
    assert "error [drafter_mismatch]: " in capsys.readouterr().err
