"""Model configuration, read from GGUF metadata and checked against the tensor inventory.

Keys and their meaning follow the GGUF specification and llama.cpp's `gemma3` and `gemma4` loaders. Every shape comes
from the file: a missing key or tensor is an error that names it, never a default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gemma4.quant.errors import (
    MetadataError,
    MissingTensorError,
    ShapeError,
    UnsupportedArchitectureError,
    UnsupportedTypeError,
)
from gemma4.quant.ggml_types import GGMLType

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import TensorInfo
    from gemma4.quant.weight_file import WeightFile

_T = TypeVar("_T")

# Gemma 3 files rarely store these two; they are constants of the architecture.
_GEMMA3_SLIDING_PERIOD: Final = 6
_GEMMA3_ROPE_THETA_SLIDING: Final = 1e4
# Gemma 3 27B alone scales queries by hidden/heads instead of the head size; it is known by its depth.
_GEMMA3_27B_LAYERS: Final = 62

_NOT_A_TEXT_MODEL: Final = {
    "clip": "this is a multimodal projector (mmproj) file; pass the text model's GGUF instead",
    "gemma4-assistant": "this is a drafter for speculative decoding; pass the model it belongs to instead",
    "gemma4_assistant": "this is a drafter for speculative decoding; pass the model it belongs to instead",
}


TARGET: Final = -1
"""`kv_source` of a drafter's layers: the last layer of the same kind, in its target, that has keys of its own."""


class LayerKind(StrEnum):
    """How far a layer attends: over a sliding window, or over the whole context."""

    SLIDING = "sliding"
    FULL = "full"


class CacheKind(StrEnum):
    """How full layers keep keys and values: exactly, or as codes of `bits` bits (TurboQuant, arXiv 2504.19874)."""

    LOSSLESS = "lossless"
    TURBOQUANT = "turboquant"
    TURBOQUANT_4BIT = "turboquant-4bit"

    @classmethod
    def _missing_(cls, value: object) -> CacheKind:
        raise ValueError(f"kv_cache: found {value!r}, expected {', '.join(cls)}")

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for no codes."""
        return {CacheKind.LOSSLESS: 0, CacheKind.TURBOQUANT: 6, CacheKind.TURBOQUANT_4BIT: 4}[self]


class LayerConfig(BaseModel):
    """One decoder layer; sizes in elements."""

    model_config = ConfigDict(frozen=True)

    kind: LayerKind
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    k_eq_v: bool  # no attn_v tensor: V is the key projection before its norm
    kv_source: int | None  # the layer whose keys and values this one reads; None for its own, TARGET in a drafter


class Gemma4Config(BaseModel):
    """A Gemma 4 or Gemma 3 text model. Immutable; equal configs build equal models."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    name: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    context_length: int = Field(gt=0)  # tokens the model was trained for
    sliding_window: int = Field(gt=0)  # tokens a sliding layer sees, the current one included
    rms_norm_eps: float = Field(gt=0, lt=1)
    query_scale: float = Field(gt=0)  # multiplies q·k
    rope_theta_full: float = Field(gt=0)
    rope_theta_sliding: float = Field(gt=0)
    rope_scaling_factor: float = Field(gt=0)  # linear position scaling of full layers; 1 = none
    rope_freq_factors: tuple[float, ...] | None = Field(repr=False)  # [head_dim // 2] divisors for full layers
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    has_v_norm: bool
    has_layer_scalar: bool
    hidden_size_per_layer_input: int = Field(ge=0)  # of the embeddings every layer adds; 0 = none
    num_experts: int = Field(default=0, ge=0)  # beside the shared MLP of every layer; 0 = none
    num_experts_per_tok: int = Field(default=0, ge=0)
    moe_intermediate_size: int = Field(default=0, ge=0)
    has_joined_experts: bool = False  # gate and up of all experts in one tensor
    layers: tuple[LayerConfig, ...]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_gguf(cls, file: WeightFile) -> Gemma4Config:
        """Reads the configuration of an open file.

        Raises UnsupportedArchitectureError, UnsupportedTypeError, MetadataError, MissingTensorError or ShapeError.
        """
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise MetadataError(
                f"found {architecture!r}, expected a string", path=file.path, field="general.architecture"
            )
        if architecture in _NOT_A_TEXT_MODEL:
            raise UnsupportedArchitectureError(
                f"found {architecture!r}: {_NOT_A_TEXT_MODEL[architecture]}",
                path=file.path,
                field="general.architecture",
            )
        read = _READERS.get(architecture)
        if read is None:
            raise UnsupportedArchitectureError(
                f"found {architecture!r}, supported are {', '.join(sorted(_READERS))}",
                path=file.path,
                field="general.architecture",
            )
        header = Header(file, architecture)
        header.check_blocks()
        return read(header)


