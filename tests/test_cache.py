"""Passes of a few tokens, which are written before they attend, and the forms of row that attention returns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from gemma4 import Gemma4
from gemma4.cache import HeadTransform, KVCache, last_of_each_slot
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


@pytest.mark.parametrize("tokens", [1, 23, 24, 25, 31, 32])
@pytest.mark.parametrize("start", [0, 1, 37])
def test_chunks_longer_than_a_ring(model: Gemma4, data_dir: Path, start: int, tokens: int) -> None:
    """The window is 16, a ring 24 and a chunk 32: what follows a chunk sees the last of it and what was before."""
    ids = (np.load(data_dir / "dense-f32.npz")["tokens"].tolist() * 2)[: start + tokens + 34]
    cache, done, logits = KVCache(model.config, 120, torch.float32), 0, []
    assert {layer.k.shape[2] for layer in cache.own.values() if layer.window} == {24}
    for size in (start, tokens, 1, 9, 24):
        if size:
            logits.append(prefill(model.model, cache, ids[done : done + size], done, all_logits=True))
        done += size
    roomy = Gemma4(model.model, model.plan, model.metadata, path=model.path, max_seq_len=120)
    torch.testing.assert_close(torch.cat(logits), roomy.logits(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 23, 24, 25, 31, 32])
@pytest.mark.parametrize("start", [0, 7])
def test_what_a_ring_takes_of_a_chunk(start: int, tokens: int) -> None:
    """The same where the number of tokens is known and where it is open, as in an exported program."""
    positions = torch.arange(start, start + tokens)
    example = torch.arange(30), torch.zeros(24, dtype=torch.int64)
    program = export(RingWriter(), example, dynamic_shapes=({0: Dim("tokens", min=1, max=32)}, None))
    expected = torch.zeros(24, dtype=torch.int64)
    for position in positions.tolist():
        expected[position % 24] = position
    for write in (RingWriter(), program.module()):
        assert torch.equal(write(positions, torch.zeros(24, dtype=torch.int64)), expected)


class RingWriter(nn.Module):
    def forward(self, positions: Tensor, ring: Tensor) -> Tensor:
        kept = last_of_each_slot(positions, 24)
        return ring.index_copy(0, positions[kept] % 24, positions[kept])


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
