"""Keyword arguments that the ways to generate share; `Gemma4.stream_ids` and `Gemma4.generate` say what they mean."""

from __future__ import annotations

from typing import TypedDict

from gemma4.speculate import Draft


class IdOptions(TypedDict, total=False):
    """Of `Gemma4.generate_ids`."""

    seed: int
    eog_ids: frozenset[int] | None
    draft: Draft | None
    num_draft_tokens: int
    top_k: int | None
    top_p: float | None
    min_p: float | None


class TextOptions(IdOptions, total=False):
    """Of `Gemma4.generate` and `Gemma4.chat`."""

    temperature: float | None
