"""Gemma 4 GGUF files in PyTorch: packed and exact weights, fast on one GPU, ahead-of-time export.

from gemma4 import Gemma4
model = Gemma4.from_gguf("gemma-4-31b-it-Q4_K_M.gguf")
print(model.chat([{"role": "user", "content": "hi"}]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemma4.quant.errors import Gemma4Error

if TYPE_CHECKING:
    from gemma4.api import Gemma4

__all__ = ["Gemma4", "Gemma4Error", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; reading headers does without it.
    if name == "Gemma4":
        from gemma4.api import Gemma4

        return Gemma4
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# `gemma4.export` is a folder without code of its own (it may not be a package named `export`): these are its names.
_EXPORTERS = {"export_aoti": "aoti", "export_executorch": "executorch", "ExportedGemma4": "runtime"}


def _exporter(name: str) -> Any:
    if name in _EXPORTERS:
        return getattr(import_module(f"gemma4.export.{_EXPORTERS[name]}"), name)
    raise AttributeError(f"module 'gemma4.export' has no attribute {name!r}")


import_module("gemma4.export").__getattr__ = _exporter  # type: ignore[method-assign]
