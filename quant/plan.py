"""The load plan: what fills every weight of a model. Pure data, made from a header without reading weights.

Every tensor of the file is claimed exactly once, and every tensor the model expects is present with the expected
shape; anything else is an error that lists the names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma4.quant.errors import MissingTensorError, ShapeError, UnexpectedTensorError, UnsupportedTypeError
from gemma4.quant.ggml_types import GGMLType, row_bytes
from gemma4.quant.transforms import LAYER, Part, Transform

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import TensorInfo

# The types that are multiplied as they are, by a kernel or as dense matrices. Kept here, and the next, so that planning
# does not import torch.
KERNEL_TYPES: Final = frozenset(
    {
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q8_0,
        GGMLType.Q4_K,
        GGMLType.Q5_K,
        GGMLType.Q6_K,
    }
)
# The types that have a container.
LOADABLE_TYPES: Final = KERNEL_TYPES | {
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.Q8_K,
    GGMLType.Q1_0,
    GGMLType.IQ4_NL,
    GGMLType.IQ4_XS,
    GGMLType.IQ3_XXS,
    GGMLType.IQ3_S,
    GGMLType.IQ2_XXS,
    GGMLType.IQ2_XS,
    GGMLType.IQ2_S,
    GGMLType.IQ1_S,
    GGMLType.IQ1_M,
    GGMLType.MXFP4,
    GGMLType.NVFP4,
    GGMLType.TQ1_0,
    GGMLType.TQ2_0,
}

_DECODED: Final = "no kernel of its own; rows are decoded, then multiplied"
_NAMES_IN_MESSAGE: Final = 8


@dataclass(frozen=True, slots=True)
class LoadEntry:
    """One weight of the model: [N, K], or [K] for a vector.

    file_type: how the file stores it. type: how the model holds it; differs from `file_type` only in a dense plan.
    parts: the tensors that fill its rows. in_host_memory: where the model is on a GPU, it stays on the host.
    """

    target: str
    file_type: GGMLType
    type: GGMLType
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    in_host_memory: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def file_bytes(self) -> int:
        return self.numel // self.shape[-1] * row_bytes(self.file_type, self.shape[-1])


@dataclass(frozen=True, slots=True)
class Fusion:
    """Where one fusing transform applied, by layer, and what kept it from the other layers."""

    label: str
    scope: str
    fused: tuple[int, ...]
    left: tuple[tuple[int, str], ...]  # (layer, reason)

    def __str__(self) -> str:
        reasons = Counter(reason for _, reason in self.left)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        layers = f"{len(self.fused)} of {len(self.fused) + len(self.left)} {self.scope} layers"
        return f"fused {self.label} on {layers} ({len(self.left)} left{why and ': ' + why})"


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """Tensors of the file that the model does without, and what they are."""

    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"not loaded: {len(self.names)} tensors of {self.what}"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a file's tensors become a model's weights."""

    architecture: str
    entries: tuple[LoadEntry, ...]
    fusions: tuple[Fusion, ...]
    in_config: tuple[str, ...]  # tensors whose values the configuration holds
    is_head_tied: bool
    not_loaded: tuple[NotLoaded, ...] = ()

    def __contains__(self, target: object) -> bool:
        return any(entry.target == target for entry in self.entries)

    def by_target(self) -> dict[str, LoadEntry]:
        return {entry.target: entry for entry in self.entries}

    def dense(self, dense_type: GGMLType) -> LoadPlan:
        """The same plan with every matrix held as `dense_type` instead of packed."""
        return replace(
            self, entries=tuple(replace(e, type=dense_type) if len(e.shape) > 1 else e for e in self.entries)
        )

    def with_host_memory(self, target: str) -> LoadPlan:
        """The same plan with one weight left in host memory, if there is such a weight."""
        return replace(
            self, entries=tuple(replace(e, in_host_memory=True) if e.target == target else e for e in self.entries)
        )

    @property
    def decoded_types(self) -> tuple[GGMLType, ...]:
        """Types of matrices that no kernel multiplies as they are: their rows are decoded whenever they are used."""
        return tuple(sorted({e.type for e in self.entries if len(e.shape) > 1} - KERNEL_TYPES))

    def source(self, name: str) -> tuple[LoadEntry, Part]:
        """Where a tensor of the file lies in the model: the inverse of the plan. Raises KeyError."""
        for entry in self.entries:
            for part in entry.parts:
                if part.source == name:
                    return entry, part
        raise KeyError(name)

    def describe(self) -> str:
        """A table of the weights by type, then a line per type without a kernel, fusion, and kind not loaded."""
        tensors: Counter[GGMLType] = Counter()
        weights: Counter[GGMLType] = Counter()
        size: Counter[GGMLType] = Counter()
        for entry in self.entries:
            tensors[entry.file_type] += len(entry.parts)
            weights[entry.file_type] += entry.numel
            size[entry.file_type] += entry.file_bytes
        rows = [("type", "tensors", "parameters", "bytes", "bits/weight")]
        for kind in sorted(size, key=lambda kind: -size[kind]):
            bits = 8 * size[kind] / weights[kind]
            rows.append((kind.name, f"{tensors[kind]}", f"{weights[kind]:,}", f"{size[kind]:,}", f"{bits:.3f}"))
        total = sum(weights.values())
        bits = 8 * sum(size.values()) / total
        rows.append(("all", f"{sum(tensors.values())}", f"{total:,}", f"{sum(size.values()):,}", f"{bits:.3f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines += [f"{kind.name}: {_DECODED}" for kind in self.decoded_types]
        lines += [str(fusion) for fusion in self.fusions]
        lines += [str(group) for group in self.not_loaded]
        lines.append("lm_head tied to embed_tokens" if self.is_head_tied else "lm_head has its own weights")
        return "\n".join(lines)


def make_plan(
    architecture: str,
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    transforms: Sequence[Transform],
    *,
    num_layers: int,
    is_head_tied: bool,
    not_loaded: tuple[NotLoaded, ...] = (),
    fuse: bool = True,
    path: Path | None = None,
) -> LoadPlan:
    """Plans how `tensors` fill a model that needs `expected` (GGUF name -> torch shape).

    not_loaded: those of `tensors` that are left aside. fuse=False leaves out the transforms that join tensors.
    Raises MissingTensorError, UnexpectedTensorError, ShapeError or UnsupportedTypeError.
    """
    left_aside = {name for group in not_loaded for name in group.names}
    unclaimed = {name: tensor for name, tensor in tensors.items() if name not in left_aside}
    _check_inventory(unclaimed, expected, path)
    entries: list[LoadEntry] = []
    in_config: list[str] = []
    fusions: list[Fusion] = []
    for transform in transforms:
        fused: list[int] = []
        left: list[tuple[int, str]] = []
        for layer, sources in _matches(transform, unclaimed, num_layers):
            is_allowed = fuse or len(sources) == 1
            if not (is_allowed and transform.applies(sources)):
                left.append((layer, "+".join(s.type.name for s in sources) if is_allowed else "because fusing is off"))
                continue
            for source in sources:
                del unclaimed[source.name]
            if transform.target is None:
                in_config += transform.sources
                continue
            fused.append(layer)
            parts, first = transform.place(sources), sources[0]
            shape = first.shape if len(first.shape) == 1 else (parts[-1].stop, first.shape[-1])
            target = transform.target.replace(LAYER, str(layer))
            entries.append(LoadEntry(target, first.type, first.type, shape, parts))
        if transform.label:
            fusions.append(Fusion(transform.label, transform.scope, tuple(fused), tuple(left)))
    _refuse(UnexpectedTensorError, unclaimed, "no transform of this architecture takes {}", path)
    duplicates = [target for target, count in Counter(e.target for e in entries).items() if count > 1]
    _refuse(UnexpectedTensorError, duplicates, "several transforms fill {}", path)
    return LoadPlan(architecture, tuple(entries), tuple(fusions), tuple(in_config), is_head_tied, not_loaded)


def _matches(
    transform: Transform, tensors: Mapping[str, TensorInfo], num_layers: int
) -> Iterable[tuple[int, list[TensorInfo]]]:
    """(layer, source tensors) wherever all sources are there; a name without wildcard counts as layer 0."""
    for layer in range(num_layers if any(LAYER in source for source in transform.sources) else 1):
        names = [source.replace(LAYER, str(layer)) for source in transform.sources]
        if all(name in tensors for name in names):
            yield layer, [tensors[name] for name in names]


def _check_inventory(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], path: Path | None
) -> None:
    # Types first: a format that is not supported often brings tensors of its own, which would be listed as unexpected.
    unloadable: dict[str, list[str]] = defaultdict(list)
    for name in expected:
        if name in tensors and tensors[name].type not in LOADABLE_TYPES:
            unloadable[tensors[name].type.name].append(name)
    if unloadable:
        found = "; ".join(f"{kind}: {_listing(names)}" for kind, names in unloadable.items())
        supported = ", ".join(sorted(kind.name for kind in LOADABLE_TYPES))
        first = next(iter(unloadable.values()))[0]
        raise UnsupportedTypeError(
            f"found tensors stored as {found}; supported are {supported}", path=path, field=first
        )
    _refuse(MissingTensorError, [n for n in expected if n not in tensors], "the file lacks {}", path)
    _refuse(UnexpectedTensorError, [n for n in tensors if n not in expected], "the model has no place for {}", path)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ShapeError(
                f"found shape {list(tensors[name].shape)}, the metadata require {list(shape)}",
                path=path,
                field=name,
            )


def _refuse(error: Callable[..., Exception], names: Iterable[str], message: str, path: Path | None) -> None:
    """Raises `error` about `names`, the first of them as its field, if there are any."""
    listed = list(names)
    if listed:
        raise error(message.format(_listing(listed)), path=path, field=listed[0])


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_MESSAGE
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
