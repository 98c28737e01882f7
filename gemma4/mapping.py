"""GGUF tensor names, the shapes a configuration requires of them, and the transforms that turn them into model weights.

Everything that happens to a checkpoint on its way into the model is in this list. Names inside the model follow
Hugging Face's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from gemma4.config import Gemma4Config
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.plan import LOADABLE_TYPES, LoadPlan, NotLoaded, make_plan
from gemma4.quant.transforms import concat_rows, read_by_config, register_transforms, rename, transforms_for

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import TensorInfo
    from gemma4.quant.weight_file import WeightFile

PER_LAYER_TABLE: Final = "embed_tokens_per_layer.weight"
_GLOBAL_NAMES: Final = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": PER_LAYER_TABLE,
    "per_layer_model_proj.weight": "per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj.weight",
    "ffn_gate_exps.weight": "experts.gate_proj.weight",
    "ffn_up_exps.weight": "experts.up_proj.weight",
    "ffn_down_exps.weight": "experts.down_proj.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
}

# A matrix of NVFP4 may come with a scale of its own, by which its products are multiplied.
_SCALED: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",  # as ffn_down_exps.weight.scale; ffn_down_exps.scale is the router's
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
}

# Not NVFP4: scales are of whole matrices.
_PACKED: Final = LOADABLE_TYPES - {GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.NVFP4}

# Encoders of images and sound, and what joins them to the text model, in files that hold all of it.
_NOT_TEXT: Final = ("v.", "a.", "mm.")

_TEXT_MODEL: Final = (
    concat_rows(
        "blk.{layer}.ffn_gate.weight",
        "blk.{layer}.ffn_up.weight",
        target="layers.{layer}.mlp.gate_up_proj.weight",
        types=frozenset({GGMLType.Q4_K}),
        label="gate+up",
        scope="MLP",
    ),
    concat_rows(
        "blk.{layer}.attn_q.weight",
        "blk.{layer}.attn_k.weight",
        "blk.{layer}.attn_v.weight",
        target="layers.{layer}.self_attn.qkv_proj.weight",
        types=_PACKED,
        label="q+k+v",
        scope="attention",
    ),
    concat_rows(
        "blk.{layer}.attn_q.weight",
        "blk.{layer}.attn_k.weight",
        target="layers.{layer}.self_attn.qk_proj.weight",
        types=_PACKED,
        label="q+k",
        scope="other attention",
    ),
    read_by_config("rope_freqs.weight"),
    *(rename(source, target) for source, target in _GLOBAL_NAMES.items()),
    *(rename(f"blk.{{layer}}.{source}", f"layers.{{layer}}.{target}") for source, target in _LAYER_NAMES.items()),
    *(
        rename(f"blk.{{layer}}.{source}{suffix}", f"layers.{{layer}}.{target}.scale")
        for source, target in _SCALED.items()
        for suffix in (".scale", ".weight.scale")
        if f"{source}{suffix}" not in _LAYER_NAMES
    ),
    *(rename(f"output{suffix}", "lm_head.scale") for suffix in (".scale", ".weight.scale")),
)

for _architecture in ("gemma3", "gemma4"):
    register_transforms(_architecture, *_TEXT_MODEL)


def hf_name(target: str) -> str:
    """What Hugging Face's text model calls a weight of the model, without the "model." in front."""
    return target.removesuffix(".weight") if ".experts." in target else target


def gguf_names(num_layers: int) -> dict[str, str]:
    """The GGUF name of every tensor that Hugging Face's text model may have: `hf_name` -> GGUF name."""
    names = {hf_name(target): source for source, target in _GLOBAL_NAMES.items()}
    for i in range(num_layers):
        names |= {hf_name(f"layers.{i}.{target}"): f"blk.{i}.{source}" for source, target in _LAYER_NAMES.items()}
    return names


