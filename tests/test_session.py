"""Generations that go on from what the one before has run: which tokens run again, and that results stay the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.generate import generate_tokens, prefill
from gemma4.history import TokenHistory
from gemma4.quant.errors import ContextError
from gemma4.ring_snapshot import RingSnapshot
from gemma4.sampling import SamplingParams
from gemma4.session import SessionPool
from tests.tiny_gguf import gemma4

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, RING, CHUNK = 16, 24, 32
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def golden(unpacked: Callable[[str], Any]) -> Gemma4:
    model = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu")
    cache = KVCache(model.config, 120, torch.float32)
    assert (model.config.sliding_window, cache.ring_length, cache.chunk_size) == (WINDOW, RING, CHUNK)
    return model


@pytest.fixture
def model(golden: Gemma4) -> Gemma4:
    """The golden model with nothing kept, and a context of 120 tokens."""
    return Gemma4(golden.model, golden.plan, golden.metadata, path=golden.path, max_seq_len=120)


@pytest.fixture(scope="module")
def text(data_dir: Any) -> list[int]:
    ids: list[int] = np.load(data_dir / "dense-f32.npz")["tokens"].tolist()
    return (ids * 3)[:200]


@contextmanager
def passes(model: Gemma4) -> Iterator[list[int]]:
    """The number of tokens of every pass meanwhile."""
    counts: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    try:
        yield counts
    finally:
        hook.remove()


def fresh_ids(model: Gemma4, ids: Sequence[int], count: int) -> list[int]:
    alone = Gemma4(model.model, model.plan, model.metadata, path=model.path, max_seq_len=model.max_seq_len)
    return alone.generate_ids(ids, count)


# Bookkeeping


def no_rings() -> RingSnapshot:
    return RingSnapshot([])


@pytest.mark.parametrize("seed", range(10))
def test_a_history_knows_exactly_what_a_ring_holds(seed: int) -> None:
    choose = random.Random(seed)
    window = choose.randint(2, 6)
    ring = choose.randint(window, 3 * window)
    slots = torch.full((ring, 2), -1)  # slot -> (position, token)
    history = TokenHistory(window, ring, RingSnapshot([slots]))
    full: dict[int, int] = {}  # what a full layer holds: position -> token
    asked: list[int] = []  # the last prompt
    reused = refused = restored = 0

    def holds(ids: list[int], start: int) -> bool:
        return all(slots[p % ring].tolist() == [p, ids[p]] for p in range(max(0, start - window + 1), start))

    def write(position: int, token: int) -> None:
        slots[position % ring] = torch.tensor([position, token])
        full[position] = token

    for _ in range(300):
        ids = [choose.randint(0, 1) for _ in range(choose.randint(1, 5 * ring))]
        choice = choose.random()
        if history.ids and choice < 0.5:  # go on from somewhere in what is there, often near its end
            keep = max(0, len(history.ids) - choose.choice([0, 1, choose.randint(0, window + 1), 3 * ring]))
            ids = history.ids[:keep] + ids[: choose.randint(1, ring)]
        elif choice < 0.8:  # or from about the end of the last prompt
            keep = max(0, len(asked) - choose.choice([0, 0, 1, choose.randint(0, window)]))
            ids = asked[:keep] + ids[: choose.randint(1, ring)]
        before = list(history.ids)
        most = next((i for i, pair in enumerate(zip(before, ids[:-1], strict=False)) if len({*pair}) > 1), None)
        most = min(len(before), len(ids) - 1) if most is None else most
        held = holds(ids, most)
        start = history.resume(ids)
        assert start < len(ids)
        assert history.ids == ids[:start] == before[:start] == [full[p] for p in range(start)]
        assert holds(ids, start)
        assert start <= most
        if start < most:
            # Going back that far is refused only where something that is needed is gone.
            assert not held
            if most >= len(asked) - 1 and len(asked) > ring - window:
                assert start >= len(asked) - 1  # the end of the last prompt is never lost
            refused += 1
        reused += start > 0
        restored += start > 0 and not held
        while len(history.ids) < len(ids):
            end = min(len(ids), len(history.ids) + choose.randint(1, ring))
            history.will_write(end)
            for p in range(len(history.ids), end):
                write(p, ids[p])
            history.ids += ids[len(history.ids) : end]
        answer = [choose.randint(0, 1) for _ in range(choose.choice([0, 1, ring - window, 2 * ring]))]
        history.end_prompt(ids, len(ids) + len(answer) + 1)
        asked = ids
        for token in answer:
            history.will_write(len(history.ids) + 1)
            write(len(history.ids), token)
            history.ids.append(token)
        if choose.random() < 0.3:  # a step whose token nobody has read
            history.will_write(len(history.ids) + 1)
            write(len(history.ids), -1)
    assert reused > 20
    assert restored > 5
    assert ring > 2 * window or refused > 0


def test_how_far_back_a_ring_goes() -> None:
    for written in (5 * RING, 5 * RING + 7):
        for back in range(1, 2 * RING):
            history = TokenHistory(WINDOW, RING, no_rings())
            history.will_write(written)
            history.ids = list(range(written))
            start = history.resume([*range(written - back), -1])
            assert start == (written - back if back <= RING - WINDOW + 1 else 0)


@pytest.mark.parametrize(("prompt", "answer", "is_taken"), [(8, 99, False), (9, 14, False), (9, 16, True)])
def test_a_snapshot_is_taken_where_an_answer_may_overwrite(
    prompt: int, answer: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(RingSnapshot, "take", lambda _: taken.append(1))
    history = TokenHistory(WINDOW, RING, no_rings())
    ids = list(range(prompt))
    history.will_write(prompt)
    history.end_prompt(ids, prompt + answer)
    assert bool(taken) is is_taken
    long = list(range(60))
    history.resume(long)
    history.will_write(60)
    history.end_prompt(long, 60 + RING - WINDOW)
    assert bool(taken) is is_taken
    history.end_prompt(long, 60 + RING - WINDOW + 1)
    assert len(taken) == is_taken + 1


# The same results


@pytest.mark.parametrize("shared", [1, WINDOW, RING - 1, RING, 3 * RING + 5])
@pytest.mark.parametrize("new", [1, RING + 1])
def test_only_the_tokens_after_the_shared_ones_run(model: Gemma4, text: list[int], shared: int, new: int) -> None:
    session = SessionPool(model.model, 180).take(GREEDY, ())
    for _ in generate_tokens(session, text[:shared], 0):
        pytest.fail("no token was asked for")
    ids = text[: shared + new]
    with passes(model) as counts:
        start = session.history.resume(ids)
        logits = prefill(model.model, session.loop.cache, ids[start:], start)
    assert sum(counts) == new
    roomy = Gemma4(model.model, model.plan, model.metadata, path=model.path, max_seq_len=180)
    torch.testing.assert_close(logits[0], roomy.logits(ids)[-1], rtol=0, atol=1e-4)


def test_a_conversation(model: Gemma4, text: list[int]) -> None:
    ids = text[:20]
    for turn, prefilled in ((text[40:45], 20), (text[50:83], 6), (text[90:92], 34)):
        expected = fresh_ids(model, ids, 4)
        with passes(model) as counts:
            answer = model.generate_ids(ids, 4)
        assert answer == expected
        assert counts == [*split(prefilled), 1, 1, 1]  # what is new and the last token, which nothing had run
        ids = [*ids, *answer, *turn]


def split(count: int) -> list[int]:
    return [CHUNK] * (count // CHUNK) + ([count % CHUNK] if count % CHUNK else [])


def test_the_same_prompt_twice(model: Gemma4, text: list[int]) -> None:
    first = model.generate_ids(text[:50], 3)
    with passes(model) as counts:
        assert model.generate_ids(text[:50], 3) == first
    assert counts == [1, 1, 1]
    assert model.generate_ids(text[:50], 3, temperature=1.0, top_k=1) == first
    model.forget()
    with passes(model) as counts:
        assert model.generate_ids(text[:50], 3) == first
    assert sum(counts) == 52


@pytest.mark.parametrize(("edited", "start"), [(59, 59), (53, 53), (52, 0), (0, 0)])
def test_an_edited_turn(model: Gemma4, text: list[int], edited: int, start: int) -> None:
    model.generate_ids(text[:60], 3)  # runs 62 tokens: the third new one is only sampled
    ids = [*text[:edited], (text[edited] + 1) % 100, *text[100:110]]
    expected = fresh_ids(model, ids, 3)
    with passes(model) as counts:
        assert model.generate_ids(ids, 3) == expected
    assert sum(counts) == len(ids) - start + 2
    shorter = ids[:5]
    assert model.generate_ids(shorter, 2) == fresh_ids(model, shorter, 2)


@pytest.mark.parametrize("length", [9, RING - 1, RING, CHUNK + 1, 55])
def test_the_same_prompt_after_an_answer_that_went_round_the_rings(model: Gemma4, text: list[int], length: int) -> None:
    ids = text[:length]
    first = model.generate_ids(ids, RING + 1)
    for _ in range(2):
        with passes(model) as counts:
            assert model.generate_ids(ids, RING + 1) == first
        assert counts == [1] * (RING + 1)


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_a_thought_that_the_template_strips(model: Gemma4, text: list[int], shared: int) -> None:
    """The next prompt goes on from the end of the one before, or from so much of the answer as the rings still hold."""
    ids = text[:50]
    for turn in (text[60:70], text[100:104]):
        expected = fresh_ids(model, ids, 20)
        with passes(model) as counts:
            answer = model.generate_ids(ids, 20)
        assert answer == expected
        if turn == text[100:104]:
            assert sum(counts) == shared + len(text[60:70]) + 1 + 19
        other = (answer[shared] + 1) % 100
        ids = [*ids, *answer[:shared], other, *turn]


def test_bits_after_going_back_are_those_of_a_session_that_never_went_on(model: Gemma4, text: list[int]) -> None:
    went_on, stayed = (SessionPool(model.model, 120).take(GREEDY, ()) for _ in range(2))
    for session, count in ((went_on, 40), (stayed, 0)):
        for _ in generate_tokens(session, text[:45], count):
            pass
    ids = text[:60]
    logits = []
    for session in (went_on, stayed):
        start = session.history.resume(ids)
        assert start == 45
        session.history.will_write(len(ids))
        logits.append(prefill(model.model, session.loop.cache, ids[start:], start, all_logits=True))
    assert torch.equal(*logits)


def test_a_generation_that_was_left(model: Gemma4, text: list[int]) -> None:
    answer = fresh_ids(model, text[:40], 6)
    stream = model.stream_ids(text[:40], 6, temperature=0.0)
    assert [next(stream) for _ in range(3)] == answer[:3]
    del stream
    with passes(model) as counts:
        assert model.generate_ids([*text[:40], *answer[:3]], 3) == answer[3:]
    assert counts == [1, 1, 1]
    assert model.generate_ids(text[:40], 6, eog_ids=frozenset({answer[2]})) == answer[: answer.index(answer[2]) + 1]
    assert model.generate_ids([*text[:40], *answer[:4]], 2) == answer[4:]
    never_begun = model.stream_ids(text[:40], 6)
    del never_begun
    with passes(model) as counts:
        model.generate_ids(text[:40], 1)
    assert counts == [1]


def test_a_generation_that_failed_leaves_nothing(
    model: Gemma4, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate_ids(text[:40], 3)
    stream = model.stream_ids(text[:45], 5, temperature=0.0)
    next(stream)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gemma4.decode_loop.DecodeLoop.advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    with passes(model) as counts:
        assert model.generate_ids(text[:40], 3) == expected
    assert sum(counts) == 42


def test_generations_at_a_time_have_sessions_of_their_own(model: Gemma4, text: list[int]) -> None:
    prompts = [text[:30], [*text[:20], *text[50:60]], text[:33]]
    expected = [fresh_ids(model, ids, 4) for ids in prompts]
    model.generate_ids(text[:20], 1)
    streams = [model.stream_ids(ids, 4, temperature=0.0) for ids in prompts]
    assert [list(ids) for ids in zip(*zip(*streams, strict=True), strict=True)] == expected
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda ids: model.generate_ids(ids, 4), prompts)) == expected


def test_a_conversation_in_a_quantized_cache(tmp_path: Path) -> None:
    path = gemma4(types={"matrix": "F32"}, layers=2).write(tmp_path / "model.gguf")

    def load() -> Gemma4:
        return Gemma4.from_gguf(path, device="cpu", max_seq_len=100, kv_cache="turboquant")

    model, ids = load(), list(range(40))
    answer = model.generate_ids(ids, 3)
    for turn in ([*ids, *answer, 5, 6], [*ids[:-2], 7]):
        with passes(model) as counts:
            found = model.generate_ids(turn, 3)
        assert found == load().generate_ids(turn, 3)
        assert sum(counts) < 8


# The end of the context


def test_a_conversation_to_the_last_position(model: Gemma4, text: list[int]) -> None:
    ids = text[: model.max_seq_len - 6]
    answer = model.generate_ids(ids, 3)
    rest = [*ids, *answer]
    assert model.generate_ids(rest, 3) == fresh_ids(model, rest, 3)
    full = [*rest, *text[:2]]
    assert len(full) == model.max_seq_len - 1
    assert model.generate_ids(full, 1) == fresh_ids(model, full, 1)
    for ids, count in ((full, 2), ([*full, 1], 1), (text[: model.max_seq_len + 1], 0)):
        with pytest.raises(ContextError, match=rf"need {len(ids) + count} positions, max_seq_len is 120"):
            model.generate_ids(ids, count)
    assert model.generate_ids([*full, 1], 0) == []
    with passes(model) as counts:  # what was refused has cost nothing
        assert model.generate_ids(full, 1) == fresh_ids(model, full, 1)
    assert counts[0] == 1


@pytest.mark.gpu
def test_a_conversation_on_a_gpu(unpacked: Callable[[str], Any], text: list[int]) -> None:
    """The decode step runs ahead of what the host has read, as a graph captured once."""
    model = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cuda", dtype=torch.float32, max_seq_len=180)
    ids = text[:20]
    for turn in (text[40:45], text[50:83], text[90:92], text[100:140]):
        expected = fresh_ids(model, ids, 8)
        stream = model.stream_ids(ids, 8, temperature=0.0)
        answer = [next(stream) for _ in range(6)]
        del stream
        assert answer == expected[:6]
        assert model.generate_ids(ids, 8) == expected
        ids = [*ids, *answer, *turn]


@pytest.mark.gpu
def test_going_back_on_a_gpu(unpacked: Callable[[str], Any], text: list[int]) -> None:
    """Rings come back from pinned memory in the order of the stream, between replays of a captured step."""
    model = Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cuda", dtype=torch.float32, max_seq_len=180)
    for ids in (text[:50], text[:90], text[:90], text[:70]):
        expected = fresh_ids(model, ids, 60)
        for _ in range(3):
            with passes(model) as counts:
                assert model.generate_ids(ids, 60) == expected
        assert counts[:1] == [1]
