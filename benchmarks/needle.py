"""Whether a model finds a number in a long text, with each kind of KV cache.

usage: python -m benchmarks.needle FILE [--lengths 640,2000,8000,16000,32000] [--depths 0.1,0.5,0.9] [--numbers 1]
           [--kv-cache lossless,turboquant,turboquant-4bit]

A text of so many tokens tells a number of 7 digits at a depth, 0 its beginning and 1 its end, and begins to repeat it
at its end. The model reads the text with the digits behind it, on a GPU if there is one. Each number has a text of its
own. Of each run, one line as soon as it is known; then a table over all numbers, then all runs as one line of JSON.

- digits: how many of them are the likeliest of all tokens in their places; found: numbers with all 7.
- p: the geometric mean of their probabilities, 0.1 would be a guess among digits; the JSON has each as `digit_p`, too.
- KL: the mean Kullback-Leibler divergence in nats of the last 256 positions' distributions from those with the lossless
  cache, where that ran too.

Lengths run rising, each at all depths, in the order given, for all numbers, with all caches, lossless first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.config import CacheKind
from gemma4.generate import prefill
from gemma4.model import TextModel

NEEDLE = "7351942"
SCORED = 256  # positions at the end of a text whose distributions are compared
THINGS = ("the river", "a stone", "the old mill", "some bread", "the lamp", "her letter", "a quiet street")
VERBS = ("lay near", "was kept beside", "looked like", "came before", "was older than", "stood behind")
HEAD = "| tokens | depth | KV cache | found | digits | p | KL | s |\n|---:|---:|---|---:|---:|---:|---:|---:|"


@dataclass(frozen=True, slots=True)
class Found:
    """What one run found."""

    number: str
    tokens: int
    depth: float
    kv_cache: CacheKind
    digits: int
    p: float
    digit_p: list[float]
    kl: float | None  # None for the lossless cache, and where it did not run
    seconds: float


def row(found: Sequence[Found]) -> str:
    """A line of the table, of runs that differ in their numbers only."""
    first = found[0]
    whole = sum(run.digits == len(run.number) for run in found)
    digits, total = sum(run.digits for run in found), sum(len(run.number) for run in found)
    p = statistics.geometric_mean(run.p for run in found)
    kl = "-" if first.kl is None else f"{statistics.fmean(run.kl or 0.0 for run in found):.5f}"
    seconds = f"{statistics.fmean(run.seconds for run in found):.1f}"
    counts = f"{whole} of {len(found)}", f"{digits} of {total}"
    return (
        f"| {' | '.join((f'{first.tokens:,}', str(first.depth), first.kv_cache, *counts, f'{p:.4f}', kl, seconds))} |"
    )


def haystack(
    encode: Callable[[str], list[int]], tokens: int, depth: float, number: str = NEEDLE, seed: int = 3
) -> list[int]:
    """Ids of a text of `tokens` tokens that tells a number at `depth` and begins to repeat it at its end.

    encode: of a tokenizer that puts one id, of the beginning of a text, before those of the text. seed: of the text.
    """
    rng = random.Random(seed)
    needle = encode(f" The secret number of the lighthouse is {number}. Remember it.")[1:]
    question = encode(" What is the secret number of the lighthouse? The secret number of the lighthouse is ")[1:]
    room = tokens - len(needle) - len(question)
    filler: list[int] = []
    while len(filler) < room:
        a, b = rng.sample(THINGS, 2)
        filler += encode(f" {a.capitalize()} {rng.choice(VERBS)} {b}.")[bool(filler) :]
    at = max(1, int(room * depth))
    return filler[:at] + needle + filler[at:room] + question


def digit_ids(encode: Callable[[str], list[int]], number: str = NEEDLE) -> list[int]:
    """The ids of a number. Raises ValueError for a tokenizer that joins digits."""
    ids = encode(number)[1:]
    if len(ids) != len(number):
        raise ValueError(f"{number}: found {len(ids)} tokens, expected one a digit")
    return ids


@torch.inference_mode()
def read(model: TextModel, ids: Sequence[int], kind: CacheKind, scored: int) -> Tensor:
    """Log-probabilities float32 [scored, vocab_size] of what follows each of the last positions of `ids`."""
    cache = KVCache(model.config, len(ids), model.dtype, model.norm.weight.device, kind)
    before = len(ids) - scored
    if before:
        prefill(model, cache, ids[:before])
    return prefill(model, cache, ids[before:], before, all_logits=True).log_softmax(-1)


def score(log_probs: Tensor, digits: Sequence[int]) -> tuple[int, list[float]]:
    """(digits that are the likeliest, each one's log-probability) of a text that ends in them, by its `read`."""
    told = log_probs[-len(digits) - 1 : -1]
    right = torch.tensor(digits, device=told.device)
    return int((told.argmax(-1) == right).sum()), told.gather(-1, right[:, None])[:, 0].tolist()


def divergence(exact: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of `found` from `exact`, log-probabilities [positions, vocab_size]."""
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def numbers(count: int) -> list[str]:
    """NEEDLE and others like it."""
    rng = random.Random(7)
    return [NEEDLE, *(str(rng.randrange(10**6, 10**7)) for _ in range(count - 1))]


def runs(
    model: Gemma4, lengths: Iterable[int], depths: Sequence[float], kinds: Sequence[CacheKind], count: int = 1
) -> Iterator[Found]:
    """All runs, each when it is done."""
    encode = model.tokenizer.encode
    for tokens, depth, (i, number) in product(sorted(lengths), depths, enumerate(numbers(count))):
        digits = digit_ids(encode, number)
        ids = haystack(encode, tokens, depth, number, seed=3 + i) + digits
        exact: Tensor | None = None
        for kind in sorted(kinds, key=list(CacheKind).index):
            start = time.perf_counter()
            log_probs = read(model.model, ids, kind, min(SCORED, len(ids)))
            num_digits, told = score(log_probs, digits)
            seconds = time.perf_counter() - start
            kl = None if exact is None else divergence(exact, log_probs)
            p = math.exp(statistics.fmean(told))
            yield Found(number, tokens, depth, kind, num_digits, p, list(map(math.exp, told)), kl, seconds)
            if kind is CacheKind.LOSSLESS:
                exact = log_probs


def _listed(value: str) -> list[str]:
    return value.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lengths", type=_listed, default="640,2000,8000,16000,32000")
    parser.add_argument("--depths", type=_listed, default="0.1,0.5,0.9")
    parser.add_argument("--numbers", type=int, default=1)
    parser.add_argument("--kv-cache", type=_listed, default=",".join(CacheKind))
    args = parser.parse_args()
    lengths, depths = [int(x) for x in args.lengths], [float(x) for x in args.depths]
    kinds = [CacheKind(x) for x in args.kv_cache]
    room = max(lengths) + len(NEEDLE)
    model = Gemma4.from_gguf(args.file, dequantize=not torch.cuda.is_available(), max_seq_len=room)
    found = []
    for run in runs(model, lengths, depths, kinds, args.numbers):
        found.append(run)
        print(
            f"{run.number}, {run.tokens} tokens, depth {run.depth}, {run.kv_cache}: {run.digits} digits, "
            f"p {run.p:.4f}, KL {'-' if run.kl is None else f'{run.kl:.5f}'}, {run.seconds:.1f} s",
            flush=True,
        )
    groups: dict[tuple[int, float, CacheKind], list[Found]] = {}
    for run in found:
        groups.setdefault((run.tokens, run.depth, run.kv_cache), []).append(run)
    print("", HEAD, *map(row, groups.values()), "", sep="\n")
    print(json.dumps([asdict(run) for run in found]))


if __name__ == "__main__":
    main()
