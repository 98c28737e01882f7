"""Speculative decoding: the ids of plain decoding whatever the draft, and how many drafts held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.drafter import Drafter
from gemma4.generate import prefill
from gemma4.kernels.activations import quantize_activations
from gemma4.kernels.gelu_mul import gelu_mul
from gemma4.kernels.packed_matvec import MAX_ROWS, MMA_ROWS
from gemma4.model import TextModel
from gemma4.quant.errors import ContextError
from gemma4.ring_snapshot import RingSnapshot
from gemma4.speculate import SpeculativeLoop, TokenByToken
from tests.drafter_gguf import drafter_for
from tests.family_gguf import with_experts, with_per_layer_inputs
from tests.kernels.packed_cases import NAMES, make_rows, make_weight
from tests.tiny_gguf import Model, Sizes, Tensor, gemma4

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = Sizes(4, 256, 512, 8, (2, 1), (32, 64), vocab=128, window=16, context=160, period=2)
SHARED = Sizes(4, 256, 512, 8, (2, 2), (32, 64), vocab=128, window=16, context=160, period=2, k_eq_v=False)
TARGETS: dict[str, Callable[[], Model]] = {
    "31B": lambda: gemma4(SIZES, {"matrix": "Q4_K", "ffn_down": "Q6_K"}),
    "E2B": lambda: with_per_layer_inputs(SHARED, 2, 256, keeps_unused=False),
    "26B-A4B": lambda: with_experts(SIZES, 8, 2, 256, joined=True),
}
PROMPT = list(range(3, 40))
any_target = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Gemma4, Drafter]]:
    """load("31B"): the model and a drafter of random weights, made once. Dense weights: these tests run many steps."""
    folder = tmp_path_factory.mktemp("models")
    loaded: dict[str, tuple[Gemma4, Drafter]] = {}

    def make(name: str) -> tuple[Gemma4, Drafter]:
        if name not in loaded:
            target = TARGETS[name]()
            # The head has every row twice: equal logits everywhere, of which the first must win.
            table = np.random.default_rng(5).standard_normal((64, 256), dtype=np.float32)
            target.tensors["output.weight"] = Tensor((128, 256), "F32")
            target.values["output.weight"] = 0.05 * np.concatenate([table, table])
            model = Gemma4.from_gguf(target.write(folder / f"{name}.gguf"), device="cpu", dequantize=True)
            drafter = drafter_for(target).write(folder / f"{name}-drafter.gguf")
            loaded[name] = model, Drafter.from_gguf(drafter, model)
        return loaded[name]

    return make


class Script:
    """Drafts from a list: id i for position first + i, but another one with probability `error`.

    Its ids are on the model's device, where a round may be captured as a graph.
    """

    def __init__(self, ids: list[int], first: int, error: float, *, vocab: int = 128, device: str = "cpu") -> None:
        rng = np.random.default_rng(1)
        is_wrong = rng.random(len(ids)) < error
        wrong = [(token + 1 + rng.integers(vocab - 1)) % vocab for token in ids]
        drafts = [w if bad else t for t, w, bad in zip(ids, wrong, is_wrong, strict=True)] + [0] * 7
        self.ids = torch.tensor(drafts, device=device)
        self.first = first

    def check_target(self, model: TextModel) -> None:
        pass

    def propose(
        self, token: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, cache: KVCache, count: int
    ) -> torch.Tensor:
        return self.ids.index_select(0, position + 1 - self.first + torch.arange(count, device=position.device))


def acceptance_rate(model: Gemma4) -> float:
    assert model.last_speculation is not None
    rate = model.last_speculation.acceptance_rate
    assert rate is not None
    return rate


@torch.inference_mode()
def few_tokens(model: Gemma4, ids: list[int], split: int, *, joint: bool) -> tuple[torch.Tensor, KVCache]:
    """Logits of ids[split:], run in one pass or one by one after the ids before them, and the cache."""
    text = model.model
    cache = KVCache(model.config, 60, text.dtype)
    prefill(text, cache, ids[:split])
    if not joint:
        return torch.cat([prefill(text, cache, ids[i : i + 1], i) for i in range(split, len(ids))]), cache
    make = text.rows_for(len(ids) - split)
    layers = [TokenByToken(layer) for layer in cache.layers]
    h, y = text.run(torch.tensor(ids[split:]), torch.arange(split, len(ids)), layers, make)
    return text.head(h, y, make)[0], cache


FORMS = [*((name, "dense") for name in TARGETS), ("E2B", "packed"), ("31B", "quantized rows")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_pass_of_few_tokens_has_the_bits_of_single_passes(name: str, form: str, tmp_path: Path) -> None:
    path = TARGETS[name]().write(tmp_path / "model.gguf")
    model = Gemma4.from_gguf(path, device="cpu", dequantize=form == "dense")
    if form == "quantized rows":
        model.model.max_packed_rows = MAX_ROWS
    ids = np.random.default_rng(0).integers(0, 128, 60).tolist()
    most = MMA_ROWS - 1 if form == "quantized rows" else MAX_ROWS
    for split, count in ((20, 2), (46, most)):  # the second crosses the end of a ring of 24
        tokens = ids[: split + count]
        (one, one_cache), (other, other_cache) = (few_tokens(model, tokens, split, joint=j) for j in (False, True))
        assert torch.equal(one, other)
        for i, layer in one_cache.own.items():
            for plane, tensor in layer.tensors().items():
                assert torch.equal(tensor, other_cache.own[i].tensors()[plane])


def test_threads_do_not_tell_rows_apart() -> None:
    gate, up = torch.randn(2, 5, 21504, generator=torch.Generator().manual_seed(0)).unbind()
    torch.set_num_threads(5)
    try:
        single = torch.cat([gelu_mul(*pair) for pair in zip(gate.split(1), up.split(1), strict=True)])
        assert torch.equal(gelu_mul(gate, up), single)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "count"), [("31B", 1), ("31B", 7), ("E2B", 4), ("26B-A4B", 4)])
def test_a_drafter_changes_no_id(load: Callable[[str], tuple[Gemma4, Drafter]], name: str, count: int) -> None:
    model, drafter = load(name)
    plain = model.generate_ids(PROMPT, 20)
    model.forget()
    assert model.generate_ids(PROMPT, 20, draft=drafter, num_draft_tokens=count) == plain
    assert acceptance_rate(model) < 0.3  # its weights are random


def test_a_drafter_changes_no_id_of_a_long_text(tmp_path: Path) -> None:
    """To the end of a context of which the rings hold a tenth."""
    target = gemma4(SIZES, tied=False, layers=2, context=340)
    model = Gemma4.from_gguf(target.write(tmp_path / "model.gguf"), device="cpu", dequantize=True)
    drafter = Drafter.from_gguf(drafter_for(target).write(tmp_path / "drafter.gguf"), model)
    most = 340 - len(PROMPT)
    plain = model.generate_ids(PROMPT, most)
    assert len(plain) > 300
    assert len(set(plain)) > 50
    model.forget()
    assert model.generate_ids(PROMPT, most, draft=drafter) == plain


@pytest.mark.parametrize(("name", "error"), [("31B", 0.0), ("31B", 0.2), ("31B", 1.0), ("E2B", 0.2), ("26B-A4B", 0.2)])
def test_any_draft_changes_no_id(
    load: Callable[[str], tuple[Gemma4, Drafter]], monkeypatch: pytest.MonkeyPatch, name: str, error: float
) -> None:
    """Rounds of every length, over the end of the rings and to the end of the context."""
    model, _ = load(name)
    most = model.max_seq_len - len(PROMPT)
    plain = model.generate_ids(PROMPT, most)
    assert len(set(plain)) > 10
    model.forget()
    new = {0.0: most, 0.2: most if name == "31B" else 60, 1.0: 12}[error]
    script = Script(plain, len(PROMPT), error)
    if error == 0.2:  # a round in several passes, as on a GPU
        monkeypatch.setattr(SpeculativeLoop, "rows_at_once", property(lambda _: 3))
    assert model.generate_ids(PROMPT, new, draft=script, num_draft_tokens=7) == plain[:new]
    stats = model.last_speculation
    assert stats is not None
    if error == 0.0:
        assert stats.accepted == stats.drafted
        assert stats.rounds == -(-(most - 1) // 8)
    elif error == 1.0:
        assert stats.accepted == 0
        assert stats.rounds == new - 1
    else:
        assert 0.2 < acceptance_rate(model) < 0.8


def test_an_end_within_a_round_and_a_next_turn(load: Callable[[str], tuple[Gemma4, Drafter]]) -> None:
    """A generation that ends leaves a cache on which the next one goes on, with or without a draft."""
    model, _ = load("31B")
    plain = model.generate_ids(PROMPT, 40)
    end = next(i for i in range(4, 40) if plain[i] not in plain[:i])  # in the first round of seven drafts
    question = PROMPT + plain[: end + 1] + [7, 8, 9]
    model.forget()
    assert model.generate_ids(PROMPT, 40, eog_ids=frozenset({plain[end]})) == plain[: end + 1]
    answer = model.generate_ids(question, 20)
    script, later = Script(plain, len(PROMPT), 0.0), Script(answer, len(question), 0.4)
    for drafts in ((script, later), (script, None), (None, later)):
        model.forget()
        first, second = drafts
        assert (
            model.generate_ids(PROMPT, 40, eog_ids=frozenset({plain[end]}), draft=first, num_draft_tokens=7)
            == (plain[: end + 1])
        )
        assert model.generate_ids(question, 20, draft=second, num_draft_tokens=3) == answer


def test_the_same_prompt_again(load: Callable[[str], tuple[Gemma4, Drafter]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft goes round the rings; the next generation goes on from the prompt's end, by its copy of them."""
    model, _ = load("E2B")
    plain = model.generate_ids(PROMPT, 30)
    model.forget()
    restored: list[RingSnapshot] = []
    restore = RingSnapshot.restore
    monkeypatch.setattr(RingSnapshot, "restore", lambda snapshot: (restored.append(snapshot), restore(snapshot)))
    script = Script(plain, len(PROMPT), 0.3)
    for draft in (script, script, None):
        assert model.generate_ids(PROMPT, 30, draft=draft, num_draft_tokens=7) == plain
    assert len(restored) == 2


