"""The real Gemma 3 270M checkpoint against llama.cpp's record of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4 import Gemma4


@pytest.fixture(scope="module")
def record(data_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((data_dir / "gemma3-270m.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def packed(real_gguf: Path) -> Gemma4:
    return Gemma4.from_gguf(real_gguf, device="cpu")


@pytest.fixture(scope="module")
def dense(real_gguf: Path) -> Gemma4:
    return Gemma4.from_gguf(real_gguf, device="cpu", dequantize=True)


def test_distribution_over_a_passage(packed: Gemma4, record: dict[str, Any]) -> None:
    forced = record["forced"]
    log_probs = packed.logits(forced["ids"]).log_softmax(-1)
    top_ids, top = torch.tensor(forced["top_ids"]), torch.tensor(forced["top_logprobs"])
    # The record holds the 8 likeliest tokens; all others are one more outcome.
    ours = log_probs.gather(1, top_ids)
    rest, our_rest = ((1 - x.double().exp().sum(1)).clamp_min(1e-12) for x in (top, ours))
    divergence = (top.exp() * (top - ours)).sum(1) + rest * (rest / our_rest).log()
    assert divergence.mean() <= 0.01
    assert (log_probs.argmax(-1) == top_ids[:, 0]).float().mean() >= 0.95
    assert packed.tokenizer.encode(forced["text"]) == forced["ids"]


def test_greedy_ids_where_the_margin_is_clear(dense: Gemma4, record: dict[str, Any]) -> None:
    for case in record["greedy"]:
        expected, margins = case["greedy_ids"], case["top1_margin"]
        # Teacher-forced, so that one close call does not end the comparison.
        ids = case["prompt_ids"] + expected[:-1]
        found = dense.logits(ids).argmax(-1)[len(case["prompt_ids"]) - 1 :].tolist()
        wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b and margins[i] > 0.25]
        assert not wrong, f"{case['prompt']!r} differs at {wrong}"
        clear = next((i for i, margin in enumerate(margins[:16]) if margin <= 0.25), 16)
        assert dense.generate_ids(case["prompt_ids"], clear, eog_ids=frozenset()) == expected[:clear]


def test_dense_equals_packed(packed: Gemma4, dense: Gemma4, record: dict[str, Any]) -> None:
    ids = record["forced"]["ids"][:24]
    torch.testing.assert_close(dense.logits(ids), packed.logits(ids), rtol=0, atol=1e-3)


def test_text(dense: Gemma4, record: dict[str, Any]) -> None:
    case = record["greedy"][0]
    n = next((i for i, margin in enumerate(case["top1_margin"]) if margin <= 0.25), len(case["greedy_ids"]))
    text = dense.generate(case["prompt"], n, temperature=0.0)
    assert text == dense.tokenizer.decode(case["greedy_ids"][:n])
    assert "".join(dense.generate(case["prompt"], n, temperature=0.0, stream=True)) == text


def test_every_weight_is_the_file_s(packed: Gemma4) -> None:
    from gemma4.quant.gguf_file import GGUFFile

    with GGUFFile.open(packed.path) as file:
        matrices = [t for t in file.tensors.values() if len(t.shape) == 2]
        assert len(matrices) == 127
        for tensor in matrices:
            blocks = packed.weight(tensor.name).to_blocks()
            assert blocks.numpy().tobytes() == bytes(file.data(tensor.name)), tensor.name


def test_packed_checkpoint_is_the_same_model(packed: Gemma4, tmp_path: Path) -> None:
    packed.save_packed(tmp_path / "model.safetensors")
    again = Gemma4.from_packed(tmp_path / "model.safetensors", device="cpu")
    ids = packed.tokenizer.encode("A packed checkpoint is")
    assert again.config == packed.config
    assert again.plan == packed.plan
    assert again.tokenizer.encode("A packed checkpoint is") == ids
    assert torch.equal(again.logits(ids), packed.logits(ids))


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_stays_close_to_float32(real_gguf: Path, record: dict[str, Any]) -> None:
    ids = record["forced"]["ids"]
    exact = Gemma4.from_gguf(real_gguf, device="cuda", dtype=torch.float32).logits(ids).log_softmax(-1)
    found = Gemma4.from_gguf(real_gguf, device="cuda").logits(ids).log_softmax(-1)
    assert (exact.exp() * (exact - found)).sum(-1).mean() <= 1e-3
