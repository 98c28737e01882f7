"""One way to open what a model is loaded from: a GGUF file, or a directory with a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from gemma4.hf_checkpoint import HFCheckpoint
from gemma4.quant.gguf_file import GGUFFile

__all__ = ["open_weights"]


def open_weights(path: str | Path) -> GGUFFile | HFCheckpoint:
    """Opens the directory or file at `path`; a file may be any part of a split one.

    Raises the errors of `HFCheckpoint.open` for a directory and those of `GGUFFile.open` for all else.
    """
    return HFCheckpoint.open(path) if Path(path).is_dir() else GGUFFile.open(path)
