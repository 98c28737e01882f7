"""Generation on a CPU: where it stops, what it refuses, and that every way to ask for text gives the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.chat import render_chat_ids
from gemma4.generate import prefill
from gemma4.quant.errors import ContextError, MetadataError, TokenizerError
from gemma4.sampling import SamplingParams
from tests.tiny_gguf import gemma4
from tests.tiny_vocabulary import FIRST_BYTE, FIRST_PIECE, NON_ASCII_BYTES, TURN, TURN_END, vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 16
CHAT = [{"role": "user", "content": "the <turn|> end"}]
UNPRINTABLE = [*range(FIRST_BYTE), *range(FIRST_BYTE, FIRST_BYTE + 0x20), *NON_ASCII_BYTES, TURN]


@pytest.fixture(scope="module")
def golden(unpacked: Callable[[str], Path]) -> Gemma4:
    """A Gemma 4 with a window of 16 and no tokenizer."""
    return Gemma4.from_gguf(unpacked("dense-f32.gguf"), device="cpu")


@pytest.fixture(scope="module")
def prompt(data_dir: Path) -> list[int]:
    ids: list[int] = np.load(data_dir / "dense-f32.npz")["tokens"].tolist()
    return ids


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Gemma4:
    """A random model whose tokens are letters, words and ASCII bytes; one context of 96 tokens."""
    model = gemma4(types={"matrix": "Q8_0"}, layers=2, tied=False)
    model.metadata |= vocabulary(suppress_tokens=[*UNPRINTABLE, TURN_END])
    path = model.write(tmp_path_factory.mktemp("wordy") / "wordy.gguf")
    return Gemma4.from_gguf(path, device="cpu", max_seq_len=96, dequantize=True)


def with_metadata(model: Gemma4, **keys: Any) -> Gemma4:
    """The same weights with other metadata; "_" stands for "." in the names of sampling settings."""
    return Gemma4(model.model, model.plan, {**model.metadata, **keys}, path=model.path, max_seq_len=model.max_seq_len)


def step_by_step(model: Gemma4, ids: Sequence[int], cache: KVCache) -> torch.Tensor:
    return torch.cat([prefill(model.model, cache, [token], position) for position, token in enumerate(ids)])


# Ids


def test_greedy_ids_are_the_most_likely_ones(golden: Gemma4, prompt: list[int]) -> None:
    ids = list(prompt[:10])
    for _ in range(12):
        ids.append(int(golden.logits(ids)[-1].argmax()))
    assert golden.generate_ids(prompt[:10], 12) == ids[10:]
    assert golden.generate_ids(prompt[:10], 12, temperature=0.8, top_k=1) == ids[10:]


def test_seeds(golden: Gemma4, prompt: list[int]) -> None:
    def ids(seed: int) -> list[int]:
        return golden.generate_ids(prompt[:8], 24, temperature=1.0, seed=seed)

    assert ids(1) == ids(1)
    assert len({tuple(ids(seed)) for seed in range(4)}) == 4
    assert golden.generate_ids(prompt[:8], 24, seed=1) == golden.generate_ids(prompt[:8], 24, seed=2)  # greedy


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_the_number_of_new_tokens(golden: Gemma4, prompt: list[int], count: int) -> None:
    longest = golden.generate_ids(prompt[:5], 40)
    assert golden.generate_ids(prompt[:5], count) == longest[:count]
    assert list(golden.stream_ids(prompt[:5], count, temperature=0.0)) == longest[:count]


def test_a_generation_ends_after_an_end_token(golden: Gemma4, prompt: list[int]) -> None:
    free = golden.generate_ids(prompt[:5], 30, temperature=1.0, seed=3)
    for stop in {free[0], free[7], free[20]}:
        first = free.index(stop)
        found = golden.generate_ids(prompt[:5], 30, temperature=1.0, seed=3, eog_ids=frozenset({stop}))
        assert found == free[: first + 1]


def test_generations_do_not_depend_on_what_ran_before(golden: Gemma4, prompt: list[int]) -> None:
    alone = golden.generate_ids(prompt[:40], 20)
    streams = [golden.stream_ids(prompt[:40], 20, temperature=0.0), golden.stream_ids(prompt[50:60], 20)]
    interleaved = [ids[0] for ids in zip(*streams, strict=True)]
    assert interleaved == alone
    half = golden.stream_ids(prompt[:40], 20, temperature=0.0)
    assert [next(half) for _ in range(5)] == alone[:5]
    del half
    assert golden.generate_ids(prompt[:40], 20) == alone


def test_threads_may_share_a_model(golden: Gemma4, prompt: list[int]) -> None:
    alone = [golden.generate_ids(prompt[i : i + 20], 10, temperature=1.0, seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(golden.generate_ids, prompt[i : i + 20], 10, temperature=1.0, seed=i) for i in range(4)]
        assert [job.result() for job in jobs] == alone


# Prompts around the window and the ring


@pytest.mark.parametrize("room", [0, 3, 100])
@pytest.mark.parametrize("length", [1, *(n * WINDOW + d for n in (1, 2) for d in (-1, 0, 1)), 4 * WINDOW + 3])
def test_prefill_equals_one_token_at_a_time(golden: Gemma4, prompt: list[int], length: int, room: int) -> None:
    assert golden.config.sliding_window == WINDOW
    ids = prompt[:length]
    caches = [KVCache(golden.config, length + room, torch.float32) for _ in range(2)]
    chunked, single = prefill(golden.model, caches[0], ids), step_by_step(golden, ids, caches[1])
    torch.testing.assert_close(chunked[0], single[-1], rtol=0, atol=1e-4)
    following = prompt[length : length + min(room, 3)]
    for position, token in enumerate(following, length):
        logits = [prefill(golden.model, cache, [token], position) for cache in caches]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1])
def test_a_context_may_be_filled_to_its_last_position(golden: Gemma4, prompt: list[int], length: int) -> None:
    short = Gemma4(golden.model, golden.plan, golden.metadata, path=golden.path, max_seq_len=length + 4)
    expected = golden.generate_ids(prompt[:length], 4)
    assert short.generate_ids(prompt[:length], 4) == expected
    assert short.generate_ids([*prompt[:length], *expected[:3]], 1) == expected[3:]
    full = short.logits([*prompt[:length], *expected])
    torch.testing.assert_close(full, golden.logits([*prompt[:length], *expected]), rtol=0, atol=1e-4)
    with pytest.raises(ContextError):
        short.generate_ids(prompt[:length], 5)


def test_the_whole_context_of_a_model(golden: Gemma4, prompt: list[int]) -> None:
    length = golden.config.context_length
    ids = (prompt * (length // len(prompt) + 1))[: length - 2]
    whole = Gemma4(golden.model, golden.plan, golden.metadata, path=golden.path, max_seq_len=length)
    assert len(whole.generate_ids(ids, 2)) == 2
    with pytest.raises(ContextError):
        whole.generate_ids(ids, 3)


# What is refused


def test_prompts_that_do_not_fit(golden: Gemma4, prompt: list[int]) -> None:
    model = Gemma4(golden.model, golden.plan, golden.metadata, path=golden.path, max_seq_len=20)
    for ids, count in ((prompt[:21], 1), (prompt[:21], 0), (prompt[:15], 6), (prompt[:1], 1000)):
        with pytest.raises(ContextError) as caught:
            model.generate_ids(ids, count)
        for number in (len(ids), count, len(ids) + count, 20):
            assert str(number) in str(caught.value)
    with pytest.raises(ContextError, match=r"21 tokens.*20"):
        model.logits(prompt[:21])


def test_an_error_of_a_stream_comes_at_once(wordy: Gemma4) -> None:
    with pytest.raises(ContextError):
        wordy.generate("a", 1000, stream=True)
    with pytest.raises(ValueError, match="stop: found an empty string"):
        wordy.generate("a", 10, stream=True, stop="")
    with pytest.raises(TypeError, match="top_q"):
        wordy.generate("a", 10, stream=True, top_q=0.5)


def test_prompts_that_are_none(golden: Gemma4) -> None:
    with pytest.raises(ContextError, match="no tokens"):
        golden.generate_ids([], 3)
    with pytest.raises(ContextError, match="no tokens"):
        golden.logits([])
    vocab_size = golden.config.vocab_size
    for token in (-1, vocab_size, 2**40):
        with pytest.raises(ValueError, match=rf"ids: found {token}, expected 0 to {vocab_size - 1}"):
            golden.generate_ids([1, token, 2], 3)
        with pytest.raises(ValueError, match=f"{token}"):
            golden.logits([token])


def test_a_negative_number_of_tokens(golden: Gemma4, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: found -1"):
        golden.generate_ids(prompt[:3], -1)


def test_settings_that_make_no_sense(golden: Gemma4, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="top_p"):
        golden.generate_ids(prompt[:3], 3, top_p=1.5)
    with pytest.raises(TypeError, match="nucleus"):
        golden.generate_ids(prompt[:3], 3, nucleus=0.5)


def test_a_file_without_tokenizer(golden: Gemma4, prompt: list[int]) -> None:
    assert golden.metadata["tokenizer.ggml.model"] == "none"
    assert len(golden.generate_ids(prompt[:3], 3)) == 3
    with pytest.raises(TokenizerError, match="no tokenizer") as caught:
        _ = golden.tokenizer
    assert caught.value.path == golden.path
    with pytest.raises(TokenizerError):
        golden.generate("text", 3)
    with pytest.raises(TokenizerError):
        golden.chat(CHAT, 3)


# Text


def test_text_is_that_of_the_ids(wordy: Gemma4) -> None:
    ids = wordy.tokenizer.encode("the end")
    assert ids[0] == wordy.tokenizer.bos_id
    new_ids = wordy.generate_ids(ids, 30, temperature=1.0, seed=5)
    text = wordy.generate("the end", 30, temperature=1.0, seed=5)
    assert text == wordy.tokenizer.decode(new_ids)
    assert wordy.generate(ids, 30, temperature=1.0, seed=5) == text
    pieces = list(wordy.generate("the end", 30, temperature=1.0, seed=5, stream=True))
    assert "".join(pieces) == text
    assert 20 < len(pieces) <= 30
    assert wordy.generate("the end", 30, temperature=1.0, seed=6) != text


def test_control_tokens_in_text_are_text(wordy: Gemma4) -> None:
    spelled = wordy.tokenizer.encode("<turn|>")
    assert TURN_END not in spelled
    assert wordy.generate("<turn|>", 8, temperature=0.0) == wordy.generate(spelled, 8, temperature=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings(wordy: Gemma4, seed: int) -> None:
    def generate(**options: Any) -> str:
        text: str = wordy.generate("stop", 40, temperature=1.0, seed=seed, **options)
        return text

    text = generate()
    assert len(text) > 40
    assert len(set(text)) > 10
    for start, length in ((0, 1), (5, 2), (11, 7), (20, 15)):
        stop = text[start : start + length]
        assert generate(stop=stop) == text[: text.index(stop)]
        assert "".join(wordy.generate("stop", 40, temperature=1.0, seed=seed, stop=stop, stream=True)) == generate(
            stop=[stop]
        )
    assert generate(stop=["never this", text[10:14], text[30:34]]) == generate(stop=text[10:14])
    assert generate(stop="never this") == text


def test_stop_strings_save_work(wordy: Gemma4) -> None:
    text = wordy.generate("stop", 40, temperature=0.0)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = wordy.model.register_forward_hook(count)
    try:
        assert wordy.generate("stop", 40, temperature=0.0, stop=text[:3]) == ""
    finally:
        hook.remove()
    assert steps <= 4


def test_an_end_token_of_the_file_ends_the_text(wordy: Gemma4) -> None:
    free = wordy.generate_ids(wordy.tokenizer.encode("end"), 40, temperature=1.0, seed=2)
    stop = free[15]
    ending = with_metadata(wordy, **{"tokenizer.ggml.eot_token_id": stop})
    first = free.index(stop)
    assert ending.generate("end", 40, temperature=1.0, seed=2) == wordy.tokenizer.decode(free[:first])
    assert ending.generate_ids(wordy.tokenizer.encode("end"), 40, 1.0, seed=2) == free[: first + 1]


def test_suppressed_tokens_are_never_sampled(wordy: Gemma4) -> None:
    suppressed = set(wordy.tokenizer.suppress_ids)
    assert len(suppressed) > 150
    free = with_metadata(wordy, **{"tokenizer.ggml.suppress_tokens": []})
    settings = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "eog_ids": frozenset()}
    assert suppressed & set(free.generate_ids([2, 5], 80, **settings))
    assert not suppressed & set(wordy.generate_ids([2, 5], 80, **settings))
    best = free.generate_ids([2, 5], 1)[0]
    without = with_metadata(wordy, **{"tokenizer.ggml.suppress_tokens": [best]})
    logits = free.logits([2, 5])[-1]
    assert without.generate_ids([2, 5], 1) == [int(logits.topk(2).indices[1])]


# Settings of the file


def test_settings_come_from_the_file(wordy: Gemma4) -> None:
    assert wordy.sampling == SamplingParams()
    greedy = with_metadata(wordy, **{"general.sampling.temp": 0.0})
    assert greedy.generate("abc", 20, seed=1) == wordy.generate("abc", 20, temperature=0.0)
    assert greedy.generate("abc", 20, seed=1, temperature=None) == wordy.generate("abc", 20, temperature=0.0)
    assert greedy.generate("abc", 20, seed=1, temperature=1.0) == wordy.generate("abc", 20, seed=1)
    narrow = with_metadata(wordy, **{"general.sampling.top_k": 1})
    assert narrow.generate("abc", 20, seed=1) == wordy.generate("abc", 20, temperature=0.0)
    settings = {"temp": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    several = with_metadata(wordy, **{f"general.sampling.{key}": value for key, value in settings.items()})
    assert several.generate("abc", 20, seed=3) == wordy.generate(
        "abc", 20, seed=3, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01
    )


def test_a_setting_of_the_file_that_makes_no_sense(wordy: Gemma4) -> None:
    with pytest.raises(MetadataError, match="temperature: found -1") as caught:
        with_metadata(wordy, **{"general.sampling.temp": -1.0})
    assert caught.value.field == "general.sampling.temp"
    assert caught.value.path == wordy.path


# Chat


def test_chat_is_generation_from_the_rendered_messages(wordy: Gemma4) -> None:
    ids = render_chat_ids(wordy.chat_template, wordy.tokenizer, CHAT)
    assert ids.count(TURN) == 2  # the user's turn and the model's
    assert ids.count(TURN_END) == 1  # the one in the message stays text
    expected = wordy.generate(ids, 10, temperature=1.0, seed=4)
    assert wordy.chat(CHAT, 10, temperature=1.0, seed=4) == expected
    assert "".join(wordy.chat(CHAT, 10, temperature=1.0, seed=4, stream=True)) == expected
    assert wordy.chat(CHAT, 10, temperature=1.0, seed=4, stop=expected[2]) == expected[: expected.index(expected[2])]


def test_chat_past_the_context(wordy: Gemma4) -> None:
    with pytest.raises(ContextError):
        wordy.chat([{"role": "user", "content": "x" * 200}], 4)


def test_chat_with_the_real_file(real_gguf: Path) -> None:
    model = Gemma4.from_gguf(real_gguf, device="cpu", max_seq_len=64, dequantize=True)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = render_chat_ids(model.chat_template, model.tokenizer, messages)
    turn = model.tokenizer.special_id("<start_of_turn>")
    assert ids.count(turn) == 2
    text = model.chat(messages, 4, temperature=0.0)
    assert text == model.tokenizer.decode(model.generate_ids(ids, 4))
    assert text.strip()


def test_pieces_of_the_vocabulary_are_as_the_tests_assume(wordy: Gemma4) -> None:
    assert wordy.tokenizer.token_text(FIRST_PIECE) == "a"
    assert wordy.tokenizer.eog_ids == {1, TURN_END}
    assert wordy.config.vocab_size == wordy.tokenizer.vocab_size
