"""How much GPU memory a model will take, known from its header alone: no weights are read, no torch is imported.

    model = MemoryModel(config, load_plan, CacheKind.LOSSLESS)
    plan = model.at(131072)
    plan.total_bytes, model.longest_context(24 << 30)
    print(plan.describe())

A plan counts one generation: weights, the KV cache for all its positions, the most that is alive in a pass beside them,
a drafter if there is one, and what PyTorch and CUDA take for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gemma4.config import CacheKind, Gemma4Config, LayerConfig, LayerKind
from gemma4.quant.errors import ContextError, DoesNotFitError
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType, row_bytes
from gemma4.quant.plan import LoadEntry, LoadPlan
from gemma4.quant.segments import block_bytes, segment_bytes
from gemma4.ring import chunk_size, ring_length
from gemma4.rope import tied_dims
from gemma4.workspace import Workspace, loading_bytes

CONTEXT_BYTES: Final = 526 << 20
"""Allowance for what CUDA takes when a process begins to use a GPU, as measured on an H100 with CUDA 13."""
RUNTIME_BYTES: Final = 262 << 20
"""Allowance for loaded kernels, cuBLAS's workspace and the captured decode graph, as measured there."""
CHECKED_TOKENS: Final = 8
"""Most tokens that a round with a drafter runs through the model, the limit of `gemma4.speculate`."""

