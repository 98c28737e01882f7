"""A Gemma 4 text configuration in Hugging Face's `config.json`, to and from the metadata of a GGUF file.

Keys, defaults and meaning are those of transformers' `Gemma4TextConfig`, and of `Gemma4UnifiedTextConfig` for the 12B,
whose text model is of the same kind. Both leave keys out that have their default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from gemma4.config import Gemma4Config, LayerKind
from gemma4.quant.errors import MetadataError, UnsupportedArchitectureError, UnsupportedFeatureError

MODEL_TYPES: Final = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

_KIND_NAMES: Final = {LayerKind.SLIDING: "sliding_attention", LayerKind.FULL: "full_attention"}
_PERIOD: Final = 6
_NEVER: Final = 1e30
"""What a pair of dimensions that does not rotate has its frequency divided by, in GGUF files."""
_DEFAULTS: Final[Mapping[str, Any]] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": None,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
_UNIFIED_DEFAULTS: Final = {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
_ROPE_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def metadata_from_config(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[float]]:
    """The `gemma4.*` metadata of a GGUF file of this model, and the values of its `rope_freqs.weight`.

    config: the object in `config.json` at `path`, of a text model or of one with vision and audio.
    Raises UnsupportedArchitectureError, UnsupportedFeatureError or MetadataError. What the values mean for the model
    is checked where a GGUF's are.
    """
    read = _Reader(config, path)
    layers = read.count("num_hidden_layers")
    kinds = read.layer_types(layers)
    is_full = [kind == _KIND_NAMES[LayerKind.FULL] for kind in kinds]
    own = read.per_layer(layers, is_full)
    head_dims = {full: {size for size, _ in own_of(own, is_full, full)} for full in (False, True)}
    if any(len(sizes) > 1 for sizes in head_dims.values()):
        raise read.error("per_layer_config", f"found head sizes {head_dims}, expected one for each type of layer")
    head_dim = next(iter(head_dims[True]), read.count("global_head_dim"))
    head_dim_sliding = next(iter(head_dims[False]), read.count("head_dim"))
    shared = read.count("num_kv_shared_layers", least=0)
    ffn = read.count("intermediate_size")
    wide = 2 * ffn if read.flag("use_double_wide_mlp") else ffn
    full_rope, sliding_rope = read.rope("full_attention"), read.rope("sliding_attention")
    keys = {
        "block_count": layers,
        "context_length": read.count("max_position_embeddings"),
        "embedding_length": read.count("hidden_size"),
        "feed_forward_length": [wide if i >= layers - shared else ffn for i in range(layers)],
        "attention.head_count": read.count("num_attention_heads"),
        "attention.head_count_kv": [heads for _, heads in own],
        "attention.layer_norm_rms_epsilon": read.value("rms_norm_eps"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.key_length_swa": head_dim_sliding,
        "attention.value_length_swa": head_dim_sliding,
        "attention.sliding_window": read.count("sliding_window"),
        "attention.sliding_window_pattern": [not full for full in is_full],
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": read.count("hidden_size_per_layer_input", least=0),
        "final_logit_softcapping": read.value("final_logit_softcapping"),
        "rope.freq_base": full_rope["rope_theta"],
        "rope.freq_base_swa": sliding_rope["rope_theta"],
    }
    if read.flag("enable_moe_block"):
        keys |= {
            "expert_count": read.count("num_experts"),
            "expert_used_count": read.count("top_k_experts"),
            "expert_feed_forward_length": read.count("moe_intermediate_size"),
        }
    rotated = int(full_rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
    factors = [1.0] * rotated + [_NEVER] * (head_dim // 2 - rotated)
    return {"general.architecture": "gemma4"} | {f"gemma4.{key}": value for key, value in keys.items()}, factors


def own_of(own: list[tuple[int, int]], is_full: list[bool], full: bool) -> list[tuple[int, int]]:
    """The entries of `own` that belong to layers of one kind."""
    return [entry for entry, is_full_layer in zip(own, is_full, strict=True) if is_full_layer is full]


def config_from_model(config: Gemma4Config, path: Path) -> dict[str, Any]:
    """The object for `config.json` of a bfloat16 text model. Raises UnsupportedFeatureError for what it cannot say."""

    def refuse(what: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(f"{what}; Hugging Face's Gemma4TextConfig has no word for that", path=path)

    if config.architecture != "gemma4":
        raise UnsupportedFeatureError(f"found {config.architecture!r}, expected 'gemma4'", path=path)
    by_kind = {kind: [layer for layer in config.layers if layer.kind is kind] for kind in LayerKind}
    if not all(by_kind.values()) or config.layers[-1].kind is not LayerKind.FULL:
        raise refuse("found layers of one kind only, or a sliding one at the end")
    sizes = {kind: {(layer.head_dim, layer.num_key_value_heads) for layer in by_kind[kind]} for kind in LayerKind}
    if any(len(found) > 1 for found in sizes.values()):
        raise refuse(f"found layers of one kind with different heads: {sizes}")
    ((head_dim, kv_heads),), ((full_head_dim, full_kv_heads),) = sizes[LayerKind.SLIDING], sizes[LayerKind.FULL]
    k_eq_v = any(layer.k_eq_v for layer in config.layers)
    if not k_eq_v and full_kv_heads != kv_heads:
        raise refuse("found other numbers of KV heads in full layers that have values of their own")
    own = [layer.intermediate_size for layer in config.layers if layer.kv_source is None]
    shared = [layer.intermediate_size for layer in config.layers if layer.kv_source is not None]
    is_wide = bool(shared) and set(shared) == {2 * own[0]}
    if len(set(own)) > 1 or (shared and not is_wide and set(shared) != {own[0]}):
        raise refuse("found intermediate sizes that differ otherwise than between layers with and without own keys")
    factors = config.rope_freq_factors or ()
    rotated = sum(factor == 1 for factor in factors)
    if any(factor != 1 for factor in factors[:rotated]) or any(factor < 1e29 for factor in factors[rotated:]):
        raise refuse("found RoPE factors other than 1 and 1e30")
    rope = {kind: dict(fields) for kind, fields in _ROPE_DEFAULTS.items()}
    rope["sliding_attention"]["rope_theta"] = config.rope_theta_sliding
    rope["full_attention"] |= {
        "rope_theta": config.rope_theta_full,
        "partial_rotary_factor": 2 * rotated / full_head_dim,
    }
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "vocab_size_per_layer_input": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": own[0],
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.layers[0].num_attention_heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": full_kv_heads if k_eq_v else None,
        "head_dim": head_dim,
        "global_head_dim": full_head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        "sliding_window": config.sliding_window,
        "layer_types": [_KIND_NAMES[layer.kind] for layer in config.layers],
        "final_logit_softcapping": config.final_logit_softcapping,
        "hidden_size_per_layer_input": config.hidden_size_per_layer_input,
        "attention_k_eq_v": k_eq_v,
        "num_kv_shared_layers": len(shared),
        "use_double_wide_mlp": is_wide,
        "enable_moe_block": config.num_experts > 0,
        "num_experts": config.num_experts or None,
        "top_k_experts": config.num_experts_per_tok or None,
        "moe_intermediate_size": config.moe_intermediate_size or None,
    }


class _Reader:
    """Typed access to the text part of a config.json."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.path = path
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            message = f"found {kind!r}, supported are {', '.join(MODEL_TYPES)}"
            raise UnsupportedArchitectureError(message, path=path, field="model_type")
        self.defaults = {**_DEFAULTS, **(_UNIFIED_DEFAULTS if "unified" in kind else {})}
        self.text = config.get("text_config", config)
        if not isinstance(self.text, Mapping):
            raise self.error("text_config", f"found {self.text!r:.80}, expected an object")
        for part in (config, self.text):
            if part.get("quantization_config") is not None:
                message = "the checkpoint is quantized; expected weights in float32, float16 or bfloat16"
                raise UnsupportedFeatureError(message, path=path, field="quantization_config")
        if self.text.get("use_bidirectional_attention") == "all":
            message = "found 'all', expected attention to what came before in text"
            raise UnsupportedFeatureError(message, path=path, field="use_bidirectional_attention")

    def error(self, key: str, message: str) -> MetadataError:
        return MetadataError(message, path=self.path, field=key)

    def value(self, key: str) -> Any:
        return self.text.get(key, self.defaults[key])

    def count(self, key: str, least: int = 1) -> int:
        return self._count(key, self.value(key), least)

    def _count(self, key: str, value: Any, least: int = 1) -> int:
        if type(value) is not int or not least <= value < 2**31:
            raise self.error(key, f"found {value!r:.80}, expected an integer of at least {least}")
        return value

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, self.value(key), lambda value: isinstance(value, bool), "a boolean"))

    def _typed(self, key: str, value: Any, is_valid: Callable[[Any], bool], what: str) -> Any:
        if not is_valid(value):
            raise self.error(key, f"found {value!r:.80}, expected {what}")
        return value

    def layer_types(self, layers: int) -> list[str]:
        names = list(_KIND_NAMES.values())
        types = self.text.get("layer_types")
        if types is None:
            return [names[(i + 1) % _PERIOD == 0] for i in range(layers)]
        is_valid = isinstance(types, list) and len(types) == layers and all(kind in names for kind in types)
        if not is_valid:
            raise self.error("layer_types", f"found {types!r:.80}, expected {layers} of {' or '.join(names)}")
        # The last layer is a full one whatever the list says.
        return [*types[:-1], _KIND_NAMES[LayerKind.FULL]]

    def per_layer(self, layers: int, is_full: list[bool]) -> list[tuple[int, int]]:
        """(head size, KV heads) of each layer."""
        base = (self.count("head_dim"), self.count("num_key_value_heads"))
        overrides = self.text.get("per_layer_config")
        if overrides is None:
            full_heads = self.value("num_global_key_value_heads") if self.flag("attention_k_eq_v") else None
            full = (self.count("global_head_dim"), base[1] if full_heads is None else full_heads)
            return [full if is_full[i] else base for i in range(layers)]
        is_valid = isinstance(overrides, Mapping) and all(isinstance(fields, Mapping) for fields in overrides.values())
        self._typed("per_layer_config", overrides, lambda _: is_valid, "an object of objects")
        own = [overrides.get(str(i), {}) for i in range(layers)]
        return [
            (
                self._count("per_layer_config", fields.get("head_dim", base[0])),
                self._count("per_layer_config", fields.get("num_key_value_heads", base[1])),
            )
            for fields in own
        ]

    def rope(self, kind: str) -> dict[str, Any]:
        parameters = self.text.get("rope_parameters") or _ROPE_DEFAULTS
        fields = parameters.get(kind) if isinstance(parameters, Mapping) else None
        if not isinstance(fields, Mapping) or "rope_theta" not in fields:
            raise self.error("rope_parameters", f"found {parameters!r:.120}, expected a rope_theta of {kind}")
        expected = _ROPE_DEFAULTS[kind]["rope_type"]
        if fields.get("rope_type", "default") not in ("default", expected):
            message = f"found the type {fields['rope_type']!r} for {kind}, expected {expected!r}"
            raise self.error("rope_parameters", message)
        if type(fields.get("partial_rotary_factor", 1.0)) not in (int, float):
            raise self.error("rope_parameters", f"found {fields!r:.120}, expected a number for partial_rotary_factor")
        return dict(fields)
