"""Where the tensors of a GGUF file lie: the table of the header checked against the file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gemma4.quant.errors import MalformedError, TruncatedError, UnsupportedTypeError
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType, describe_type, row_bytes
from gemma4.quant.gguf_header import INT64_MAX, TensorEntry
from gemma4.quant.gguf_part import GGUFPart

_NAMES_LISTED: Final = 100


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored.

    shape: torch order, slowest first ([N, K]; ggml's order reversed). nbytes: packed size.
    part: index into `GGUFFile.paths`. offset: absolute byte in that file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    part: int
    offset: int


def place_tensors(parts: Sequence[GGUFPart]) -> dict[str, TensorInfo]:
    """The tensors of all parts by name, in file order, each inside its file, aligned and disjoint from the others.

    Raises UnsupportedTypeError (naming all tensors concerned), MalformedError or TruncatedError.
    """
    _check_types(parts)
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        placed = []
        for entry in part.header.tensors:
            info = _place(part, index, entry)
            if entry.name in tensors:
                other = parts[tensors[entry.name].part].path.name
                raise MalformedError(
                    f"two tensors have this name, the other is in {other}",
                    path=part.path,
                    field=entry.name,
                    offset=entry.at,
                )
            tensors[entry.name] = info
            placed.append(info)
        _check_bounds(part, placed)
    return tensors


def _check_types(parts: Sequence[GGUFPart]) -> None:
    unknown: dict[int, list[str]] = {}
    culprits = []
    for part in parts:
        for entry in part.header.tensors:
            if entry.type_id not in BLOCK_FORMATS:
                unknown.setdefault(entry.type_id, []).append(entry.name)
                culprits.append((part, entry))
    if culprits:
        part, entry = culprits[0]
        listed = "; ".join(f"type {describe_type(t)}: {list_names(names)}" for t, names in sorted(unknown.items()))
        raise UnsupportedTypeError(
            f"{len(culprits)} tensors have a type that is not read here: {listed}. "
            "Use a file quantized to ggml's own types",
            path=part.path,
            field=entry.name,
            offset=entry.at,
        )


def _place(part: GGUFPart, index: int, entry: TensorEntry) -> TensorInfo:
    def malformed(message: str) -> MalformedError:
        return MalformedError(message, path=part.path, field=entry.name, offset=entry.at)

    kind = GGMLType(entry.type_id)
    weights = 1
    for dim in entry.dims:
        weights *= dim
    if weights == 0 or max(entry.dims, default=1) > INT64_MAX or weights > INT64_MAX:
        raise malformed(f"the dimensions are {list(entry.dims)}, expected a product of 1 to 2**63 - 1")
    k = entry.dims[0] if entry.dims else 1
    block = BLOCK_FORMATS[kind].block_size
    if k % block:
        raise malformed(f"rows of {k} weights do not fit {kind.name}, expected a multiple of {block}")
    if entry.offset % part.header.alignment:
        raise malformed(f"the offset {entry.offset} is not a multiple of the alignment {part.header.alignment}")
    nbytes = row_bytes(kind, k) * (weights // k)
    start = part.data_start + entry.offset
    if start + nbytes > INT64_MAX:
        raise malformed(f"the tensor ends at byte {start + nbytes}, past any file: the header is damaged")
    return TensorInfo(entry.name, entry.dims[::-1], kind, nbytes, index, start)


def _check_bounds(part: GGUFPart, tensors: list[TensorInfo]) -> None:
    cut = [t for t in tensors if t.offset + t.nbytes > part.size]
    if cut:
        needed = max(t.offset + t.nbytes for t in tensors)
        raise TruncatedError(
            f"the file has {part.size} bytes, its tensors need {needed}: {len(cut)} of {len(tensors)} tensors are cut, "
            "the first is named here; the download or copy was cut short, fetch the file again",
            path=part.path,
            field=cut[0].name,
            offset=cut[0].offset,
        )
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if previous is not None and previous.offset + previous.nbytes > tensor.offset:
            raise MalformedError(
                f"the tensor overlaps {previous.name!r}, which ends at byte {previous.offset + previous.nbytes}",
                path=part.path,
                field=tensor.name,
                offset=tensor.offset,
            )
        previous = tensor


def unclaimed_bytes(parts: Sequence[GGUFPart], tensors: Iterable[TensorInfo]) -> int:
    """Bytes of all parts that neither headers, tensors nor their alignment account for."""
    ends = [part.header.end_bytes for part in parts]
    unclaimed = 0
    for tensor in sorted(tensors, key=lambda t: t.offset):
        unclaimed += tensor.offset - parts[tensor.part].align(ends[tensor.part])
        ends[tensor.part] = tensor.offset + tensor.nbytes
    tails = (part.size - part.align(end) for part, end in zip(parts, ends, strict=True))
    return unclaimed + sum(max(0, tail) for tail in tails)


def list_names(names: Sequence[str]) -> str:
    """Names for an error message: the first hundred, and how many more."""
    more = len(names) - _NAMES_LISTED
    return ", ".join(names[:_NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")