_Config = TypeVar("_Config", bound=Gemma4Config)


class Header:
    """Typed access to the `{architecture}.*` keys and to the tensor inventory."""

    def __init__(self, file: WeightFile, architecture: str) -> None:
        self.path: Path = file.path
        self.metadata: Mapping[str, Any] = file.metadata
        self.tensors: Mapping[str, TensorInfo] = file.tensors
        self.architecture = architecture
        self._file = file
        self.num_layers = self.count("block_count")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def error(self, key: str, message: str) -> MetadataError:
        return MetadataError(message, path=self.path, field=f"{self.architecture}.{key}")

    def _value(self, key: str) -> Any:
        full = f"{self.architecture}.{key}"
        if full not in self.metadata:
            raise MetadataError("the key is missing; the file does not describe this model", path=self.path, field=full)
        return self.metadata[full]

    def _checked(self, key: str, value: Any, kind: type[_T], valid: Callable[[Any], bool], what: str) -> _T:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not valid(value):
            raise self.error(key, f"found {value!r}, expected {what}")
        return value

    def count(self, key: str) -> int:
        return self._checked(key, self._value(key), int, lambda v: 0 < v < 2**31, "a positive integer")

    def optional_count(self, key: str) -> int:
        """0 when the key is absent: only for features whose absence means 'not there'."""
        if not self.has(key):
            return 0
        return self._checked(key, self._value(key), int, lambda v: 0 <= v < 2**31, "an integer of at least 0")

    def number(self, key: str, below: float = float("inf")) -> float:
        value = self._value(key)
        value = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        what = "a positive finite number" if below == float("inf") else f"a positive number below {below}"
        return self._checked(key, value, float, lambda v: 0 < v < below, what)

    def per_layer_counts(self, key: str) -> tuple[int, ...]:
        value = self._value(key)
        if isinstance(value, int):
            return (self.count(key),) * self.num_layers
        self._check_length(key, value)
        return tuple(self._checked(key, v, int, lambda v: 0 < v < 2**31, "positive integers") for v in value)

    def per_layer_flags(self, key: str) -> tuple[bool, ...]:
        value = self._value(key)
        self._check_length(key, value)
        return tuple(self._checked(key, v, bool, lambda _: True, "booleans") for v in value)

    def _check_length(self, key: str, value: Any) -> None:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.error(key, f"found {value!r}, expected an array with one entry per layer")
        if len(value) != self.num_layers:
            raise self.error(key, f"found {len(value)} entries, expected {self.num_layers}, one per layer")

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise MissingTensorError("the tensor is missing from the file", path=self.path, field=name)
        shape = self.tensors[name].shape
        if len(shape) != ndim:
            raise ShapeError(f"found shape {list(shape)}, expected {ndim} dimensions", path=self.path, field=name)
        return shape

    def positive_vector(self, name: str, size: int, what: str) -> tuple[float, ...]:
        """The values of an F32 vector of `size` positive numbers; `what` says where the size comes from."""
        shape, kind = self.shape(name, 1), self.tensors[name].type
        if shape != (size,):
            raise ShapeError(f"found {shape[0]} values, expected {size}, {what}", path=self.path, field=name)
        if kind is not GGMLType.F32:
            raise UnsupportedTypeError(f"found type {kind.name}, expected F32", path=self.path, field=name)
        values = tuple(self._file.data(name).cast("f"))
        for value in values:
            if not 0 < value < float("inf"):
                raise MetadataError(f"found {value}, expected positive finite numbers", path=self.path, field=name)
        return values

    def uniform_presence(self, suffix: str, layers: Sequence[int], why: str) -> bool:
        """Whether every layer of `layers` has the tensor; present in only some of them is an error."""
        absent = [i for i in layers if f"blk.{i}.{suffix}" not in self.tensors]
        if absent and len(absent) != len(layers):
            raise MissingTensorError(
                f"the tensor is missing, while other layers have theirs ({why})",
                path=self.path,
                field=f"blk.{absent[0]}.{suffix}",
            )
        return not absent

    def check_blocks(self) -> None:
        """Compares the number of layers with the tensors', before anything of that size is built."""
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        if len(blocks) != self.num_layers:
            raise self.error(
                "block_count", f"found {self.num_layers}, but the file has tensors of {len(blocks)} blocks"
            )


