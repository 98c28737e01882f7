"""Every error this library raises about its inputs: one base class, one subclass per cause.

`str(error)` reads "PATH: FIELD: message (at byte OFFSET)" with absent parts left out. `error.code` is a
stable machine-readable name of the cause; it does not change between versions.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import ClassVar


class Gemma4Error(ValueError):
    """Base of every error about an input.

    path: the file at fault. field: the metadata key, tensor name or argument at fault.
    offset: absolute byte position in that file.
    """

    code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = Path(path) if path is not None else None
        self.field = field
        self.offset = offset

    def __str__(self) -> str:
        where = [str(part) for part in (self.path, self.field) if part is not None]
        suffix = "" if self.offset is None else f" (at byte {self.offset})"
        return ": ".join([*where, self.message]) + suffix


class NotGGUFError(Gemma4Error):
    """The path does not hold a GGUF file this library reads (another format, or no regular file)."""

    code = "not_gguf"


class TruncatedError(Gemma4Error):
    """The file ends before what its header announces."""

    code = "truncated"


class MalformedError(Gemma4Error):
    """The file contradicts itself or the GGUF format."""

    code = "malformed"


class UnsupportedTypeError(Gemma4Error):
    """A tensor is stored in a type this library does not read."""

    code = "unsupported_type"


class UnsupportedArchitectureError(Gemma4Error):
    """`general.architecture` names a model this library does not run."""

    code = "unsupported_architecture"


class UnsupportedFeatureError(Gemma4Error):
    """A valid file or request asks for something this library does not implement."""

    code = "unsupported_feature"


class MissingPartError(Gemma4Error):
    """A split GGUF lacks one or more of its parts."""

    code = "missing_part"


class MissingTensorError(Gemma4Error):
    """A tensor the model needs is not in the file."""

    code = "missing_tensor"


class UnexpectedTensorError(Gemma4Error):
    """A tensor in the file has no place in the model."""

    code = "unexpected_tensor"


class ShapeError(Gemma4Error):
    """A tensor's shape differs from what the model's configuration requires."""

    code = "shape"


class MetadataError(Gemma4Error):
    """A metadata key is missing, of the wrong type, or has an impossible value."""

    code = "metadata"


class TokenizerError(Gemma4Error):
    """The tokenizer stored in the file cannot be built or cannot encode an input."""

    code = "tokenizer"


class TemplateError(Gemma4Error):
    """The chat template cannot be compiled or rendered."""

    code = "template"


class ContextError(Gemma4Error):
    """A request runs past the end of the context."""

    code = "context"


class DrafterMismatchError(Gemma4Error):
    """A drafter was not made for the model it is to draft for."""

    code = "drafter_mismatch"


class DoesNotFitError(Gemma4Error):
    """A model and its caches need more memory than there is. `table` lists what takes it; it ends `str(error)`."""

    code = "does_not_fit"

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        offset: int | None = None,
        table: str = "",
    ) -> None:
        super().__init__(message, path=path, field=field, offset=offset)
        self.table = table

    @property
    def summary(self) -> str:
        """The sentence without the table."""
        return super().__str__()

    def __str__(self) -> str:
        return "\n".join([self.summary, *self.table.splitlines()])


class FileUnreadableError(Gemma4Error, OSError):
    """The operating system refuses to open or map the file. `errno` holds its reason."""

    code = "file_unreadable"

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        offset: int | None = None,
        os_errno: int = errno.EIO,
    ) -> None:
        super().__init__(message, path=path, field=field, offset=offset)
        self.errno = os_errno
        self.strerror = os.strerror(os_errno)
        self.filename = None if path is None else os.fspath(path)

    def __reduce__(self) -> tuple[type[FileUnreadableError], tuple[str], dict[str, object]]:
        # OSError keeps these three outside __dict__, so the default pickle would drop them.
        outside = {"errno": self.errno, "strerror": self.strerror, "filename": self.filename}
        return type(self), (self.message,), {**self.__dict__, **outside}


class FileMissingError(FileUnreadableError, FileNotFoundError):
    """There is no file at the path."""

    code = "file_missing"

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        field: str | None = None,
        offset: int | None = None,
        os_errno: int = errno.ENOENT,
    ) -> None:
        super().__init__(message, path=path, field=field, offset=offset, os_errno=os_errno)
