"""Passes of a few tokens, which are written before they attend, and the forms of row that attention returns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import HeadTransform, KVCache
from gemma4.generate import prefill
from gemma4.kernels.activations import dequantize_activations
from gemma4.rows import DenseRows, PackedRows, RowMaker


@pytest.fixture(scope="module")
def model(unpacked: Callable[[str], Path]) -> Gemma4:
    return Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("max_seq_len", [16, 17, 22, 23, 60])
def test_few_tokens_in_rings_of_every_size(model: Gemma4, data_dir: Path, max_seq_len: int) -> None:
    """The window is 16: with less than 23 slots eight tokens would overwrite keys that the first of them needs."""
    ids = np.load(data_dir / "dense-f32.npz")["tokens"].tolist()[:max_seq_len]
    cache, start, logits = KVCache(model.config, max_seq_len, torch.float32), 0, []
    for size in cycle((1, 8, 3, 8, 2)):
        logits.append(prefill(model.model, cache, ids[start : start + size], start, all_logits=True))
        start += size
        if start >= len(ids):
            break
    torch.testing.assert_close(torch.cat(logits), model.logits(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2], ids=["sliding", "tied"])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_packed_rows_are_dense_rows(model: Gemma4, layer: int, tokens: int) -> None:
    config, norm = model.config.layers[layer], torch.ones(model.config.layers[layer].head_dim)
    heads = HeadTransform(norm, norm, torch.zeros(config.head_dim // 2), 1e-6, True)
    q = torch.randn(tokens, config.num_attention_heads * config.head_dim)
    k, v = torch.randn(2, tokens, config.num_key_value_heads * config.head_dim)

    def rows(make: RowMaker) -> tuple[Tensor, ...]:
        cache = KVCache(model.config, 60, torch.float32).layers[layer]
        return cache.attend(q, k, None if config.k_eq_v else v, heads, torch.arange(tokens), 1.0, make)

    (dense,) = rows(DenseRows(torch.float32))
    xq, xs, _ = rows(PackedRows())
    assert dense.shape == q.shape
    torch.testing.assert_close(dequantize_activations(xq, xs), dense, rtol=0, atol=1e-3)
