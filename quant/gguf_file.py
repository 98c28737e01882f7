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

import errno
import logging
import mmap
import os
import re
import stat
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from gemma4.quant.errors import (
    FileMissingError,
    FileUnreadableError,
    MalformedError,
    MissingPartError,
    MissingTensorError,
    NotGGUFError,
    TruncatedError,
    UnsupportedTypeError,
)
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType, describe_type, row_bytes
from gemma4.quant.gguf_header import (
    INT64_MAX,
    MAGIC,
    Header,
    Limits,
    MetadataValue,
    TensorEntry,
    parse_header,
)

__all__ = ["GGUFFile", "Limits", "MetadataValue", "TensorInfo"]

_log = logging.getLogger(__name__)

_HEAD_BYTES: Final = 4096
_PART_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PIECE_NAME: Final = re.compile(r"\.part\d+of\d+|\.part-?[a-z0-9]+$|-split-[a-z]+$")
_NAMES_LISTED: Final = 100
# Without reserving swap, a file larger than the memory can still be mapped.
_MAP_FLAGS: Final = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)

_KNOWN_HEADS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"version https://git-lfs", "this is a git-LFS pointer, not the model it stands for: run `git lfs pull`"),
    (b"\x1f\x8b", "this is a gzip file: decompress it first"),
    (b"\xfd7zXZ\0", "this is an xz file: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "this is a zstandard file: decompress it first"),
    (b"BZh", "this is a bzip2 file: decompress it first"),
    (b"PK\3\4", "this is a zip archive or a PyTorch checkpoint: unpack it, or convert the model to GGUF"),
    (b"tjgg", "this is a GGJT file, from before GGUF: convert the model again with a current llama.cpp"),
    (b"fmgg", "this is a GGMF file, from before GGUF: convert the model again with a current llama.cpp"),
    (b"lmgg", "this is a GGML file, from before GGUF: convert the model again with a current llama.cpp"),
    (b"FUGG", "the magic is byte-swapped: this is a big-endian file, expected little-endian"),
    (b"{", "this is JSON text, often a server's error message saved as a file: download the model again"),
)


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