# Bytes of one block in each plane, where planes are not simply the file's bytes in one piece.
_PLANE_BYTES: Final[dict[GGMLType, tuple[int, ...]]] = {
    GGMLType.Q4_K: (128, 16, 4),
    GGMLType.Q5_K: (128, 32, 16, 4),
    GGMLType.Q6_K: (128, 64, 16, 2),
    GGMLType.Q8_0: (32, 2),
    GGMLType.Q5_0: (16, 4, 2),
    GGMLType.Q5_1: (16, 4, 4),
    GGMLType.Q4_0: (16, 2),
    GGMLType.Q4_1: (16, 4),
}
_LEAST_TURBOQUANT_DIMS: Final = 64


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The caches of all layers of one kind. positions: those a layer keeps. nbytes: of all layers together."""

    kind: LayerKind
    layers: int
    positions: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of GPU memory by purpose, for generations of up to `context` tokens.

    prefill_bytes: of the blocks that activations and decoded weights of a chunk are cut from.
    decode_bytes: most bytes of them alive in a decode step.
    allocated_bytes: the most that tensors take at a time, without what is reserved for others.
    rounding_bytes: what PyTorch takes from the GPU beyond tensors, in whole segments.
    loading_bytes: buffers of the loader, as far as they are larger than caches and activations, which come later.
    drafter_bytes: a drafter's weights, rounded up, and the most alive in a round of guesses; 0 without one.
    """

    name: str
    context: int
    kv_cache: CacheKind
    chunk: int
    weight_bytes: int
    kv: tuple[LayerGroup, ...]
    prefill_bytes: int
    decode_bytes: int
    allocated_bytes: int
    rounding_bytes: int
    loading_bytes: int
    drafter_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return sum(group.nbytes for group in self.kv)

    @property
    def total_bytes(self) -> int:
        """What the process takes of a GPU."""
        tensors = self.weight_bytes + self.kv_bytes + self.prefill_bytes + self.decode_bytes + self.loading_bytes
        return tensors + self.drafter_bytes + self.rounding_bytes + CONTEXT_BYTES + RUNTIME_BYTES

    def describe(self) -> str:
        """A table of the memory by purpose, one line each."""
        rows = [
            ("weights", self.weight_bytes),
            *((f"KV cache, {g.layers} {g.kind} layers of {g.positions:,} positions", g.nbytes) for g in self.kv),
            (f"workspace, prefill of {self.chunk:,} tokens", self.prefill_bytes),
            ("workspace, decode step", self.decode_bytes),
            *([("buffers of the loader beyond those", self.loading_bytes)] if self.loading_bytes else []),
            *([("drafter, with its workspace", self.drafter_bytes)] if self.drafter_bytes else []),
            ("rounding of PyTorch's allocator", self.rounding_bytes),
            ("CUDA context, kernels, graph (allowance)", CONTEXT_BYTES + RUNTIME_BYTES),
            ("total", self.total_bytes),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {size:>15,} bytes  {gib(size):>10}" for label, size in rows)

    def to_json(self) -> dict[str, Any]:
        """All fields, with the sums."""
        return {
            **asdict(self),
            "kv_bytes": self.kv_bytes,
            "allowance_bytes": CONTEXT_BYTES + RUNTIME_BYTES,
            "total_bytes": self.total_bytes,
        }


class MemoryModel:
    """The memory of one file as a function of the context.

    itemsize: bytes of an activation, 2 for bfloat16. drafter: configuration and plan of a drafter beside the model.
    """

    def __init__(
        self,
        config: Gemma4Config,
        load_plan: LoadPlan,
        kv_cache: CacheKind = CacheKind.LOSSLESS,
        itemsize: int = 2,
        drafter: tuple[Gemma4Config, LoadPlan] | None = None,
    ) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.itemsize = itemsize
        self._weights = _weight_tensors(load_plan)
        self._workspace = Workspace(config, load_plan, itemsize)
        self._loading_bytes = loading_bytes(load_plan)
        self._draft_weights: list[int] = []
        self._draft_pass_bytes = 0
        if drafter is not None:
            self._draft_weights = _weight_tensors(drafter[1])
            self._draft_pass_bytes = (
                Workspace(*drafter, itemsize).decode_bytes() + 12 * CHECKED_TOKENS * config.vocab_size
            )
            self._loading_bytes = max(self._loading_bytes, loading_bytes(drafter[1]))

    def at(self, context: int) -> MemoryPlan:
        """Raises ContextError where the model has no such positions."""
        config = self.config
        if not 0 < context <= config.context_length:
            raise ContextError(
                f"found {context}, expected 1 to {config.context_length}, the model's context", field="context"
            )
        chunk, ring = chunk_size(config.sliding_window, context), ring_length(config.sliding_window, context)
        groups: list[LayerGroup] = []
        sizes: list[int] = []
        for kind in LayerKind:
            own = [layer for layer in config.layers if layer.kind is kind and layer.kv_source is None]
            if own:
                positions = ring if kind is LayerKind.SLIDING else context
                of_kind = [
                    size for layer in own for size in kv_tensors(config, layer, positions, self.kv_cache, self.itemsize)
                ]
                groups.append(LayerGroup(kind, len(own), positions, sum(of_kind)))
                sizes += of_kind
        weight_segments, kv_segments = segment_bytes(self._weights), segment_bytes(sizes)
        prefill, decode = sum(self._workspace.prefill_blocks(chunk)), self._workspace.decode_bytes()
        alive = max(self._workspace.prefill_bytes(chunk), decode, self._draft_pass_bytes)
        return MemoryPlan(
            name=config.name,
            context=context,
            kv_cache=self.kv_cache,
            chunk=chunk,
            weight_bytes=sum(self._weights),
            kv=tuple(groups),
            prefill_bytes=prefill,
            decode_bytes=decode,
            allocated_bytes=block_bytes([*self._weights, *self._draft_weights, *sizes]) + alive,
            rounding_bytes=weight_segments + kv_segments - sum(self._weights) - sum(sizes),
            loading_bytes=max(0, self._loading_bytes - kv_segments - prefill - decode),
            drafter_bytes=segment_bytes(self._draft_weights) + self._draft_pass_bytes,
        )

    def longest_context(self, available_bytes: int) -> int:
        """The most tokens whose plan's total is within `available_bytes`; 0 where not even one is."""
        low, high = 0, self.config.context_length
        while low < high:
            middle = (low + high + 1) // 2
            if self.at(middle).total_bytes <= available_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def check_fits(model: MemoryModel, context: int, available_bytes: int, path: Path) -> None:
    """Raises DoesNotFitError, which lists what takes how much, where `context` tokens need more than there is."""
    plan = model.at(context)
    if plan.total_bytes > available_bytes:
        longest = model.longest_context(available_bytes)
        instead = f"{longest:,} positions would fit" if longest else "not even one position would fit"
        raise DoesNotFitError(
            f"{context:,} positions need {gib(plan.total_bytes)} of the GPU, found {gib(available_bytes)}; {instead}",
            path=path,
            field="max_seq_len",
            table=plan.describe(),
        )


def _weight_tensors(load_plan: LoadPlan) -> list[int]:
    """Bytes of each tensor on the GPU that holds weights."""
    return [size for entry in load_plan.entries if not entry.in_host_memory for size in weight_planes(entry)]


def weight_planes(entry: LoadEntry) -> Iterable[int]:
    """Bytes of each tensor that holds one weight of the plan; vectors are held as float32."""
    if len(entry.shape) == 1:
        return (4 * entry.numel,)
    if entry.type not in _PLANE_BYTES:
        return (entry.numel // entry.shape[-1] * row_bytes(entry.type, entry.shape[-1]),)
    blocks = entry.numel // BLOCK_FORMATS[entry.type].block_size
    return (blocks * size for size in _PLANE_BYTES[entry.type])


def kv_tensors(
    config: Gemma4Config, layer: LayerConfig, positions: int, kv_cache: CacheKind, itemsize: int = 2
) -> tuple[int, ...]:
    """Bytes of each tensor of the cache of a layer that has its own."""
    rotated, head_dim = tied_dims(config, layer), layer.head_dim
    rows = layer.num_key_value_heads * positions
    if kv_cache.bits and layer.kind is LayerKind.FULL:
        # Codes and a float32 scale, for the keys' own dimensions and for the values, and one key in float32.
        own = (rotated,) if rotated >= _LEAST_TURBOQUANT_DIMS else ()
        codes = (rows * size for dim in (*(own or (head_dim,)), head_dim) for size in (dim * kv_cache.bits // 8, 4))
        return (*codes, layer.num_key_value_heads * 4 * sum((*own, head_dim)))
    if rotated:
        return (rows * (head_dim + rotated) * itemsize,)
    return (rows * head_dim * itemsize,) * 2


def gib(size: int) -> str:
    """Bytes in the unit in which graphics cards are sold."""
    return f"{size / (1 << 30):.2f} GiB"
