"""`kv_cache="turboquant"` on whole models: the real Gemma 3 270M, and small models of every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.needle import NEEDLE, digit_ids, divergence, haystack, numbers, read, row, runs, score
from gemma4 import Gemma4, turboquant_cache
from gemma4.cache import HeadTransform, KVCache, LayerCache, OwnCache, SharedCache
from gemma4.config import CacheKind, LayerConfig, LayerKind
from gemma4.generate import prefill
from gemma4.kernels.tq4_sdpa import tq4_sdpa
from gemma4.quant.errors import UnsupportedFeatureError
from gemma4.rows import DenseRows
from gemma4.turboquant_cache import TurboQuantCache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(real_gguf: Path) -> dict[CacheKind, Gemma4]:
    """One set of weights, read with each kind of cache."""
    first = Gemma4.from_gguf(real_gguf, device="cpu", dequantize=True)
    return {
        kind: Gemma4(first.model, first.plan, first.metadata, path=first.path, max_seq_len=4096, kv_cache=kind)
        for kind in CacheKind
    }


def test_distribution_over_a_passage(models: dict[CacheKind, Gemma4], data_dir: Path) -> None:
    ids = json.loads((data_dir / "gemma3-270m.json").read_text())["forced"]["ids"]
    exact = models[CacheKind.LOSSLESS].logits(ids).log_softmax(-1)
    found = models[CacheKind.TURBOQUANT].logits(ids).log_softmax(-1)
    assert 0 < (exact.exp() * (exact - found)).sum(-1).mean() <= 0.002


@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 1])
def test_a_haystack_tells_the_number_at_its_depth(models: dict[CacheKind, Gemma4], depth: float) -> None:
    tokenizer = models[CacheKind.LOSSLESS].tokenizer
    ids = haystack(tokenizer.encode, 1000, depth)
    assert len(ids) == 1000
    assert ids[0] == tokenizer.encode("")[0]
    assert ids.count(ids[0]) == 1
    text = tokenizer.decode(ids[1:])
    told = f"The secret number of the lighthouse is {NEEDLE}. Remember it."
    question = " What is the secret number of the lighthouse? The secret number of the lighthouse is "
    assert text.count(told) == text.count(NEEDLE) == 1
    assert text.endswith(question)
    assert text.index(told) / (len(text) - len(told) - len(question)) == pytest.approx(depth, abs=0.02)


def test_scores_of_what_was_read() -> None:
    """Seven positions before the last decide; the last tells what comes behind the number."""
    probabilities = torch.full((10, 20), 0.4 / 19)
    for position, (token, p) in enumerate([(3, 0.6)] * 2 + [(5, 0.6)] * 5 + [(0, 0.6)] * 3):
        probabilities[position, token] = p
    digits, told = score(probabilities.log(), [5] * 7)
    assert digits == 5
    assert [math.exp(x) for x in told] == pytest.approx([0.6] * 5 + [0.4 / 19] * 2)


def test_divergence_of_distributions() -> None:
    exact, found = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    expected = (0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2
    assert divergence(exact.log(), found.log()) == pytest.approx(expected)
    assert divergence(found.log(), found.log()) == 0


def test_joined_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="73: found 1 tokens, expected one a digit"):
        digit_ids(lambda text: [2, 100], "73")


def test_needle_beyond_the_sliding_window(models: dict[CacheKind, Gemma4]) -> None:
    """Only full layers reach back to the number; `python -m benchmarks.needle` looks in longer haystacks."""
    model = models[CacheKind.LOSSLESS]
    digits = digit_ids(model.tokenizer.encode)
    ids = haystack(model.tokenizer.encode, 580, 0.05) + digits
    kinds = CacheKind.LOSSLESS, CacheKind.TURBOQUANT
    (lossless, p), (turboquant, q) = (score(read(model.model, ids, kind, 8), digits) for kind in kinds)
    assert lossless == turboquant == len(NEEDLE)
    assert sum(q) == pytest.approx(sum(p), abs=0.05 * len(NEEDLE))


def test_runs_of_the_benchmark_come_one_by_one(models: dict[CacheKind, Gemma4]) -> None:
    found = list(runs(models[CacheKind.LOSSLESS], [64], [0.5], [CacheKind.TURBOQUANT, CacheKind.LOSSLESS]))
    assert [run.kv_cache for run in found] == [CacheKind.LOSSLESS, CacheKind.TURBOQUANT]
    assert [run.digits for run in found] == [len(NEEDLE)] * 2
    assert math.prod(found[0].digit_p) == pytest.approx(found[0].p ** len(NEEDLE))
    assert found[0].kl is None
    assert found[1].kl is not None
    assert 0 < found[1].kl < 0.02
    assert row(found[:1]).startswith(f"| 64 | 0.5 | lossless | 1 of 1 | 7 of 7 | {found[0].p:.4f} | - |")


def test_numbers_of_the_benchmark() -> None:
    assert numbers(1) == [NEEDLE]
    assert len(set(numbers(10))) == 10
    assert {len(number) for number in numbers(10)} == {7}


def test_unknown_kind_is_refused(real_gguf: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache: found 'fp8', expected lossless, turboquant, turboquant-4bit"):
        Gemma4.from_gguf(real_gguf, device="cpu", kv_cache="fp8")


def test_heads_too_small_are_refused(unpacked: Callable[[str], Path]) -> None:
    model = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu", kv_cache="turboquant")
    with pytest.raises(UnsupportedFeatureError, match=r"found heads of 32, .* powers of two from 64 on"):
        model.logits([1, 2, 3])


def test_only_full_layers_are_coded(models: dict[CacheKind, Gemma4]) -> None:
    config = models[CacheKind.LOSSLESS].config
    for kind in (CacheKind.TURBOQUANT, CacheKind.TURBOQUANT_4BIT):
        cache = KVCache(config, 100, torch.float32, kind=kind)
        for i, layer in cache.own.items():
            assert isinstance(layer, TurboQuantCache) == (config.layers[i].kind is LayerKind.FULL)
    exact = KVCache(config, 100, torch.bfloat16).own[5].tensors()
    coded = KVCache(config, 100, torch.bfloat16, kind=CacheKind.TURBOQUANT).own[5].tensors()
    assert sum(x.nbytes for x in exact.values()) == 100 * 2 * 256 * 2
    assert sum(x.nbytes for x in coded.values()) == 100 * 2 * (256 * 6 // 8 + 4) + 4 * 256


def test_generation_goes_on_from_a_shared_prefix(models: dict[CacheKind, Gemma4]) -> None:
    model = models[CacheKind.TURBOQUANT]
    ids = model.tokenizer.encode("The capital of France is")
    model.forget()
    first = model.generate_ids(ids, 6, eog_ids=frozenset())
    longer = model.generate_ids(ids + first[:3], 3, eog_ids=frozenset())
    assert longer == first[3:]


# One layer, on random projections.

SIZES = {"kind": LayerKind.FULL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1}
TIED = LayerConfig(**SIZES, head_dim=256, k_eq_v=True, kv_source=None)
SEPARATE = LayerConfig(**SIZES, head_dim=128, k_eq_v=False, kv_source=None)
SCALE = 0.07


def projections(layer: LayerConfig, tokens: int) -> tuple[Tensor, Tensor, Tensor | None, HeadTransform]:
    """Raw q, k and v rows, and what turns them into heads; in a tied layer a quarter of the dimensions turns."""
    generator = torch.Generator().manual_seed(tokens)
    dim = layer.head_dim
    q = torch.randn(tokens, layer.num_attention_heads * dim, generator=generator)
    k, v = (torch.randn(tokens, layer.num_key_value_heads * dim, generator=generator) for _ in range(2))
    weights = torch.rand(2, dim, generator=generator) + 0.5
    inv_freq = 100.0 ** -torch.linspace(0, 1, dim // 2)
    if layer.k_eq_v:
        inv_freq[dim // 8 :] = 0
    return q, k, None if layer.k_eq_v else v, HeadTransform(weights[0], weights[1], inv_freq, 1e-6, True)


def attended(cache: OwnCache, layer: LayerConfig, tokens: int, chunk: int) -> Tensor:
    q, k, v, heads = projections(layer, tokens)
    make = DenseRows(torch.float32)
    parts = []
    for i in range(0, tokens, chunk):
        part = slice(i, min(i + chunk, tokens))
        input_pos = torch.arange(part.start, part.stop)
        rows = cache.attend(q[part], k[part], None if v is None else v[part], heads, input_pos, SCALE, make)
        cache.commit(input_pos)
        parts.append(rows[0])
    return torch.cat(parts)


@pytest.mark.parametrize("layer", [TIED, SEPARATE], ids=["tied", "separate"])
def test_chunks_and_single_tokens_agree(layer: LayerConfig) -> None:
    """A chunk sees its own keys as later tokens will: the sizes of chunks change nothing."""
    tied = layer.head_dim // 4 if layer.k_eq_v else 0
    whole, pieces, steps = (
        attended(TurboQuantCache(layer, 40, tied, 6, torch.device("cpu")), layer, 33, chunk) for chunk in (33, 10, 1)
    )
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


def test_a_prompt_reads_the_slots_it_reaches(models: dict[CacheKind, Gemma4], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models[CacheKind.TURBOQUANT].model
    cache = KVCache(model.config, 600, torch.float32, kind=CacheKind.TURBOQUANT)
    lengths: list[int] = []

    def attend(q: Tensor, k_codes: Tensor, *rest: Tensor) -> Tensor:
        lengths.append(k_codes.shape[2])
        out: Tensor = tq4_sdpa(q, k_codes, *rest)
        return out

    monkeypatch.setattr(turboquant_cache, "tq4_sdpa", attend)
    ids = list(range(300))
    with torch.inference_mode():
        prefill(model, cache, ids[:128])
        few = prefill(model, cache, ids[128:], 128)
        assert set(lengths[: len(lengths) // 2]) == {128}
        assert set(lengths[len(lengths) // 2 :]) == {384}
        positions = torch.arange(128, 300)
        all_slots = model(torch.tensor(ids[128:]), positions, cache, 1)
    assert lengths[-1] == 600
    assert torch.equal(few, all_slots)
    with pytest.raises(RuntimeError, match="of a pass"), cache.up_to(5):
        raise RuntimeError("of a pass")
    assert {layer.end for layer in cache.own.values() if isinstance(layer, TurboQuantCache)} == {600}


@pytest.mark.parametrize(("bits", "least"), [(6, 0.999), (4, 0.985)])
@pytest.mark.parametrize("layer", [TIED, SEPARATE], ids=["tied", "separate"])
def test_close_to_the_lossless_cache(layer: LayerConfig, bits: int, least: float) -> None:
    tied = layer.head_dim // 4 if layer.k_eq_v else 0
    cache = TurboQuantCache(layer, 200, tied, bits, torch.device("cpu"))
    assert cache.k_codes.shape[-1] == (tied or layer.head_dim) * bits // 8
    exact = attended(LayerCache(layer, 200, 0, torch.float32, torch.device("cpu")), layer, 200, 200)
    found = attended(cache, layer, 200, 200)
    assert torch.cosine_similarity(found, exact, dim=-1).mean() >= least


def test_other_layers_read_it() -> None:
    """Layers without keys of their own see what a layer of their own would."""
    cache = TurboQuantCache(SEPARATE, 40, 0, 6, torch.device("cpu"))
    own = attended(cache, SEPARATE, 33, 33)
    q, _, _, heads = projections(SEPARATE, 33)
    rows = SharedCache(cache).attend(
        q, None, None, heads._replace(k_weight=None), torch.arange(33), SCALE, DenseRows(torch.float32)
    )
    torch.testing.assert_close(rows[0], own, rtol=1e-4, atol=1e-5)
