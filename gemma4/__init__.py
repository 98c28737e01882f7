"""Gemma 4 GGUF files in PyTorch: packed and exact weights, fast on one GPU, ahead-of-time export.

from gemma4 import Gemma4
model = Gemma4.from_gguf("gemma-4-31b-it-Q4_K_M.gguf")
print(model.chat([{"role": "user", "content": "hi"}]))
"""

from __future__ import annotations

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
