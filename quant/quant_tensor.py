"""The base of every packed weight: named planes, exact conversion from and to the blocks of a GGUF file.

A container is a frozen dataclass of plain tensors, its planes; it is no `torch.Tensor`, so nothing about
tracing or compiling changes. A format declares its planes, where their bytes stand in a block, and the
function of `gemma4.kernels.dequant` that decodes them; everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, Self, TypeVar

import torch
from torch import Tensor

from gemma4.quant.errors import ShapeError
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType, row_bytes
from gemma4.quant.repack import BitOrder

__all__ = ["SLICE_BYTES", "Plane", "QuantTensor", "register_format", "registered_formats"]

SLICE_BYTES: Final = 16 << 20
"""Blocks are converted and decoded in slices of whole rows of at most this many file bytes (but at least one row),
which bounds temporaries."""

_FORMATS: dict[GGMLType, type[QuantTensor]] = {}


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a format: [N, K / weights_per_item * columns] of `dtype`, with `items` appended where it is given.

    start, stop: where its bytes stand in a block of the file. order: how they are rearranged; None keeps them.
    """

    dtype: torch.dtype
    weights_per_item: int
    start: int
    stop: int
    items: int | None = None
    order: BitOrder | None = None
    columns: int = 1

    def trailing(self, k: int) -> tuple[int, ...]:
        """Shape of one row's share of the plane, for rows of `k` weights."""
        columns = k // self.weights_per_item * self.columns
        return (columns,) if self.items is None else (columns, self.items)


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix of weights [N, K], packed. Fields are its planes, each [N, ...], contiguous, on one device.

    Construction checks the planes against each other and raises ShapeError naming the one at fault.
    """

    ggml_type: ClassVar[GGMLType]
    planes: ClassVar[Mapping[str, Plane]]
    decode: ClassVar[Callable[..., Tensor]]

    def __post_init__(self) -> None:
        planes = self.planes_dict()
        for name, tensor in planes.items():
            _require(isinstance(tensor, Tensor), self, name, "a tensor", type(tensor).__name__)
        first_name, first = next(iter(planes.items()))
        _require(first.dim() == 2, self, first_name, "two dimensions", list(first.shape))
        n, k = self.shape
        self._check_k(k)
        for name, tensor in planes.items():
            plane = self.planes[name]
            shape = [n, *plane.trailing(k)]
            _require(tensor.dtype == plane.dtype, self, name, plane.dtype, tensor.dtype)
            _require(list(tensor.shape) == shape, self, name, shape, list(tensor.shape))
            _require(tensor.device == first.device, self, name, first.device, tensor.device)
            _require(tensor.is_contiguous(), self, name, "a contiguous tensor", f"strides {tensor.stride()}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): rows, and weights in a row."""
        name, plane = next(iter(self.planes.items()))
        n, columns = getattr(self, name).shape
        return n, columns // plane.columns * plane.weights_per_item

    @property
    def device(self) -> torch.device:
        return next(iter(self.planes_dict().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes_dict().values())

    @classmethod
    def empty(cls, n: int, k: int, device: torch.device | str) -> Self:
        """Allocated planes of unspecified content, for `write_rows`; `device` may be "meta"."""
        cls._check_k(k)
        if n < 0:
            raise ShapeError(f"rows: expected at least 0, found {n}", field=cls.__name__)
        return cls.from_planes(
            {
                name: torch.empty((n, *plane.trailing(k)), dtype=plane.dtype, device=device)
                for name, plane in cls.planes.items()
            }
        )

    @classmethod
    def from_blocks(cls, blocks: Tensor, k: int) -> Self:
        """blocks: uint8 [N, row_bytes], the bytes of the file. The planes are on the device of `blocks`."""
        cls._check_k(k)
        cls._check_blocks(blocks, k)
        packed = cls.empty(blocks.shape[0], k, blocks.device)
        packed.write_rows(0, blocks)
        return packed

    @classmethod
    def from_planes(cls, planes: Mapping[str, Tensor]) -> Self:
        """Planes by name, as `planes_dict` gives them. Raises ShapeError for absent, extra or unfit planes."""
        if planes.keys() != cls.planes.keys():
            raise ShapeError(f"expected planes {list(cls.planes)}, found {list(planes)}", field=cls.__name__)
        return cls(**planes)

    @classmethod
    def concat_rows(cls, parts: Sequence[Self]) -> Self:
        """The rows of `parts`, in order, in planes of their own. All have one K and one device."""
        if not parts:
            raise ShapeError("expected at least one part, found none", field=cls.__name__)
        for part in parts:
            if type(part) is not cls or part.shape[1] != parts[0].shape[1] or part.device != parts[0].device:
                raise ShapeError(
                    f"expected rows of K = {parts[0].shape[1]} on {parts[0].device}, "
                    f"found {type(part).__name__} of K = {part.shape[1]} on {part.device}",
                    field=cls.__name__,
                )
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.planes})

    def planes_dict(self) -> dict[str, Tensor]:
        """Planes by name, in declared order; not copies."""
        return {name: getattr(self, name) for name in self.planes}

    def slice_rows(self, start: int, stop: int) -> Self:
        """Rows [start, stop) as views of the same memory."""
        n = self.shape[0]
        _require(0 <= start <= stop <= n, self, "rows", f"rows within [0, {n})", f"[{start}, {stop})")
        return type(self)(**{name: plane[start:stop] for name, plane in self.planes_dict().items()})

    def to(self, device: torch.device | str) -> Self:
        """The same rows on `device`; the planes themselves where they are there already."""
        return type(self)(**{name: plane.to(device) for name, plane in self.planes_dict().items()})

    def dequantize(self, rows: slice | Tensor | None = None) -> Tensor:
        """Exact weights, float32 [N, K], bit-identical to `gguf.quants.dequantize`.

        rows: only these rows are read: a slice, or int32 or int64 row ids [...] which give [..., K].
        """
        decode = type(self).decode
        planes = self.planes_dict().values()
        if isinstance(rows, Tensor):
            is_id = rows.dtype in (torch.int32, torch.int64)
            _require(is_id, self, "rows", "int32 or int64 ids", rows.dtype)
            return decode(*[plane[rows] for plane in planes])
        chosen = [plane if rows is None else plane[rows] for plane in planes]
        n, k = chosen[0].shape[0], self.shape[1]
        slices = list(self._row_slices(n, k))
        if len(slices) <= 1:
            return decode(*chosen)
        weights = torch.empty((n, k), dtype=torch.float32, device=self.device)
        for part in slices:
            weights[part] = decode(*[plane[part] for plane in chosen])
        return weights

    def write_rows(self, start: int, blocks: Tensor) -> None:
        """Unpacks file bytes into rows [start, start + n) of the planes.

        blocks: uint8 [n, row_bytes], on the device of the planes.
        """
        n, k = self.shape
        self._check_blocks(blocks, k)
        _require(blocks.device == self.device, self, "blocks", self.device, blocks.device)
        stop = start + blocks.shape[0]
        _require(start >= 0 and stop <= n, self, "blocks", f"rows within [0, {n})", f"[{start}, {stop})")
        for rows in self._row_slices(blocks.shape[0], k):
            part = blocks[rows].contiguous()
            if part.storage_offset() % 2:
                part = part.clone()  # int16 views start at even bytes
            target = self.slice_rows(start + rows.start, start + rows.stop)
            fields = self._fields(part)
            for name, plane in self.planes.items():
                if plane.order is None:
                    target._items(name).copy_(fields[name])
                else:
                    unpacked = plane.order.unpack(fields[name].view(torch.uint8))
                    getattr(target, name).copy_(unpacked.view(getattr(target, name).shape))

    def to_blocks(self) -> Tensor:
        """The bytes the planes were made from: uint8 [N, row_bytes], on the same device."""
        n, k = self.shape
        blocks = torch.empty((n, row_bytes(self.ggml_type, k)), dtype=torch.uint8, device=self.device)
        for rows in self._row_slices(n, k):
            source = self.slice_rows(rows.start, rows.stop)
            fields = self._fields(blocks[rows])
            for name, plane in self.planes.items():
                if plane.order is None:
                    fields[name].copy_(source._items(name))
                else:
                    block_shape = plane.trailing(BLOCK_FORMATS[self.ggml_type].block_size)
                    packed = plane.order.pack(getattr(source, name).view(-1, *block_shape))
                    fields[name].copy_(packed.view(torch.int16))
        return blocks

    @classmethod
    def _fields(cls, blocks: Tensor) -> dict[str, Tensor]:
        """Views of uint8 [n, row_bytes], contiguous: words [B, bytes / size] for each plane, of all B blocks."""
        type_size, word = BLOCK_FORMATS[cls.ggml_type].type_size, cls._word()
        size = word.itemsize
        words = blocks.view(word).view(blocks.numel() // type_size, type_size // size)
        return {name: words[:, plane.start // size : plane.stop // size] for name, plane in cls.planes.items()}

    @classmethod
    def _word(cls) -> torch.dtype:
        """What is copied at a time: two bytes, or one where blocks have an odd number of them."""
        return torch.uint8 if BLOCK_FORMATS[cls.ggml_type].type_size % 2 else torch.int16

    def _items(self, name: str) -> Tensor:
        """A plane that keeps the bytes of the file, as words [B, bytes / size]."""
        plane, word = self.planes[name], self._word()
        tensor: Tensor = getattr(self, name)
        return tensor.view(word).view(-1, (plane.stop - plane.start) // word.itemsize)

    @classmethod
    def _row_slices(cls, n: int, k: int) -> Iterator[slice]:
        step = max(1, SLICE_BYTES // row_bytes(cls.ggml_type, k))
        return (slice(start, min(start + step, n)) for start in range(0, n, step))

    @classmethod
    def _check_k(cls, k: int) -> None:
        block_size = BLOCK_FORMATS[cls.ggml_type].block_size
        if k <= 0 or k % block_size:
            raise ShapeError(f"expected K a positive multiple of {block_size}, found {k}", field=cls.__name__)

    @classmethod
    def _check_blocks(cls, blocks: Tensor, k: int) -> None:
        width = row_bytes(cls.ggml_type, k)
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != width:
            raise ShapeError(
                f"expected uint8 [rows, {width}] for K = {k}, found {blocks.dtype} {list(blocks.shape)}",
                field=f"{cls.__name__}.blocks",
            )


def _require(condition: bool, packed: QuantTensor, field: str, expected: object, found: object) -> None:
    if not condition:
        raise ShapeError(f"expected {expected}, found {found}", field=f"{type(packed).__name__}.{field}")


_Format = TypeVar("_Format", bound=type[QuantTensor])


def register_format(ggml_type: GGMLType) -> Callable[[_Format], _Format]:
    """Class decorator: this container holds the tensors of `ggml_type`. A type has one container."""

    def register(container: _Format) -> _Format:
        assert ggml_type not in _FORMATS, f"{ggml_type.name} is registered twice"
        container.ggml_type = ggml_type
        _FORMATS[ggml_type] = container
        return container

    return register


def registered_formats() -> Mapping[GGMLType, type[QuantTensor]]:
    """Container classes by type id, in order of registration. Complete once `gemma4.quant.formats` is imported."""
    return MappingProxyType(_FORMATS)
