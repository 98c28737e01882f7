"""What planning and loading need of a checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from gemma4.quant.gguf_header import MetadataValue
from gemma4.quant.gguf_tensors import TensorInfo

__all__ = ["WeightFile"]


class WeightFile(Protocol):
    """Metadata and tensors under their GGUF names: `GGUFFile`, or a Hugging Face directory read as one."""

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, MetadataValue]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def data(self, name: str) -> memoryview:
        """The bytes of one tensor, writable, not a copy. Raises MissingTensorError or TruncatedError."""
        ...
