"""Small models whose Hugging Face side transformers has recorded in tests/data/hf: names, config.json, logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.family_gguf import with_experts, with_per_layer_inputs
from tests.tiny_gguf import Model, Sizes, gemma4

_K_EQ_V: Final = Sizes(4, 64, 96, 4, (2, 1), (16, 32), vocab=64, window=8, context=128, period=2)
_E2B: Final = Sizes(4, 64, (96, 96, 192, 192), 4, (1, 1), (16, 32), 64, 8, 128, period=2, k_eq_v=False)
IDS: Final = [2, 9, 41, 33, 0, 17, 5, 63, 62, 1, 28, 30, 11, 11, 50, 7]


def _in_bfloat16(model: Model) -> Model:
    for name, tensor in model.tensors.items():
        if name != "rope_freqs.weight":
            model.tensors[name] = type(tensor)(tensor.shape, "BF16")
    return model


HF_MODELS: Final[Mapping[str, Callable[[], Model]]] = {
    "dense": lambda: _in_bfloat16(gemma4(_K_EQ_V)),
    "untied": lambda: _in_bfloat16(gemma4(_K_EQ_V, tied=False)),
    "e2b": lambda: _in_bfloat16(with_per_layer_inputs(_E2B, 2, 16, keeps_unused=False)),
    "experts": lambda: _in_bfloat16(with_experts(_K_EQ_V, 4, 2, 24, joined=True)),
    "split experts": lambda: _in_bfloat16(with_experts(_K_EQ_V, 4, 2, 24, joined=False)),
}
