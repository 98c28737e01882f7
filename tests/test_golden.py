"""The model against llama.cpp's and transformers' logits of a small random Gemma 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.generate import prefill


@pytest.fixture(scope="module")
def model(unpacked: Callable[[str], Path]) -> Gemma4:
    return Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu", dtype=torch.float32)


def golden(data_dir: Path, name: str) -> tuple[list[int], Tensor]:
    file = np.load(data_dir / name)
    return file["tokens"].tolist(), torch.from_numpy(file["logits"])


def in_chunks(model: Gemma4, ids: Sequence[int], size: int) -> Tensor:
    cache = KVCache(model.config, len(ids), model.model.dtype, model.device)
    chunks = [prefill(model.model, cache, ids[i : i + size], i, all_logits=True) for i in range(0, len(ids), size)]
    return torch.cat(chunks)


@pytest.mark.parametrize("size", [100, 33, 17, 7, 1])
@pytest.mark.parametrize("name", ["e2b", "moe"])
def test_the_family_equals_llama_cpp_with_float32_gelu(
    unpacked: Callable[[str], Path], data_dir: Path, name: str, size: int
) -> None:
    model = Gemma4.from_gguf(unpacked(f"{name}-f32.gguf"), device="cpu", dtype=torch.float32)
    ids, expected = golden(data_dir, f"{name}-f32-gelu32.npz")
    torch.testing.assert_close(in_chunks(model, ids, size), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [100, 33, 32, 17, 16, 7, 1])
def test_logits_equal_llama_cpp_with_float32_gelu(model: Gemma4, data_dir: Path, size: int) -> None:
    ids, expected = golden(data_dir, "dense-f32-gelu32.npz")
    torch.testing.assert_close(in_chunks(model, ids, size), expected, rtol=0, atol=1e-4)


def test_logits_in_one_call(model: Gemma4, data_dir: Path) -> None:
    ids, expected = golden(data_dir, "dense-f32-gelu32.npz")
    torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=1e-4)


def test_logits_equal_transformers(model: Gemma4, data_dir: Path) -> None:
    ids, expected = golden(data_dir, "dense-f32-transformers.npz")
    torch.testing.assert_close(model.logits(ids), expected, rtol=0, atol=1e-4)


def test_logits_near_stock_llama_cpp(model: Gemma4, data_dir: Path) -> None:
    ids, expected = golden(data_dir, "dense-f32.npz")
    difference = (model.logits(ids) - expected).abs()
    assert difference.max() < 6e-3  # the half-precision GELU table of stock builds
    assert difference.mean() < 1.2e-3


def test_bfloat16_follows_float32(unpacked: Callable[[str], Path], model: Gemma4, data_dir: Path) -> None:
    ids, _ = golden(data_dir, "dense-f32.npz")
    half = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu", dtype=torch.bfloat16)
    exact = model.logits(ids).log_softmax(-1)
    divergence = (exact.exp() * (exact - half.logits(ids).log_softmax(-1))).sum(-1)
    assert divergence.mean() < 2e-3


def test_generations_do_not_touch_each_other(model: Gemma4, data_dir: Path) -> None:
    ids, _ = golden(data_dir, "dense-f32.npz")
    first = KVCache(model.config, 60, torch.float32)
    second = KVCache(model.config, 60, torch.float32)
    alone = prefill(model.model, KVCache(model.config, 60, torch.float32), ids[:50], all_logits=True)
    interleaved = []
    for i in range(0, 50, 10):
        interleaved.append(prefill(model.model, first, ids[i : i + 10], i, all_logits=True))
        prefill(model.model, second, ids[50 - i - 10 : 50 - i], i)
    torch.testing.assert_close(torch.cat(interleaved), alone, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [100, 7, 1])
def test_logits_on_a_gpu(unpacked: Callable[[str], Path], data_dir: Path, size: int) -> None:
    model = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cuda", dtype=torch.float32)
    ids, expected = golden(data_dir, "dense-f32-gelu32.npz")
    torch.testing.assert_close(in_chunks(model, ids, size).cpu(), expected, rtol=0, atol=1e-3)