def test_a_quantized_cache(tmp_path: Path) -> None:
    target = gemma4(replace(SIZES, head_dim=(32, 128)))
    path = target.write(tmp_path / "model.gguf")
    model = Gemma4.from_gguf(path, device="cpu", kv_cache="turboquant")
    drafter = Drafter.from_gguf(drafter_for(target).write(tmp_path / "drafter.gguf"), model)
    plain = model.generate_ids(PROMPT, 16)
    for draft in (drafter, Script(plain, len(PROMPT), 0.3)):
        model.forget()
        assert model.generate_ids(PROMPT, 16, draft=draft) == plain


def test_no_room_and_nothing_to_generate(load: Callable[[str], tuple[Gemma4, Drafter]]) -> None:
    model, drafter = load("31B")
    room = model.max_seq_len - len(PROMPT)
    with pytest.raises(ContextError, match="max_seq_len"):
        model.stream_ids(PROMPT, room + 1, draft=drafter)
    assert model.generate_ids(PROMPT, 0, draft=drafter) == []
    assert model.last_speculation is not None
    assert model.last_speculation.acceptance_rate is None


@pytest.mark.parametrize("count", [0, 8])
def test_a_number_of_drafts_that_a_pass_cannot_check(load: Callable[[str], tuple[Gemma4, Drafter]], count: int) -> None:
    model, drafter = load("31B")
    with pytest.raises(ValueError, match=f"num_draft_tokens: found {count}, expected 1 to 7"):
        model.stream_ids(PROMPT, 4, draft=drafter, num_draft_tokens=count)


