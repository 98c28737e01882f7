"""From logits to the next token: greedy, or temperature with top-k, top-p and min-p.

The filters run in llama.cpp's default order (top-k, top-p, min-p, then temperature), so the same settings mean the same
candidates. Everything stays on the logits' device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma4.quant.errors import MetadataError

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
            value: Any = getattr(self, name)
            kind, text = (Integral, "an integer") if name == "top_k" else (Real, "a number")
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not (is_number and low <= value <= high):
                raise ValueError(f"{name}: found {value!r}, expected {text} from {low} to {high}")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], path: Path | None = None) -> SamplingParams:
        """The defaults a file suggests in `general.sampling.*`. path: named in errors. Raises MetadataError."""
        params = cls()
        for field, name in _METADATA_KEYS.items():
            key = f"general.sampling.{name}"
            if key in metadata:
                try:
                    params = replace(params, **{field: metadata[key]})  # type: ignore[arg-type]
                except ValueError as error:
                    raise MetadataError(str(error), path=path, field=key) from error
        return params

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
    candidates = candidates - candidates[0]  # so that no temperature makes them infinite
    probabilities = candidates.softmax(-1)
    keep = probabilities >= params.min_p * probabilities[0]
    if params.top_p < 1:  # a rounded sum may reach 1 before the last candidate
        keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    keep[0].fill_(True)  # assigning would wait for the device
    temperature = max(params.temperature, torch.finfo(torch.float32).tiny)
    weights = torch.where(keep, candidates / temperature, float("-inf")).softmax(-1)
    # Of exponential clocks with these rates, which rings first follows the weights; torch.multinomial may ask the host.
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    return ids.gather(-1, (weights / clocks).argmax(dim=-1, keepdim=True))
