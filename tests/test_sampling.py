"""Which tokens a sampler may pick, how often it picks them, and what settings it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4.quant.errors import MetadataError
from gemma4.sampling import SamplingParams, sample

ALL = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def draw(logits: torch.Tensor, params: SamplingParams, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(sample(logits, params, generator)) for _ in range(count)]


def from_probabilities(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


# Settings


def test_defaults_are_those_of_gemma() -> None:
    assert SamplingParams() == SamplingParams(temperature=1.0, top_k=64, top_p=0.95, min_p=0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf, 101, "1", None, True)],
        *[("top_k", value) for value in (-1, 1.5, 40.0, 2**31 + 1, "64")],
        *[("top_p", value) for value in (-0.01, 1.01, math.nan)],
        *[("min_p", value) for value in (-0.01, 1.01, math.nan, [0.1])],
    ],
)
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: found ") as caught:
        SamplingParams(**{field: value})
    assert repr(value) in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))  # type: ignore[arg-type]
    assert set(draw(torch.arange(8.0), params, 100)) <= {5, 6, 7}


def test_override_replaces_what_is_given() -> None:
    params = SamplingParams(temperature=0.5, top_k=10)
    assert params.override(temperature=None, top_p=0.5) == SamplingParams(0.5, 10, 0.5)
    assert params.override(temperature=0.0).temperature == 0
    assert params.override() == params
    with pytest.raises(TypeError, match=r"\['top_q'\].*'top_p'"):
        params.override(top_q=0.5)
    with pytest.raises(ValueError, match="top_k"):
        params.override(top_k=-1)


def test_settings_of_a_file() -> None:
    metadata = {"general.sampling.temp": 0.25, "general.sampling.top_k": 7, "general.sampling.xtc_threshold": 0.1}
    assert SamplingParams.from_metadata(metadata) == SamplingParams(0.25, 7)
    everything = {f"general.sampling.{key}": value for key, value in [("top_p", 0.5), ("min_p", 0.1), ("temp", 0)]}
    assert SamplingParams.from_metadata(everything) == SamplingParams(0, 64, 0.5, 0.1)
    assert SamplingParams.from_metadata({}) == SamplingParams()


@pytest.mark.parametrize(
    ("key", "value"), [("temp", -1.0), ("temp", math.nan), ("top_k", "many"), ("top_k", True), ("top_p", [0.5])]
)
def test_a_setting_of_a_file_that_makes_no_sense_is_named(key: str, value: object) -> None:
    with pytest.raises(MetadataError) as caught:
        SamplingParams.from_metadata({f"general.sampling.{key}": value}, Path("model.gguf"))
    assert caught.value.field == f"general.sampling.{key}"
    assert caught.value.path == Path("model.gguf")
    assert repr(value) in str(caught.value)


# Which tokens


def expected_support(logits: list[float], params: SamplingParams) -> set[int]:
    """The candidates after top-k, top-p and min-p, in float64; for logits without ties or close calls."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: params.top_k or len(logits)]
    weights = [math.exp(logits[i] - logits[order[0]]) for i in order]
    total, kept, mass = sum(weights), set(), 0.0
    for i, weight in zip(order, weights, strict=True):
        if (mass < params.top_p and weight >= params.min_p) or not kept:
            kept.add(i)
        mass += weight / total
    return kept


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.permutations(range(8)),
    top_k=st.sampled_from([0, 1, 2, 3, 8, 100]),
    top_p=st.sampled_from([0.0, 0.3, 0.55, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_every_candidate_and_no_other_is_drawn(ranks: list[int], top_k: int, top_p: float, min_p: float) -> None:
    logits = [0.7 * rank for rank in ranks]
    params = SamplingParams(temperature=3.0, top_k=top_k, top_p=top_p, min_p=min_p)
    found = set(draw(torch.tensor(logits), params, 300))
    assert found == expected_support(logits, params)


def test_filters_count_probabilities_before_temperature() -> None:
    logits = from_probabilities(0.6, 0.3, 0.08, 0.02)
    for temperature in (0.1, 1.0, 50.0):
        params = SamplingParams(temperature, top_k=0, top_p=0.85, min_p=0.0)
        assert set(draw(logits, params, 400)) <= {0, 1}
    assert set(draw(logits, SamplingParams(50.0, 0, 0.85, 0.0), 400)) == {0, 1}


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    # Of the two candidates the first has 0.6 of the mass, of all four 0.36.
    logits = from_probabilities(0.36, 0.24, 0.2, 0.2)
    assert set(draw(logits, SamplingParams(1.0, top_k=2, top_p=0.5), 200)) == {0}
    assert set(draw(logits, SamplingParams(1.0, top_k=0, top_p=0.5), 200)) == {0, 1}


def test_top_p_of_one_keeps_what_rounding_would_lose() -> None:
    logits = torch.tensor([30.0, 0.0, 0.0, 0.0])  # in float32 the first has all of the mass
    assert set(draw(logits, SamplingParams(100.0, top_k=0, top_p=1.0), 200)) == {0, 1, 2, 3}
    assert set(draw(logits, SamplingParams(100.0, top_k=0, top_p=0.999), 200)) == {0}


def test_greedy() -> None:
    params = SamplingParams(temperature=0, top_k=5)
    assert draw(torch.tensor([0.0, 3.0, 2.0]), params, 3) == [1, 1, 1]
    assert draw(torch.tensor([0.0, 3.0, 3.0, 3.0]), params, 1) == [1]  # the first of equals
    state = torch.Generator().manual_seed(5)
    before = state.get_state()
    token = sample(torch.tensor([0.0, 1.0]), params, state)
    assert token.dtype == torch.int64
    assert token.shape == (1,)
    assert torch.equal(state.get_state(), before)


def test_ties_at_the_border_keep_the_number_of_candidates() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    found = set(draw(logits, SamplingParams(1.0, top_k=3, top_p=1.0), 400))
    assert len(found) == 3
    assert 1 in found
    assert 4 not in found


def test_equal_candidates_are_equally_likely() -> None:
    counts = np.bincount(draw(torch.zeros(4), ALL, 4000), minlength=4)
    assert abs(counts - 1000).max() < 120


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), -20.0, float("-inf")])
    for params in (ALL, SamplingParams(100.0, 0, 1.0, 0.0), SamplingParams(1.0, 4, 0.99)):
        assert set(draw(logits, params, 200)) <= {1, 3}


