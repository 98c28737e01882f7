"""The manifest of an exported model: what it was made from and for, so that a mismatch is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeAlias

import torch

from gemma4 import __version__
from gemma4.quant.errors import FileMissingError, Gemma4Error, MalformedError
from gemma4.quant.gguf_file import GGUFFile

Device: TypeAlias = torch.device  # a name that a field of the manifest does not hide

MANIFEST: Final = "manifest.json"
PACKAGE: Final = "model.pt2"
CONSTANTS: Final = "constants.safetensors"
FORMAT: Final = "gemma4-pt2-2"


class ArtifactMismatchError(Gemma4Error):
    """An exported model was made from another file, or for another device or version."""

    code: ClassVar[str] = "artifact_mismatch"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What an export depends on in a GGUF: its headers, which hold metadata, names, types and shapes.

    nbytes: of all parts. header_sha256: of every byte before the weights of every part.
    """

    name: str
    nbytes: int
    header_sha256: str

    @classmethod
    def of(cls, file: GGUFFile) -> FileIdentity:
        digest = hashlib.sha256()
        for part, path in enumerate(file.paths):
            offsets = [tensor.offset for tensor in file.tensors.values() if tensor.part == part]
            with open(path, "rb") as stream:
                digest.update(stream.read(min(offsets, default=path.stat().st_size)))
        return cls(file.path.name, file.file_bytes, digest.hexdigest())


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of the cache, all zeros at first."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def zeros(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.torch_dtype, device=device)


@dataclass(frozen=True, slots=True)
class Manifest:
    """target: "cpu" or "sm_90". dtype: of matrix products. state: the cache's tensors by name in the methods.

    chunk_size: most tokens of a prefill. has_fusion: whether the plan joins gate and up projections.
    dependent_kernels: those that wait for their inputs themselves (`gemma4.programmatic_edges`).
    """

    format: str
    library: str
    torch: str
    triton: str | None
    machine: str
    target: str
    dtype: str
    max_seq_len: int
    chunk_size: int
    kv_cache: str
    has_fusion: bool
    methods: tuple[str, ...]
    dependent_kernels: tuple[str, ...]
    gguf: FileIdentity
    state: Mapping[str, StateTensor]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises FileMissingError, MalformedError, or ArtifactMismatchError for another format."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            if values.get("format") != FORMAT:
                raise ArtifactMismatchError(f"found format {values.get('format')!r}, expected {FORMAT!r}", path=path)
            values["gguf"] = FileIdentity(**values["gguf"])
            values["state"] = {name: StateTensor(**tensor) for name, tensor in values["state"].items()}
            return cls(**values)
        except FileNotFoundError as error:
            raise FileMissingError("no such file: not a directory of `gemma4 export`", path=path) from error
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise MalformedError(f"not a manifest: {error}", path=path) from error

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def check_versions(self, folder: Path) -> None:
        """Raises ArtifactMismatchError where library, torch or processor differ from those of the export."""
        here = {"library": __version__, "torch": torch.__version__, "machine": platform.machine()}
        for field, found in here.items():
            made_for = getattr(self, field)
            if made_for != found:
                raise ArtifactMismatchError(
                    f"exported with {field} {made_for}, here is {found}; export it again", path=folder, field=field
                )

    def find_device(self, folder: Path) -> Device:
        """Where it runs. Raises ArtifactMismatchError where this machine has no such device."""
        if self.target == "cpu":
            return torch.device("cpu")
        found = target_of(torch.device("cuda", 0)) if torch.cuda.is_available() else "no CUDA device"
        if found != self.target:
            raise ArtifactMismatchError(
                f"exported for {self.target}, here is {found}; export it here", path=folder, field="target"
            )
        return torch.device("cuda", torch.cuda.current_device())

    def check_file(self, file: GGUFFile, folder: Path) -> None:
        """Raises ArtifactMismatchError unless `file` is the one that was exported."""
        found = FileIdentity.of(file)
        if (found.nbytes, found.header_sha256) != (self.gguf.nbytes, self.gguf.header_sha256):
            raise ArtifactMismatchError(
                f"exported from {self.gguf.name} ({self.gguf.nbytes:,} bytes, header {self.gguf.header_sha256[:12]}), "
                f"found {found.name} ({found.nbytes:,} bytes, header {found.header_sha256[:12]})",
                path=folder,
                field="gguf",
            )


def target_of(device: torch.device) -> str:
    """ "cpu", or the compute capability as "sm_90"."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_version() -> str | None:
    """Of the installed package; None where there is none."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
