"""Open a GGUF file of any architecture, whole or split, and hand out its tensors' bytes without copying them.

    with GGUFFile.open("model.gguf") as gguf:
        gguf.metadata["general.architecture"], gguf.tensors["token_embd.weight"].shape
        gguf.data("token_embd.weight")

Opening reads only the header. What it accepts: every tensor lies inside its file, aligned, and overlaps no other.
What opening does not read is the weights: a damaged weight is not seen here.

The tensors are views on a private map of the file: writing to a view changes the copy in memory, never the file.
A file replaced by another while open keeps its old bytes. A file cut short in place is noticed by `data`; reading a
view handed out before that ends the process with SIGBUS, as with any memory map.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from gemma4.quant.errors import MalformedError, MissingPartError, MissingTensorError
from gemma4.quant.gguf_header import Limits, MetadataValue
from gemma4.quant.gguf_part import GGUFPart
from gemma4.quant.gguf_tensors import TensorInfo, list_names, place_tensors, unclaimed_bytes

__all__ = ["GGUFFile", "Limits", "MetadataValue", "TensorInfo"]

_log = logging.getLogger(__name__)

_PART_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFFile:
    """An open GGUF file or split set. A context manager; see the module for what `open` guarantees.

    path: as given to `open`. paths: every part, in order. version, alignment: of the first part.
    metadata: of the first part. tensors: of all parts, in file order. file_bytes: of all parts.
    unclaimed_bytes: bytes of all parts that neither header, tensor nor alignment padding accounts for.
    """

    def __init__(self, path: Path, parts: tuple[GGUFPart, ...], tensors: dict[str, TensorInfo]) -> None:
        header = parts[0].header
        self.path = path
        self.paths = tuple(part.path for part in parts)
        self.version = header.version
        self.alignment = header.alignment
        self.metadata: Mapping[str, MetadataValue] = MappingProxyType(header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.file_bytes = sum(part.size for part in parts)
        self.unclaimed_bytes = unclaimed_bytes(parts, tensors.values())
        self._parts: tuple[GGUFPart, ...] | None = parts
        if self.unclaimed_bytes:
            _log.warning("%s: %d bytes belong to no tensor", path, self.unclaimed_bytes)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, limits: Limits | None = None) -> GGUFFile:
        """Open a file, or the whole set when `path` is any part of a split (`STEM-00001-of-00003.gguf`).

        Raises FileMissingError, FileUnreadableError, NotGGUFError, TruncatedError, MalformedError,
        MissingPartError, UnsupportedTypeError or UnsupportedFeatureError, all of them Gemma4Error.
        """
        path = Path(path)
        limits = limits or Limits()
        with ExitStack() as undo:
            opened = GGUFPart.open(path, limits)
            undo.callback(opened.close)
            parts = []
            for part_path in _split_paths(opened):
                part = opened if part_path == path else GGUFPart.open(part_path, limits)
                undo.callback(part.close)
                parts.append(part)
            _check_split(parts)
            gguf = cls(path, tuple(parts), place_tensors(parts))
            undo.pop_all()
            return gguf

    def data(self, name: str) -> memoryview:
        """The packed bytes of one tensor: a writable copy-on-write view of `nbytes` bytes, no copy.

        Raises MissingTensorError for an unknown name, TruncatedError when the file has been cut since it was opened.
        """
        if self._parts is None:
            raise ValueError(f"{self.path} is closed")
        info = self.tensors.get(name)
        if info is None:
            raise MissingTensorError("no tensor of this name is in the file", path=self.path, field=name)
        return self._parts[info.part].view(name, info.offset, info.nbytes)

    def close(self) -> None:
        """Give up the map. Views handed out stay valid and keep it alive; metadata stays readable."""
        parts, self._parts = self._parts, None
        for part in parts or ():
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {str(self.path)!r}: {len(self.tensors)} tensors, {self.file_bytes} bytes>"


def _split_paths(part: GGUFPart) -> list[Path]:
    """Every part of the set that `part` belongs to, in order; itself alone when it is not split."""
    count = _split_number(part, "split.count", default=1)
    if count <= 1:
        return [part.path]
    match = _PART_NAME.fullmatch(part.path.name)
    if match is None:
        raise MissingPartError(
            f"this is one of {count} parts, but its name does not tell those of the others; "
            f"expected a name like model-00001-of-{count:05}.gguf",
            path=part.path,
            field="split.count",
        )
    if int(match["count"]) != count:
        raise MalformedError(
            f"the header says {count} parts, the file's name says {int(match['count'])}; restore its name",
            path=part.path,
            field="split.count",
        )
    paths = [part.path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise MissingPartError(
            f"{len(missing)} of the {count} parts are not in {part.path.parent}: {list_names(missing)}; "
            "download them to the same directory",
            path=part.path,
            field="split.count",
        )
    return paths


def _check_split(parts: list[GGUFPart]) -> None:
    if len(parts) == 1:
        return
    first = parts[0]
    for index, part in enumerate(parts):
        number = _split_number(part, "split.no", default=None)
        if number != index:
            raise MalformedError(
                f"this is part {number + 1} by its header and part {index + 1} by its name; restore its name",
                path=part.path,
                field="split.no",
            )
        for key, value in part.header.metadata.items():
            shared = first.header.metadata.get(key, value)
            if key not in ("split.no", "general.alignment") and value != shared:
                raise MalformedError(
                    f"the parts contradict each other: {value!r:.80} here, {shared!r:.80} in {first.path.name}; "
                    "they come from different models or conversions",
                    path=part.path,
                    field=key,
                )
        _split_number(part, "split.count", default=None)
    found = sum(len(part.header.tensors) for part in parts)
    expected = _split_number(first, "split.tensors.count", default=found)
    if found != expected:
        raise MalformedError(
            f"the parts hold {found} tensors together, the header says {expected}",
            path=first.path,
            field="split.tensors.count",
        )


def _split_number(part: GGUFPart, key: str, default: int | None) -> int:
    value = part.header.metadata.get(key, default)
    if value is None:
        raise MalformedError("a part of a split file lacks this key", path=part.path, field=key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000_000:
        raise MalformedError(f"found {value!r:.80}, expected a count", path=part.path, field=key)
    return value
