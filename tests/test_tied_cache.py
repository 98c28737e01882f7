"""Full layers whose values are their keys: one tensor of rows against the plain cache of two tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import KVCache, LayerCache, TiedCache
from gemma4.config import Gemma4Config, LayerKind
from gemma4.generate import prefill
from gemma4.kernels.rope_cache import rms_norm, rotate
from gemma4.quant.gguf_file import GGUFFile
from gemma4.rope import inverse_frequencies, tied_dims
from gemma4.rows import DenseRows
from tests.tiny_gguf import GEMMA4_31B, gemma4, q4_k_m

Plain = Callable[[], None]


@pytest.fixture(scope="module")
def model(unpacked: Callable[[str], Path]) -> Gemma4:
    return Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu", dtype=torch.float32)


@pytest.fixture
def ids(data_dir: Path) -> list[int]:
    tokens: list[int] = np.load(data_dir / "dense-f32.npz")["tokens"].tolist()
    return tokens


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    """Makes caches keep two tensors from now on."""
    return lambda: monkeypatch.setattr("gemma4.cache.tied_dims", lambda *_: 0)


def in_chunks(model: Gemma4, ids: Sequence[int], size: int) -> tuple[KVCache, Tensor]:
    cache = KVCache(model.config, len(ids), model.model.dtype, model.device)
    chunks = [prefill(model.model, cache, ids[i : i + size], i, all_logits=True) for i in range(0, len(ids), size)]
    return cache, torch.cat(chunks)


def kinds(cache: KVCache) -> set[type]:
    return {type(cache.own[i]) for i in (2, 5)}


@pytest.mark.parametrize("size", [100, 20, 8])
def test_golden_logits_equal_those_of_two_tensors(model: Gemma4, ids: list[int], plain: Plain, size: int) -> None:
    one, tied = in_chunks(model, ids, size)
    plain()
    two, separate = in_chunks(model, ids, size)
    assert kinds(one) == {TiedCache}
    assert kinds(two) == {LayerCache}
    torch.testing.assert_close(tied, separate, rtol=0, atol=1e-5)


def test_bfloat16_is_as_near_to_float32(
    unpacked: Callable[[str], Path], model: Gemma4, ids: list[int], plain: Plain
) -> None:
    half = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu", dtype=torch.bfloat16)
    exact = model.logits(ids).log_softmax(-1)

    def divergence() -> float:
        return float((exact.exp() * (exact - half.logits(ids).log_softmax(-1))).sum(-1).mean())

    tied = divergence()
    plain()
    assert tied < 1.2 * divergence()


def test_bytes(model: Gemma4, plain: Plain) -> None:
    tied = KVCache(model.config, 60, torch.bfloat16).nbytes
    plain()
    separate = KVCache(model.config, 60, torch.bfloat16).nbytes
    assert separate - tied == 2 * 60 * (64 - 40) * 2  # two full layers, heads of 32 of which 8 turn


def test_positions_move_back(model: Gemma4, ids: list[int]) -> None:
    """Tokens that were tried and rejected leave nothing that later ones see."""
    cache = KVCache(model.config, 60, torch.float32)
    prefill(model.model, cache, ids[:50])
    prefill(model.model, cache, ids[:8], 50)
    again = prefill(model.model, cache, ids[50:58], 50, all_logits=True)
    torch.testing.assert_close(again, in_chunks(model, ids[:58], 58)[1][50:], rtol=0, atol=1e-4)


def test_other_queries_read_it_like_two_tensors(model: Gemma4, ids: list[int], plain: Plain) -> None:
    one, _ = in_chunks(model, ids[:40], 40)
    plain()
    two, _ = in_chunks(model, ids[:40], 40)
    q_weight, k_weight = (model.model.get_parameter(f"layers.2.self_attn.{x}_norm.weight") for x in "qk")
    input_pos = torch.tensor([38, 39])
    frequencies = torch.tensor(inverse_frequencies(model.config, model.config.layers[2]))
    heads = rms_norm(torch.randn(4, 2, 32), q_weight, 1e-6)
    queries = rotate(heads, input_pos, frequencies)[None]
    tied, separate = (
        cache.own[2].read(queries, k_weight, input_pos, 1.0, 0, DenseRows(torch.float32))[0] for cache in (one, two)
    )
    torch.testing.assert_close(tied, separate, rtol=0, atol=1e-5)


def full_layer_dims(config: Gemma4Config) -> set[int]:
    return {tied_dims(config, layer) for layer in config.layers if layer.kind is LayerKind.FULL}


def test_layers_that_hold_one_tensor(
    model: Gemma4, unpacked: Callable[[str], Path], real_gguf: Path, tmp_path: Path
) -> None:
    sliding = {tied_dims(model.config, layer) for layer in model.config.layers if layer.kind is LayerKind.SLIDING}
    assert sliding == {0}
    assert full_layer_dims(model.config) == {8}
    with GGUFFile.open(unpacked("e2b-f32.gguf")) as file:
        assert full_layer_dims(Gemma4Config.from_gguf(file)) == {0}  # values have a projection of their own
    with GGUFFile.open(real_gguf) as file:
        assert full_layer_dims(Gemma4Config.from_gguf(file)) == {0}
    path = gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B)).write_sparse(tmp_path / "31b.gguf")
    with GGUFFile.open(path) as file:
        config = Gemma4Config.from_gguf(file)
    assert full_layer_dims(config) == {128}
    # 640 instead of 1024 numbers a head and token: 6.6 GB of 10.4 GB at 127K.
    cache = KVCache(config, 126_976, torch.bfloat16, "meta")
    full = [tied for tied in cache.own.values() if isinstance(tied, TiedCache)]
    assert sum(tied.kv.nbytes for tied in full) == 126_976 * 10 * 4 * 640 * 2


@pytest.mark.parametrize("factors", [(1.0,) * 16, (1e30,) * 4 + (1.0,) * 12, (1.0,) * 2 + (1e30,) * 14])
def test_other_rotations_keep_two_tensors(model: Gemma4, factors: tuple[float, ...]) -> None:
    config = model.config.model_copy(update={"rope_freq_factors": factors})
    assert full_layer_dims(config) == {0}
