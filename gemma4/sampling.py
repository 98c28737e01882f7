"""From logits to the next token: greedy, or temperature with top-k, top-p and min-p.

The filters run in llama.cpp's default order (top-k, top-p, min-p, then temperature), so the same settings mean the same
candidates. Everything stays on the logits' device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

_METADATA_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature: 0 picks the most likely token. top_k: candidates kept, 0 for all. top_p: probability mass kept.
    min_p: least probability kept, relative to the most likely token. The defaults are Google's for Gemma.

    Raises ValueError naming the field.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0

    def __post_init__(self) -> None:
        limits = {"temperature": (0.0, 100.0), "top_k": (0, 2**31), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: found {value!r}, expected {low} to {high}")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> SamplingParams:
        """The defaults a file suggests in `general.sampling.*`."""
        found = {field: metadata.get(f"general.sampling.{key}") for field, key in _METADATA_KEYS.items()}
        return cls(**{field: value for field, value in found.items() if isinstance(value, int | float)})  # type: ignore[arg-type]

    def override(self, **settings: float | None) -> SamplingParams:
        """The same parameters with those that are not None replaced. Raises TypeError for an unknown name."""
        known = {field.name for field in fields(self)}
        unknown = settings.keys() - known
        if unknown:
            raise TypeError(f"unknown sampling settings {sorted(unknown)}, known are {sorted(known)}")
        return replace(self, **{name: value for name, value in settings.items() if value is not None})  # type: ignore[arg-type]


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """logits: float32 [vocab_size]. Returns the token, int64 [1], without waiting for the device."""
    if params.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    kept = min(params.top_k or logits.shape[-1], logits.shape[-1])
    candidates, ids = torch.topk(logits, kept)  # descending
    probabilities = candidates.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    keep[0] = True
    scaled = torch.where(keep, candidates / params.temperature, float("-inf"))
    return ids.gather(-1, torch.multinomial(scaled.softmax(-1), 1, generator=generator))