class GGUFFile:
    """An open GGUF file or split set. A context manager; see the module for what `open` guarantees.

    path: as given to `open`. paths: every part, in order. version, alignment: of the first part.
    metadata: of the first part. tensors: of all parts, in file order. file_bytes: of all parts.
    unclaimed_bytes: bytes of all parts that neither header, tensor nor alignment padding accounts for.
    """

    def __init__(self, path: Path, parts: tuple[_Part, ...], tensors: dict[str, TensorInfo]) -> None:
        header = parts[0].header
        self.path = path
        self.paths = tuple(part.path for part in parts)
        self.version = header.version
        self.alignment = header.alignment
        self.metadata: Mapping[str, MetadataValue] = MappingProxyType(header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.file_bytes = sum(part.size for part in parts)
        self.unclaimed_bytes = sum(
            _unclaimed_bytes(part, [t for t in tensors.values() if t.part == index]) for index, part in enumerate(parts)
        )
        self._parts: tuple[_Part, ...] | None = parts
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
            opened = _Part(path, limits)
            undo.callback(opened.close)
            parts = []
            for part_path in _split_paths(opened):
                part = opened if part_path == path else _Part(part_path, limits)
                undo.callback(part.close)
                parts.append(part)
            _check_split(parts)
            gguf = cls(path, tuple(parts), _place_tensors(parts))
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
        return self._parts[info.part].view(info)

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


class _Part:
    """One mapped file with its parsed header."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self._map = _map_file(path)
        self.size = len(self._map)
        try:
            self.header: Header = parse_header(self._map, path, limits)
        except BaseException:
            self.close()
            raise

    @property
    def data_start(self) -> int:
        return _align(self.header.end_bytes, self.header.alignment)

    def view(self, info: TensorInfo) -> memoryview:
        end = info.offset + info.nbytes
        size = self._map.size()
        if size < end:
            raise TruncatedError(
                f"the file was cut to {size} bytes while open, but the tensor ends at byte {end}",
                path=self.path,
                field=info.name,
                offset=info.offset,
            )
        return memoryview(self._map)[info.offset : end]

    def close(self) -> None:
        try:
            self._map.close()
        except BufferError:
            # Views are still in use: the map goes away with the last of them.
            _log.debug("%s: closed while views on it exist", self.path)


def _map_file(path: Path) -> mmap.mmap:
    try:
        # Looking before opening: opening a device can have effects, and a FIFO without a writer blocks.
        _check_regular(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            _check_regular(path, status)
            _check_magic(path, os.pread(fd, _HEAD_BYTES, 0), status.st_size)
            return mmap.mmap(fd, status.st_size, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise FileMissingError("there is no file at this path", path=path) from error
    except OSError as error:
        message = f"cannot open or map the file: {error.strerror}"
        raise FileUnreadableError(message, path=path, os_errno=error.errno or errno.EIO) from error


def _check_regular(path: Path, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    raise NotGGUFError(f"this is {kinds.get(stat.S_IFMT(mode), 'no regular file')}, expected a GGUF file", path=path)


def _check_magic(path: Path, head: bytes, size: int) -> None:
    if head.startswith(MAGIC):
        return
    if MAGIC.startswith(head):
        raise TruncatedError(
            f"the file has {size} bytes, a GGUF header needs at least 24: fetch the file again", path=path, offset=0
        )
    raise NotGGUFError(f"not a GGUF file: {_name_format(path, head, size)}", path=path, offset=0)


def _name_format(path: Path, head: bytes, size: int) -> str:
    if not head.strip(b"\0"):
        return f"it begins with {len(head)} zero bytes, as a download does that never completed: fetch it again"
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<!--)", head.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE):
        return "this is an HTML page, often a login or error page saved in place of the model: download it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "this is a safetensors file: convert the model to GGUF first"
    for start, cause in _KNOWN_HEADS:
        if head.startswith(start):
            return cause
    if _PIECE_NAME.search(path.name):
        return f"it starts with {head[:4]!r}, and its name is that of a raw piece: join all pieces in order first"
    return f"it starts with {head[:4]!r}, expected {MAGIC!r}"


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _split_paths(part: _Part) -> list[Path]:
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
            f"{len(missing)} of the {count} parts are not in {part.path.parent}: {_list_names(missing)}; "
            "download them to the same directory",
            path=part.path,
            field="split.count",
        )
    return paths


def _check_split(parts: list[_Part]) -> None:
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
                    f"the parts contradict each other: {value!r} here, {shared!r} in {first.path.name}; "
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


def _split_number(part: _Part, key: str, default: int | None) -> int:
    value = part.header.metadata.get(key, default)
    if value is None:
        raise MalformedError("a part of a split file lacks this key", path=part.path, field=key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 100_000_000:
        raise MalformedError(f"found {value!r}, expected a count", path=part.path, field=key)
    return value


def _place_tensors(parts: list[_Part]) -> dict[str, TensorInfo]:
    _check_types(parts)
    tensors: dict[str, TensorInfo] = {}
    for index, part in enumerate(parts):
        placed = []
        for entry in part.header.tensors:
            info = _place(part, index, entry)
            if entry.name in tensors:
                other = parts[tensors[entry.name].part].path.name
                raise MalformedError(
                    f"two tensors have this name, the other in {other}",
                    path=part.path,
                    field=entry.name,
                    offset=entry.at,
                )
            tensors[entry.name] = info
            placed.append(info)
        _check_bounds(part, placed)
    return tensors


def _check_types(parts: list[_Part]) -> None:
    unknown: dict[int, list[str]] = {}
    culprits = []
    for part in parts:
        for entry in part.header.tensors:
            if entry.type_id not in BLOCK_FORMATS:
                unknown.setdefault(entry.type_id, []).append(entry.name)
                culprits.append((part, entry))
    if culprits:
        part, entry = culprits[0]
        listed = "; ".join(f"type {describe_type(t)}: {_list_names(names)}" for t, names in sorted(unknown.items()))
        raise UnsupportedTypeError(
            f"{len(culprits)} tensors have a type that is not read here: {listed}. "
            "Use a file quantized to ggml's own types",
            path=part.path,
            field=entry.name,
            offset=entry.at,
        )


def _place(part: _Part, index: int, entry: TensorEntry) -> TensorInfo:
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


def _check_bounds(part: _Part, tensors: list[TensorInfo]) -> None:
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


def _unclaimed_bytes(part: _Part, tensors: list[TensorInfo]) -> int:
    unclaimed, end = 0, part.header.end_bytes
    for start, nbytes in sorted((t.offset, t.nbytes) for t in tensors):
        unclaimed += start - _align(end, part.header.alignment)
        end = start + nbytes
    return unclaimed + max(0, part.size - _align(end, part.header.alignment))


def _list_names(names: list[str]) -> str:
    more = len(names) - _NAMES_LISTED
    return ", ".join(names[:_NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")
