"""Gemma 4 files of the whole family: per-layer inputs, experts, and the type mixes of llama.cpp's quantizer.

model = quantize(shrunken("26B-A4B"), "Q4_K_M")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tests.tiny_gguf import (
    GEMMA4_12B,
    GEMMA4_26B,
    GEMMA4_31B,
    GEMMA4_E2B,
    GEMMA4_E4B,
    Model,
    Sizes,
    Tensor,
    gemma4,
    more_bits,
)


def with_per_layer_inputs(sizes: Sizes, shared: int, size: int, *, keeps_unused: bool) -> Model:
    """A model with per-layer embeddings whose last `shared` layers read other layers' keys and values."""
    model = gemma4(sizes, {"matrix": "Q4_K"})
    model.metadata |= {
        "gemma4.embedding_length_per_layer_input": size,
        "gemma4.attention.shared_kv_layers": shared,
    }
    model.tensors |= {
        "per_layer_token_embd.weight": Tensor((sizes.vocab, size * sizes.layers), "Q6_K"),
        "per_layer_model_proj.weight": Tensor((size * sizes.layers, sizes.hidden), "BF16"),
        "per_layer_proj_norm.weight": Tensor((size,), "F32"),
    }
    for i in range(sizes.layers):
        model.tensors |= {
            f"blk.{i}.inp_gate.weight": Tensor((size, sizes.hidden), "Q4_K"),
            f"blk.{i}.proj.weight": Tensor((sizes.hidden, size), "Q4_K"),
            f"blk.{i}.post_norm.weight": Tensor((sizes.hidden,), "F32"),
        }
        if i >= sizes.layers - shared and not keeps_unused:
            for role in ("attn_k", "attn_v", "attn_k_norm"):
                del model.tensors[f"blk.{i}.{role}.weight"]
    return model


def with_experts(sizes: Sizes, experts: int, used: int, ffn: int, *, joined: bool) -> Model:
    """A model with a router and experts beside the MLP; joined: their gate and up rows in one tensor."""
    model = gemma4(sizes, {"matrix": "Q4_K", "ffn_down": "Q8_0"})  # 2112 is no multiple of 256
    counts = {"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": ffn}
    model.metadata |= {f"gemma4.{key}": count for key, count in counts.items()}
    hidden = sizes.hidden
    first = {"gate_up": 2 * ffn} if joined else {"gate": ffn, "up": ffn}
    for i in range(sizes.layers):
        block = f"blk.{i}."
        model.tensors |= {
            f"{block}ffn_{name}_exps.weight": Tensor((experts, rows, hidden), "Q4_K") for name, rows in first.items()
        }
        model.tensors |= {
            f"{block}ffn_down_exps.weight": Tensor((experts, hidden, ffn), "Q8_0"),
            f"{block}ffn_down_exps.scale": Tensor((experts,), "F32"),
            f"{block}ffn_gate_inp.weight": Tensor((experts, hidden), "F32"),
            f"{block}ffn_gate_inp.scale": Tensor((hidden,), "F32"),
        }
        for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
            model.tensors[f"{block}{name}.weight"] = Tensor((hidden,), "F32")
    return model


# As large as the format allows to be small: types of 256 weights fit where they fit in the real size, and only there.
_SMALL = Sizes(8, 256, 256, 8, (4, 1), (32, 64), vocab=64, window=16, context=512, period=4)
_SMALL_E2B = Sizes(8, 256, (256,) * 4 + (512,) * 4, 8, (1, 1), (32, 64), 64, 16, 512, period=4, k_eq_v=False)
_SMALL_E4B = Sizes(8, 256, 256, 8, (2, 2), (32, 64), vocab=64, window=16, context=512, period=4, k_eq_v=False)
_SMALL_26B = Sizes(8, 256, 96, 8, (4, 2), (32, 64), vocab=64, window=16, context=512, period=4)

FULL_SIZE: Final[Mapping[str, Callable[[], Model]]] = {
    "E2B": lambda: with_per_layer_inputs(GEMMA4_E2B, 20, 256, keeps_unused=True),
    "E4B": lambda: with_per_layer_inputs(GEMMA4_E4B, 18, 256, keeps_unused=True),
    "12B": lambda: gemma4(GEMMA4_12B),
    "26B-A4B": lambda: with_experts(GEMMA4_26B, 128, 8, 704, joined=True),
    "31B": lambda: gemma4(GEMMA4_31B),
}
SHRUNKEN: Final[Mapping[str, Callable[[], Model]]] = {
    "E2B": lambda: with_per_layer_inputs(_SMALL_E2B, 4, 256, keeps_unused=True),
    "E4B": lambda: with_per_layer_inputs(_SMALL_E4B, 4, 256, keeps_unused=True),
    "12B": lambda: gemma4(_SMALL),
    "26B-A4B": lambda: with_experts(_SMALL_26B, 4, 2, 32, joined=True),
    "31B": lambda: gemma4(_SMALL),
}

_BASE: Final = {
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "IQ4_XS": "IQ4_XS",
    "MXFP4_MOE": "Q8_0",
}
RECIPES: Final = tuple(_BASE)
# What is taken where rows are no multiple of 256 weights.
_FALLBACK: Final = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_KEPT: Final = {"ffn_gate_inp": "F32", "per_layer_model_proj": "BF16"}


def quantize(model: Model, recipe: str) -> Model:
    """Gives the matrices of `model` the types of llama-quantize's recipe (Q4_0 and IQ4_XS: with an importance matrix).

    Returns the model.
    """
    layers = model.metadata["gemma4.block_count"]
    kv_heads = model.metadata["gemma4.attention.head_count_kv"]
    heads_per_kv = model.metadata["gemma4.attention.head_count"] // kv_heads[0]
    values = [name for name in model.tensors if name.endswith(".attn_v.weight")]
    for name, tensor in model.tensors.items():
        role = name.removesuffix(".weight").split(".")[-1]
        if len(tensor.shape) == 1 or name.endswith(".scale"):
            continue
        if role == "attn_v":
            kind = _type(recipe, role, values.index(name), len(values), heads_per_kv)
        elif name.startswith("blk."):
            kind = _type(recipe, role, int(name.split(".")[1]), layers, heads_per_kv)
        else:
            kind = "Q8_0" if _BASE[recipe] == "Q8_0" else "Q6_K"
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        fits = tensor.shape[-1] % block == 0
        model.retype(name, _KEPT.get(role, kind if fits else _FALLBACK[kind]))
    return model


def _type(recipe: str, role: str, i: int, n: int, heads_per_kv: int) -> str:
    """The type of the i-th of n tensors of one role."""
    is_v, is_down = role == "attn_v", role.startswith("ffn_down")
    match recipe:
        case "Q4_K_M" | "Q5_K_M" if (is_v or is_down) and more_bits(i, n):
            return "Q6_K"
        case "Q4_K_S" if (is_v and i < 4) or (is_down and i < n // 8):
            return "Q5_K"
        case "Q4_0" if is_down and i < n // 8:
            return "Q4_1"
        case "IQ4_XS" if is_v and heads_per_kv >= 4:
            return "Q5_K"
        case "MXFP4_MOE" if role.endswith("_exps"):
            return "MXFP4"
    return _BASE[recipe]
