"""Declarative weight transforms: how the tensors of a GGUF file become the weights of a model.

A transform is a frozen value that names its `sources` (GGUF tensors) and its `target` (a model weight), with `{layer}`
as the only wildcard. From the header alone it says whether it applies and which rows of the target each source fills.
GGUF blocks run along K, so placing whole rows is exact for every packed type, and the inverse is the same placement
read backwards.

The registry maps an architecture to its list of transforms; the first one that applies to a tensor wins it. Adding one:

    register_transforms("my-arch", rename("blk.{layer}.attn_q.weight", "layers.{layer}.self_attn.q_proj.weight"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from gemma4.quant.ggml_types import GGMLType

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import TensorInfo

LAYER = "{layer}"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a target, filled by all rows of one GGUF tensor, in order."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Transform:
    """Matrices of one type and one K stacked below each other: rows of `sources[0]` first.

    sources: GGUF tensor names. target: name of the model weight, or None where the model's configuration already holds
    the values. types: the storage types it applies to, None for all. label, scope: what is fused and in which layers,
    for the log. Vectors do not stack: only a transform with one source takes them.
    """

    sources: tuple[str, ...]
    target: str | None
    types: frozenset[GGMLType] | None = None
    label: str = ""
    scope: str = ""

    def applies(self, sources: Sequence[TensorInfo]) -> bool:
        """Whether these tensors, all of `sources` in order, can be stacked as they are stored."""
        first = sources[0]
        if len(sources) > 1 and len(first.shape) != 2:
            return False
        return all(
            (self.types is None or source.type in self.types)
            and source.type == first.type
            and source.shape[1:] == first.shape[1:]
            for source in sources
        )

    def place(self, sources: Sequence[TensorInfo]) -> tuple[Part, ...]:
        """The rows of the target that each source fills: all along its last dimension, so a vector is one row."""
        parts: list[Part] = []
        for source in sources:
            start = parts[-1].stop if parts else 0
            parts.append(Part(source.name, start, start + prod(source.shape[:-1])))
        return tuple(parts)


def rename(source: str, target: str) -> Transform:
    """One tensor under the model's name."""
    return Transform((source,), target)


def concat_rows(*sources: str, target: str, types: frozenset[GGMLType], label: str, scope: str) -> Transform:
    """Several matrices as one, for the listed storage types only."""
    return Transform(sources, target, types, label, scope)


def read_by_config(source: str) -> Transform:
    """A tensor whose values are part of the model's configuration."""
    return Transform((source,), None)


_REGISTRY: dict[str, tuple[Transform, ...]] = {}


def register_transforms(architecture: str, *transforms: Transform) -> None:
    """Adds transforms for an architecture, ahead of those registered before."""
    _REGISTRY[architecture] = transforms + _REGISTRY.get(architecture, ())


def transforms_for(architecture: str) -> tuple[Transform, ...]:
    """The transforms of an architecture, the first to be tried first; empty for an unknown architecture."""
    return _REGISTRY.get(architecture, ())