def test_sampling_keeps_its_distribution(load: Callable[[str], tuple[Gemma4, Drafter]]) -> None:
    """Each id is one of the two likeliest after those before it, and the likelier as often as its probability says."""
    model, _ = load("31B")
    settings = {"temperature": 0.5, "top_k": 2, "top_p": 1.0}
    script = Script(model.generate_ids(PROMPT, 110), len(PROMPT), 0.0)
    ids = model.generate_ids(PROMPT, 100, seed=1, draft=script, num_draft_tokens=2, **settings)
    assert model.last_speculation is not None
    assert model.last_speculation.accepted > 0
    logits, likeliest = model.logits(PROMPT + ids)[len(PROMPT) - 1 : -1].topk(2)
    probability = (logits / 0.5).softmax(-1)[:, 0]
    is_first = likeliest[:, 0] == torch.tensor(ids)
    assert (is_first | (likeliest[:, 1] == torch.tensor(ids))).all()
    excess, variance = (is_first.float() - probability).sum(), (probability * (1 - probability)).sum()
    assert variance > 4
    assert abs(excess) < 4 * variance.sqrt()
    model.forget()
    assert model.generate_ids(PROMPT, 12, seed=1, draft=script, num_draft_tokens=2, **settings) == ids[:12]


@pytest.mark.gpu
@pytest.mark.parametrize("k", [768, 5376, 21504])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_matvec_have_the_same_bits_alone_on_a_gpu(name: str, k: int) -> None:
    weight = make_weight(name, 200, k, "cuda")
    matvec = getattr(torch.ops.gemma4, f"{name}_matvec")
    rows = make_rows(MMA_ROWS - 1, k, torch.bfloat16, "cuda")
    joint = matvec(*quantize_activations(rows), *weight.planes, out_dtype=torch.float32)
    for i in range(len(rows)):
        alone = matvec(*quantize_activations(rows[i : i + 1]), *weight.planes, out_dtype=torch.float32)
        assert torch.equal(joint[i], alone[0])


@pytest.mark.gpu
@any_target
def test_on_a_gpu(tmp_path: Path, name: str) -> None:
    """Rounds as replayed graphs, through the packed kernels."""
    target = TARGETS[name]()
    model = Gemma4.from_gguf(target.write(tmp_path / "model.gguf"), device="cuda", max_seq_len=160)
    drafter = Drafter.from_gguf(drafter_for(target, kind="Q8_0").write(tmp_path / "drafter.gguf"), model)
    most = 160 - len(PROMPT)
    plain = model.generate_ids(PROMPT, most)
    for draft in (drafter, Script(plain, len(PROMPT), 0.2, device="cuda")):
        for count in (2, 4):
            model.forget()
            assert model.generate_ids(PROMPT, most, draft=draft, num_draft_tokens=count) == plain
