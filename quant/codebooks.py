"""The codebooks of the IQ types: constants of the formats, taken from the installed gguf-py at first use.

gguf-py is imported only when a weight of such a type is decoded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gemma4.quant.ggml_types import GGMLType

__all__ = ["codebook"]


def codebook(ggml_type: GGMLType, blocks: Tensor) -> Tensor:
    """int8 [entries, weights of one entry] on the device of `blocks`, kept per device."""
    # A tensor made while tracing belongs to the trace and must not be kept.
    if torch.compiler.is_compiling() or type(blocks) not in (Tensor, nn.Parameter):
        return torch.tensor(_entries(ggml_type), dtype=torch.int8, device=blocks.device)
    return _kept(ggml_type, blocks.device)


@cache
def _kept(ggml_type: GGMLType, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_entries(ggml_type), dtype=torch.int8, device=device)


@cache
def _entries(ggml_type: GGMLType) -> Any:
    from gguf import quants

    if ggml_type in (GGMLType.IQ4_NL, GGMLType.IQ4_XS):
        return [[value] for value in quants.IQ4_NL.kvalues]
    source = getattr(quants, ggml_type.name)
    source.init_grid()
    return source.grid[0, 0]
