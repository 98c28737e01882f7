"""Packed weights as a safetensors file: planes as they are in memory, ready to be mapped.

Each plane is one entry `NAME::PLANE`. The metadata holds, beside the caller's own strings:
    packed.version  version of this layout
    packed.types    JSON object, tensor name -> GGML type name
    packed.crc32    CRC-32 of every byte of the file, its own eight hexadecimal digits taken as zeros

The writer is ours rather than the safetensors package's, for three things that one does not do: planes are streamed
one by one, whatever device they are on; the same input gives the same bytes; the file is replaced atomically. Reading
is left to the package.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma4.quant.atomic_write import atomic_write
from gemma4.quant.errors import (
    FileMissingError,
    FileUnreadableError,
    MalformedError,
    MetadataError,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
    UnsupportedFeatureError,
    UnsupportedTypeError,
)
from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType

__all__ = ["load_packed", "save_packed"]

VERSION: Final = "1"

_OWN: Final = "packed."
_SEPARATOR: Final = "::"
_ALIGNMENT: Final = 64
_CRC_FIELD: Final = b'"packed.crc32":"'
_NO_CRC: Final = b"00000000"
_READ_BYTES: Final = 8 << 20
_DTYPE_NAMES: Final = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def save_packed(path: str | os.PathLike[str], tensors: Mapping[str, QuantTensor], metadata: Mapping[str, str]) -> None:
    """Writes `tensors` to `path`, atomically: it holds the old content or the new, whole and on the disk.

    metadata: returned by `load_packed`; keys must not start with "packed.". Raises MetadataError for unfit metadata,
    ShapeError for a tensor without storage, FileUnwritableError where writing fails.
    """
    path = Path(path)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key.startswith(_OWN):
            raise MetadataError(
                f"expected strings, and keys not in {_OWN}*, found {value!r}", path=path, field=str(key)
            )
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ShapeError("expected planes with storage, found the meta device", path=path, field=name)
    planes = _in_file_order(tensors)
    header = _header(planes, tensors, metadata)
    crc = zlib.crc32(header)
    with atomic_write(path) as file:
        file.write(header)
        for _, plane in planes:
            host = plane.detach().cpu()
            if host.nbytes:  # zlib takes the null pointer of an empty tensor for a request to start anew
                crc = zlib.crc32(_buffer(host), crc)
                file.write(_buffer(host))
        file.seek(header.index(_CRC_FIELD) + len(_CRC_FIELD))
        file.write(f"{crc:08x}".encode())


def load_packed(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, verify: bool = False
) -> tuple[dict[str, QuantTensor], dict[str, str]]:
    """The tensors of a file of `save_packed`, in the order they were given in, and the caller's metadata.

    On the CPU the planes are views on a private map of the file: nothing is read before it is used, and writing to
    them does not change the file. verify: first reads the whole file and compares its checksum.

    Raises FileMissingError, FileUnreadableError, MalformedError, MetadataError, MissingTensorError,
    UnexpectedTensorError, ShapeError or UnsupportedFeatureError.
    """
    path = Path(path)
    _check_readable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            types = _types(metadata, path)
            if verify:
                _check_crc(path, metadata)
            tensors = _assemble({name: file.get_tensor(name) for name in file.keys()}, types, path)  # noqa: SIM118
    except SafetensorError as error:
        raise MalformedError(f"not a whole safetensors file: {error}", path=path) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    own = {key: value for key, value in metadata.items() if not key.startswith(_OWN)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}, own


def _in_file_order(tensors: Mapping[str, QuantTensor]) -> list[tuple[str, Tensor]]:
    """Planes by entry name; wide elements first, so that each is aligned without holes, which the format forbids."""
    planes = [
        (f"{name}{_SEPARATOR}{plane}", data)
        for name, tensor in tensors.items()
        for plane, data in tensor.planes_dict().items()
    ]
    return sorted(planes, key=lambda entry: -entry[1].element_size())


def _header(planes: list[tuple[str, Tensor]], tensors: Mapping[str, QuantTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and header of the safetensors file, the checksum still zeros."""
    types = {name: tensor.ggml_type.name for name, tensor in tensors.items()}
    own = {
        "packed.version": VERSION,
        "packed.crc32": _NO_CRC.decode(),
        "packed.types": json.dumps(types, ensure_ascii=False),
    }
    entries: dict[str, object] = {"__metadata__": own | dict(metadata)}
    offset = 0
    for name, plane in planes:
        entries[name] = {
            "dtype": _DTYPE_NAMES[plane.dtype],
            "shape": list(plane.shape),
            "data_offsets": [offset, offset + plane.nbytes],
        }
        offset += plane.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _buffer(host: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a contiguous tensor in host memory, not a copy: valid while the tensor lives."""
    return (ctypes.c_char * host.nbytes).from_address(host.data_ptr())


def _check_readable(path: Path) -> None:
    # Opening a FIFO or a device would block or never end.
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FileMissingError("no such file", path=path) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise FileUnreadableError("is not a regular file", path=path, os_errno=errno.EINVAL)


def _unreadable(path: Path, error: OSError) -> FileUnreadableError:
    reason = error.strerror or str(error)
    return FileUnreadableError(f"cannot read: {reason}", path=path, os_errno=error.errno or errno.EIO)


def _types(metadata: Mapping[str, str], path: Path) -> dict[str, GGMLType]:
    version = metadata.get("packed.version")
    if version is None:
        raise MetadataError("absent: not a file of packed weights", path=path, field="packed.version")
    if version != VERSION:
        message = f"layout version {version!r}, this library reads {VERSION!r}"
        raise UnsupportedFeatureError(message, path=path, field="packed.version")
    try:
        names: object = json.loads(metadata.get("packed.types", ""))
    except (json.JSONDecodeError, RecursionError) as error:
        raise MetadataError(f"not JSON: {error}", path=path, field="packed.types") from error
    if not isinstance(names, dict):
        found = type(names).__name__
        raise MetadataError(f"expected an object of type names, found {found}", path=path, field="packed.types")
    types = {}
    for name, type_name in names.items():
        if not isinstance(type_name, str) or type_name not in GGMLType.__members__:
            message = f"expected the name of a GGML type for {name!r}, found {type_name!r}"
            raise MetadataError(message, path=path, field="packed.types")
        types[name] = GGMLType[type_name]
    return types


def _assemble(entries: dict[str, Tensor], types: Mapping[str, GGMLType], path: Path) -> dict[str, QuantTensor]:
    tensors: dict[str, QuantTensor] = {}
    for name, ggml_type in types.items():
        try:
            container = container_for(ggml_type)
            planes = {plane: entries.pop(f"{name}{_SEPARATOR}{plane}") for plane in container.planes}
            tensors[name] = container.from_planes(planes)
        except KeyError as error:
            raise MissingTensorError(f"{ggml_type.name} without its plane {error}", path=path, field=name) from error
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(error.message, path=path, field=name) from error
        except ShapeError as error:
            raise ShapeError(f"{error.field}: {error.message}", path=path, field=name) from error
    if entries:
        name = next(iter(entries))
        raise UnexpectedTensorError("belongs to no tensor of packed.types", path=path, field=name)
    return tensors


def _check_crc(path: Path, metadata: Mapping[str, str]) -> None:
    recorded = metadata.get("packed.crc32")
    with open(path, "rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
        start = header.find(_CRC_FIELD) + len(_CRC_FIELD)
        crc = zlib.crc32(header[:start] + _NO_CRC + header[start + len(_NO_CRC) :])
        while chunk := file.read(_READ_BYTES):
            crc = zlib.crc32(chunk, crc)
    if recorded != f"{crc:08x}":
        raise MalformedError(f"checksum of the file is {crc:08x}, recorded is {recorded}: damaged", path=path)