def expected_tensors(config: Gemma4Config) -> dict[str, tuple[int, ...]]:
    """The tensors a file must hold for this configuration: GGUF name -> torch shape."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    if config.rope_freq_factors is not None:
        shapes["rope_freqs.weight"] = (len(config.rope_freq_factors),)
    ple = config.hidden_size_per_layer_input
    if ple:
        shapes["per_layer_token_embd.weight"] = (config.vocab_size, config.num_hidden_layers * ple)
        shapes["per_layer_model_proj.weight"] = (config.num_hidden_layers * ple, hidden)
        shapes["per_layer_proj_norm.weight"] = (ple,)
    for i, layer in enumerate(config.layers):
        q_size = layer.num_attention_heads * layer.head_dim
        kv_size = layer.num_key_value_heads * layer.head_dim
        ffn = layer.intermediate_size
        sizes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (q_size, hidden),
            "attn_q_norm.weight": (layer.head_dim,),
            "attn_output.weight": (hidden, q_size),
            "post_attention_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (ffn, hidden),
            "ffn_up.weight": (ffn, hidden),
            "ffn_down.weight": (hidden, ffn),
            "post_ffw_norm.weight": (hidden,),
        }
        if layer.kv_source is None:
            sizes |= {"attn_k.weight": (kv_size, hidden), "attn_k_norm.weight": (layer.head_dim,)}
        if layer.kv_source is None and not layer.k_eq_v:
            sizes["attn_v.weight"] = (kv_size, hidden)
        if ple:
            sizes |= {"inp_gate.weight": (ple, hidden), "proj.weight": (hidden, ple), "post_norm.weight": (hidden,)}
        if config.num_experts:
            sizes |= _expert_tensors(config)
        if config.has_layer_scalar:
            sizes["layer_output_scale.weight"] = (1,)
        shapes |= {f"blk.{i}.{name}": size for name, size in sizes.items()}
    return shapes


def _expert_tensors(config: Gemma4Config) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's router and experts."""
    experts, hidden, ffn = config.num_experts, config.hidden_size, config.moe_intermediate_size
    if config.has_joined_experts:
        first = {"ffn_gate_up_exps.weight": (experts, 2 * ffn, hidden)}
    else:
        first = {f"ffn_{name}_exps.weight": (experts, ffn, hidden) for name in ("gate", "up")}
    return first | {
        "ffn_down_exps.weight": (experts, hidden, ffn),
        "ffn_down_exps.scale": (experts,),
        "ffn_gate_inp.weight": (experts, hidden),
        "ffn_gate_inp.scale": (hidden,),
        "pre_ffw_norm_2.weight": (hidden,),
        "post_ffw_norm_1.weight": (hidden,),
        "post_ffw_norm_2.weight": (hidden,),
    }


def scale_tensors(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The scales that a file holds beside its NVFP4 matrices: GGUF name -> shape, one number or one of each expert."""
    scales: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        if name in tensors and tensors[name].type is GGMLType.NVFP4:
            own = {f"{name.removesuffix('.weight')}.scale", f"{name}.scale"} - expected.keys()
            scales |= {scale: shape[:-2] or (1,) for scale in own if scale in tensors}
    return scales


def tensors_not_loaded(
    config: Gemma4Config, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> tuple[NotLoaded, ...]:
    """Tensors that some files hold although the text model reads none of them."""
    shared = [i for i, layer in enumerate(config.layers) if layer.kv_source is not None]
    own_kv = tuple(f"blk.{i}.{name}." for i in shared for name in ("attn_k", "attn_v", "attn_k_norm"))
    nvfp4 = {name for name in expected if name in tensors and tensors[name].type is GGMLType.NVFP4}
    inputs = {f"{base}.input_scale" for name in nvfp4 for base in (name, name.removesuffix(".weight"))}
    groups = {
        "vision and audio": [name for name in tensors if name.startswith(_NOT_TEXT)],
        "keys and values in layers that read another layer's": [name for name in tensors if name.startswith(own_kv)],
        "input scales, for products with 4-bit activations": [name for name in tensors if name in inputs],
    }
    return tuple(NotLoaded(what, tuple(names)) for what, names in groups.items() if names)


def plan_load(file: WeightFile, config: Gemma4Config, *, fuse: bool = True) -> LoadPlan:
    """The load plan of an open file. Raises the errors of `make_plan`."""
    expected = expected_tensors(config)
    return make_plan(
        config.architecture,
        file.tensors,
        expected | scale_tensors(file.tensors, expected),
        transforms_for(config.architecture),
        num_layers=config.num_hidden_layers,
        is_head_tied=config.tie_word_embeddings,
        not_loaded=tensors_not_loaded(config, file.tensors, expected),
        fuse=fuse,
        path=file.path,
    )
