"""Streams the tensors of a checkpoint into a model built on the meta device, following a load plan.

Host memory stays bounded: the file is read through its map, and on the way to a GPU each worker owns one pinned buffer
and one stream, so copies from disk, over the bus and unpacking on the device overlap. Device temporaries are bounded by
the slice size too. Unpacking writes straight into the planes of the final weight, which makes joining rows free.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma4.quant.errors import MissingTensorError, ShapeError, UnexpectedTensorError
from gemma4.quant.formats import container_for
from gemma4.quant.ggml_types import row_bytes
from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.plan import LoadEntry, LoadPlan
from gemma4.quant.reserve import reserve_weights
from gemma4.quant.weight_file import WeightFile

SLICE_BYTES = 32 << 20
CPU_SLICE_BYTES = 1 << 20  # so small that its temporaries stay in malloc's pool and in the cache
GPU_WORKERS = 6


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some rows of one file tensor and where they go."""

    entry: LoadEntry
    weight: PackedWeight
    source: str
    source_row: int
    target_row: int
    rows: int

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.entry.file_type, self.entry.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def view(self, file: WeightFile) -> Tensor:
        """uint8 [rows * row_bytes], on the file's map."""
        start = self.source_row * self.row_bytes
        return torch.frombuffer(file.data(self.source)[start : start + self.nbytes], dtype=torch.uint8)

    def unpack(self, blocks: Tensor) -> None:
        """Writes file bytes, flat and on the weight's device, into the weight."""
        blocks = blocks.view(self.rows, self.row_bytes)
        container = self.weight.tensor
        if self.entry.type == self.entry.file_type:
            container.write_rows(self.target_row, blocks)
        else:
            decoded = container_for(self.entry.file_type).from_blocks(blocks, self.entry.shape[-1]).dequantize()
            (dense,) = container.slice_rows(self.target_row, self.target_row + self.rows).planes_dict().values()
            dense.copy_(decoded)


@torch.inference_mode(False)  # workers share the buffers, and a mode is a thread's own
def load_weights(
    model: nn.Module,
    plan: LoadPlan,
    file: WeightFile,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Fills every weight of `model` from `file`. progress: called with the number of file bytes just loaded.

    Raises UnexpectedTensorError, MissingTensorError or ShapeError where plan and model do not match.
    """
    modules = dict(model.named_modules())
    reserve_weights(model, device)
    slices: list[_Slice] = []
    for entry in plan.entries:
        weight = modules.get(entry.target)
        if isinstance(weight, PackedWeight):
            _check_match(entry, (weight.ggml_type, weight.shape), (entry.type, entry.shape), file)
            weight.allocate(device)
            slices += _slices(entry, weight, SLICE_BYTES if device.type == "cuda" else CPU_SLICE_BYTES)
        else:
            _load_vector(model, entry, file, device)
            progress(entry.file_bytes)
    if device.type == "cuda":
        _unpack_on_gpu(slices, file, device, progress)
    else:
        for item in slices:
            item.unpack(item.view(file).to(device))
            progress(item.nbytes)
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unfilled:
        raise MissingTensorError(f"the plan leaves weights unfilled: {', '.join(unfilled)}", field=unfilled[0])


def _check_match(entry: LoadEntry, found: object, expected: object, file: WeightFile) -> None:
    if found != expected:
        raise ShapeError(f"found {found} in the model, {expected} in the plan", path=file.path, field=entry.target)


def _slices(entry: LoadEntry, weight: PackedWeight, slice_bytes: int) -> Iterator[_Slice]:
    rows_at_once = max(1, slice_bytes // row_bytes(entry.file_type, entry.shape[-1]))
    for part in entry.parts:
        for row in range(0, part.stop - part.start, rows_at_once):
            rows = min(rows_at_once, part.stop - part.start - row)
            yield _Slice(entry, weight, part.source, row, part.start + row, rows)


def _load_vector(model: nn.Module, entry: LoadEntry, file: WeightFile, device: torch.device) -> None:
    owner_name, _, name = entry.target.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        found = owner.get_parameter(name)
    except AttributeError as error:
        raise UnexpectedTensorError("the model has no such weight", path=file.path, field=entry.target) from error
    _check_match(entry, tuple(found.shape), entry.shape, file)
    blocks = torch.frombuffer(file.data(entry.parts[0].source), dtype=torch.uint8).view(1, -1)
    values = container_for(entry.file_type).from_blocks(blocks, entry.shape[0]).dequantize()[0]
    setattr(owner, name, nn.Parameter(values.to(device), requires_grad=False))


def _unpack_on_gpu(
    slices: list[_Slice], file: WeightFile, device: torch.device, progress: Callable[[int], None]
) -> None:
    largest = max((item.nbytes for item in slices), default=0)
    stations: queue.SimpleQueue[tuple[Tensor, torch.cuda.Stream]] = queue.SimpleQueue()
    for _ in range(GPU_WORKERS):
        stations.put((torch.empty(largest, dtype=torch.uint8, pin_memory=True), torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]
    torch.cuda.current_stream(device).synchronize()

    def move(item: _Slice) -> None:
        pinned, stream = stations.get()
        try:
            with torch.cuda.stream(stream):
                staged = pinned[: item.nbytes]
                staged.copy_(item.view(file))
                item.unpack(staged.to(device, non_blocking=True))
                stream.synchronize()
        finally:
            stations.put((pinned, stream))  # a worker that fails must not leave the others waiting
        progress(item.nbytes)

    with ThreadPoolExecutor(GPU_WORKERS) as pool:
        for _ in pool.map(move, slices):
            pass
    torch.cuda.empty_cache()  # what PyTorch keeps for the workers' streams would serve no other