# How often


def chi_square(logits: torch.Tensor, temperature: float, count: int = 5000) -> float:
    params = SamplingParams(temperature, top_k=0, top_p=1.0)
    found = np.bincount(draw(logits, params, count), minlength=len(logits))
    expected = (logits.double() / temperature).softmax(-1).numpy() * count
    return float(((found - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = from_probabilities(0.3, 0.25, 0.2, 0.15, 0.1)
    assert chi_square(logits.roll(2) + 7.0, temperature) < 18.5  # 4 degrees of freedom: one in a thousand is above


def test_draws_of_a_large_vocabulary_follow_the_softmax() -> None:
    logits = torch.linspace(-8.0, 0.0, 4096)
    found = np.array(draw(logits, ALL, 1500))
    probabilities = logits.double().softmax(-1).numpy()
    ids = np.arange(4096)
    mean = float((ids * probabilities).sum())
    deviation = float(((ids - mean) ** 2 * probabilities).sum()) ** 0.5
    assert abs(found.mean() - mean) < 4 * deviation / 1500**0.5


def test_temperature_sharpens_and_flattens() -> None:
    logits = from_probabilities(0.5, 0.3, 0.2)
    share = [np.mean(np.array(draw(logits, SamplingParams(t, 0, 1.0), 2000)) == 0) for t in (0.2, 1.0, 10.0)]
    assert share[0] > 0.85
    assert 0.45 < share[1] < 0.55
    assert 0.3 < share[2] < 0.4


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.tensor([25.0, 30.0, -30.0, 29.0])
    assert set(draw(logits, SamplingParams(temperature), 50)) == {1}


def test_equal_seeds_give_equal_draws() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert draw(logits, ALL, 50, seed=11) == draw(logits, ALL, 50, seed=11)
    assert draw(logits, ALL, 50, seed=11) != draw(logits, ALL, 50, seed=12)


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(100)
    before = logits.clone()
    sample(logits, SamplingParams(0.7, 10, 0.9, 0.05))
    assert torch.equal(logits, before)


@pytest.mark.gpu
def test_draws_on_a_gpu_need_no_host() -> None:
    logits = from_probabilities(0.3, 0.25, 0.2, 0.15, 0.1).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = [sample(logits, ALL, generator) for _ in range(4000)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = np.bincount(torch.cat(tokens).cpu().numpy(), minlength=5)
    expected = np.array([0.3, 0.25, 0.2, 0.15, 0.1]) * 4000
    assert float(((found - expected) ** 2 / expected).sum()) < 18.5