def _experts(header: Header) -> dict[str, Any]:
    """The mixture of experts, if there is one."""
    num_experts = header.optional_count("expert_count")
    if not num_experts:
        if any(name.endswith(".ffn_gate_inp.weight") for name in header.tensors):
            raise header.error("expert_count", "the key is missing or 0, but the file has router tensors")
        return {}
    used = header.count("expert_used_count")
    if used > num_experts:
        raise header.error("expert_used_count", f"found {used}, expected at most the {num_experts} experts")
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": header.count("expert_feed_forward_length"),
        "has_joined_experts": header.uniform_presence(
            "ffn_gate_up_exps.weight", range(header.num_layers), "all layers join gate and up experts or none does"
        ),
    }


def build_config(header: Header, layers: Sequence[LayerConfig], kind: type[_Config], **fields: Any) -> _Config:
    """A `kind` of what all architectures store alike, and of `fields`; checks sizes against each other."""
    vocab_size, hidden = header.shape("token_embd.weight", 2)
    hidden_size = header.count("embedding_length")
    if hidden != hidden_size:
        raise ShapeError(
            f"found {hidden} columns, expected {header.architecture}.embedding_length = {hidden_size}",
            path=header.path,
            field="token_embd.weight",
        )
    for layer in layers:
        if layer.num_attention_heads % layer.num_key_value_heads:
            raise header.error(
                "attention.head_count_kv",
                f"found {layer.num_key_value_heads}, expected a divisor of {layer.num_attention_heads} query heads",
            )
        if layer.head_dim % 2:
            raise header.error("attention.key_length", f"found {layer.head_dim}, expected an even head size")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and len(tokens) != vocab_size:
        raise MetadataError(
            f"found {len(tokens)} tokens, expected {vocab_size}, the rows of token_embd.weight",
            path=header.path,
            field="tokenizer.ggml.tokens",
        )
    name = header.metadata.get("general.name", header.architecture)
    return kind(
        architecture=header.architecture,
        name=str(name),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        context_length=header.count("context_length"),
        sliding_window=header.count("attention.sliding_window"),
        rms_norm_eps=header.number("attention.layer_norm_rms_epsilon", below=1.0),
        rope_theta_full=header.number("rope.freq_base"),
        tie_word_embeddings="output.weight" not in header.tensors,
        layers=tuple(layers),
        **fields,
    )


def head_size(header: Header, suffix: str = "") -> int:
    """The head size of one kind of layer; K, V and RoPE must agree on it."""
    key_length = header.count(f"attention.key_length{suffix}")
    value_length = header.count(f"attention.value_length{suffix}")
    if value_length != key_length:
        raise header.error(
            f"attention.value_length{suffix}", f"found {value_length}, expected the key length {key_length}"
        )
    rope = f"rope.dimension_count{suffix}"
    if header.has(rope) and header.count(rope) != key_length:
        raise header.error(rope, f"found {header.count(rope)}, expected the head size {key_length}")
    return key_length


def rope_scaling(header: Header, *supported: str) -> float:
    """The factor of linear position scaling, 1 where the file names none."""
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if kind not in supported:
        raise header.error("rope.scaling.type", f"found {kind!r}, expected {' or '.join(supported)}")
    return header.number("rope.scaling.factor") if kind == "linear" else 1.0


def _kv_source(header: Header, kinds: Sequence[LayerKind], own_kv: int, kind: LayerKind) -> int:
    """The layer whose cache a layer of this kind shares: one of the last two that keep their own."""
    source = own_kv - (2 if kind is LayerKind.SLIDING else 1)
    if source < 0 or kinds[source] is not kind:
        shared = header.num_layers - own_kv
        raise header.error(
            "attention.shared_kv_layers", f"found {shared}, but layer {source} is no {kind} layer to share with"
        )
    return source


def _gemma4(header: Header) -> Gemma4Config:
    kinds = [
        LayerKind.SLIDING if is_sliding else LayerKind.FULL
        for is_sliding in header.per_layer_flags("attention.sliding_window_pattern")
    ]
    full = [i for i, kind in enumerate(kinds) if kind is LayerKind.FULL]
    heads = header.count("attention.head_count")
    kv_heads = header.per_layer_counts("attention.head_count_kv")
    intermediate = header.per_layer_counts("feed_forward_length")
    head_dims = {LayerKind.FULL: head_size(header), LayerKind.SLIDING: head_size(header, "_swa")}
    own_kv = header.num_layers - header.optional_count("attention.shared_kv_layers")
    sources = [None if i < own_kv else _kv_source(header, kinds, own_kv, kind) for i, kind in enumerate(kinds)]
    own_full = [i for i in full if i < own_kv]
    k_eq_v = bool(own_full) and not header.uniform_presence("attn_v.weight", own_full, "full layers all have or none")
    rotated = head_dims[LayerKind.FULL] // 2
    factors = header.positive_vector("rope_freqs.weight", rotated, "half the full layers' head size") if full else None
    layers = [
        LayerConfig(
            kind=kind,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads[i],
            head_dim=head_dims[kind],
            intermediate_size=intermediate[i],
            k_eq_v=k_eq_v and kind is LayerKind.FULL,
            kv_source=sources[i],
        )
        for i, kind in enumerate(kinds)
    ]
    return build_config(
        header,
        layers,
        Gemma4Config,
        **_experts(header),
        hidden_size_per_layer_input=header.optional_count("embedding_length_per_layer_input"),
        query_scale=1.0,
        rope_theta_sliding=header.number("rope.freq_base_swa"),
        rope_scaling_factor=rope_scaling(header, "none"),
        rope_freq_factors=factors,
        final_logit_softcapping=header.number("final_logit_softcapping"),
        has_v_norm=True,
        has_layer_scalar=header.uniform_presence(
            "layer_output_scale.weight", range(header.num_layers), "all layers have one or none"
        ),
    )


def _gemma3(header: Header) -> Gemma4Config:
    heads = header.count("attention.head_count")
    kv_heads = header.per_layer_counts("attention.head_count_kv")
    intermediate = header.per_layer_counts("feed_forward_length")
    head_dim = head_size(header)
    pattern = "attention.sliding_window_pattern"
    period = header.count(pattern) if header.has(pattern) else _GEMMA3_SLIDING_PERIOD
    layers = [
        LayerConfig(
            kind=LayerKind.FULL if (i + 1) % period == 0 else LayerKind.SLIDING,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads[i],
            head_dim=head_dim,
            intermediate_size=intermediate[i],
            k_eq_v=False,
            kv_source=None,
        )
        for i in range(header.num_layers)
    ]
    is_27b = header.num_layers == _GEMMA3_27B_LAYERS
    query_dim = header.count("embedding_length") / heads if is_27b else head_dim
    has_own_theta, has_softcap = header.has("rope.freq_base_swa"), header.has("final_logit_softcapping")
    return build_config(
        header,
        layers,
        Gemma4Config,
        hidden_size_per_layer_input=0,
        query_scale=query_dim**-0.5,
        rope_theta_sliding=header.number("rope.freq_base_swa") if has_own_theta else _GEMMA3_ROPE_THETA_SLIDING,
        rope_scaling_factor=rope_scaling(header, "none", "linear"),
        rope_freq_factors=None,
        final_logit_softcapping=header.number("final_logit_softcapping") if has_softcap else None,
        has_v_norm=False,
        has_layer_scalar=False,
    )


_READERS: Final[Mapping[str, Callable[[Header], Gemma4Config]]] = {"gemma3": _gemma3, "gemma4": _gemma4}
