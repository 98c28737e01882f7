"""What a drafter's file says (`gemma4-assistant`), and whether the drafter belongs to a given model.

A drafter is a small decoder whose layers project queries only: keys and values are those of its target, the model it
drafts for. Keys and graph follow llama.cpp's `gemma4-assistant` loader and Hugging Face's `Gemma4Assistant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from gemma4.config import (
    TARGET,
    Gemma4Config,
    Header,
    LayerConfig,
    LayerKind,
    build_config,
    head_size,
    rope_scaling,
)
from gemma4.mapping import expected_tensors, scale_tensors
from gemma4.quant.errors import DrafterMismatchError, UnsupportedArchitectureError
from gemma4.quant.plan import LoadPlan, NotLoaded, make_plan
from gemma4.quant.transforms import register_transforms, rename, transforms_for

if TYPE_CHECKING:
    from gemma4.quant.weight_file import WeightFile

DRAFTER_ARCHITECTURES: Final = ("gemma4-assistant", "gemma4_assistant")
# Converters disagree on the names of these.
_BACKBONE_KEYS: Final = ("embedding_length_out", "n_embd_backbone", "backbone_embedding_length")
_PROJECTION_PREFIXES: Final = ("nextn", "mtp")
# A coarse search of the vocabulary for small devices. The whole head, which every file holds too, gives the logits.
_UNUSED: Final = frozenset(
    f"masked_embd_{name}{suffix}" for name in ("centroids", "ordering") for suffix in ("", ".weight")
)
_TOKENS: Final = "tokenizer.ggml.tokens"

for _architecture in DRAFTER_ARCHITECTURES:
    register_transforms(
        _architecture,
        *(
            rename(f"{prefix}.{name}_projection.weight", f"{name}_projection.weight")
            for prefix in _PROJECTION_PREFIXES
            for name in ("pre", "post")
        ),
        *transforms_for("gemma4"),
    )


class DrafterConfig(Gemma4Config):
    """A drafter. Its layers' `kv_source` is TARGET."""

    backbone_hidden_size: int = Field(gt=0)  # hidden size of the target
    backbone_key: str  # the file's name of that key
    projection_prefix: str  # of the file's two projection tensors

    @classmethod
    def from_gguf(cls, file: WeightFile) -> DrafterConfig:
        """Reads the configuration of an open file.

        Raises UnsupportedArchitectureError, UnsupportedTypeError, MetadataError, MissingTensorError or ShapeError.
        """
        architecture = file.metadata.get("general.architecture")
        if architecture not in DRAFTER_ARCHITECTURES:
            raise UnsupportedArchitectureError(
                f"found {architecture!r}, expected a drafter, {DRAFTER_ARCHITECTURES[0]!r}",
                path=file.path,
                field="general.architecture",
            )
        header = Header(file, str(architecture))
        header.check_blocks()
        return _read(header)

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a file of this configuration: GGUF name -> torch shape."""
        hidden, backbone, prefix = self.hidden_size, self.backbone_hidden_size, self.projection_prefix
        return expected_tensors(self) | {
            f"{prefix}.pre_projection.weight": (hidden, 2 * backbone),
            f"{prefix}.post_projection.weight": (backbone, hidden),
        }


def _read(header: Header) -> DrafterConfig:
    kinds = [
        LayerKind.SLIDING if is_sliding else LayerKind.FULL
        for is_sliding in header.per_layer_flags("attention.sliding_window_pattern")
    ]
    head_dims = {LayerKind.FULL: head_size(header), LayerKind.SLIDING: head_size(header, "_swa")}
    heads = header.count("attention.head_count")
    kv_heads = header.per_layer_counts("attention.head_count_kv")
    intermediate = header.per_layer_counts("feed_forward_length")
    if ple := header.optional_count("embedding_length_per_layer_input"):
        raise header.error("embedding_length_per_layer_input", f"found {ple}, a drafter has no per-layer inputs")
    key = next((key for key in _BACKBONE_KEYS if header.has(key)), _BACKBONE_KEYS[0])
    prefixes = (p for p in _PROJECTION_PREFIXES if f"{p}.pre_projection.weight" in header.tensors)
    rotated = head_dims[LayerKind.FULL] // 2
    is_any_full = LayerKind.FULL in kinds
    what = "half the full layers' head size"
    factors = header.positive_vector("rope_freqs.weight", rotated, what) if is_any_full else None
    layers = [
        LayerConfig(
            kind=kind,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads[i],
            head_dim=head_dims[kind],
            intermediate_size=intermediate[i],
            k_eq_v=False,
            kv_source=TARGET,
        )
        for i, kind in enumerate(kinds)
    ]
    return build_config(
        header,
        layers,
        DrafterConfig,
        backbone_hidden_size=header.count(key),
        backbone_key=key,
        projection_prefix=next(prefixes, _PROJECTION_PREFIXES[0]),
        hidden_size_per_layer_input=0,
        query_scale=1.0,
        rope_theta_sliding=header.number("rope.freq_base_swa"),
        rope_scaling_factor=rope_scaling(header, "none"),
        rope_freq_factors=factors,
        final_logit_softcapping=None,  # it keeps the order of logits, and only their order is used
        has_v_norm=False,
        has_layer_scalar=header.uniform_presence(
            "layer_output_scale.weight", range(header.num_layers), "all layers have one or none"
        ),
    )


def plan_drafter(file: WeightFile, config: DrafterConfig, *, fuse: bool = True) -> LoadPlan:
    """The load plan of an open drafter. Raises the errors of `make_plan`."""
    expected = config.expected_tensors()
    unused = tuple(name for name in file.tensors if name in _UNUSED)
    return make_plan(
        config.architecture,
        file.tensors,
        expected | scale_tensors(file.tensors, expected),
        transforms_for(config.architecture),
        num_layers=config.num_hidden_layers,
        is_head_tied=config.tie_word_embeddings,
        not_loaded=(NotLoaded("a coarse search of the vocabulary", unused),) if unused else (),
        fuse=fuse,
        path=file.path,
    )


def shared_layer(target: Gemma4Config, kind: LayerKind) -> int | None:
    """The layer of `target` whose keys and values a drafter's layers of this kind read; None where there is none."""
    own = (i for i, layer in enumerate(target.layers) if layer.kind is kind and layer.kv_source is None)
    return max(own, default=None)


def check_pair(
    config: DrafterConfig,
    metadata: Mapping[str, Any],
    target: Gemma4Config,
    target_metadata: Mapping[str, Any],
    path: Path | None = None,
) -> None:
    """Raises DrafterMismatchError, naming what was found and expected, unless the drafter fits `target`.

    path: of the drafter, named in errors.
    """

    def refuse(field: str, found: object, expected: object, what: str) -> None:
        message = f"found {found}, expected {expected}, {what} of the target"
        raise DrafterMismatchError(message, path=path, field=field)

    def compare(field: str, found: object, expected: object, what: str) -> None:
        if found != expected:
            refuse(field, found, expected, what)

    compare("general.architecture", "a drafter of gemma4", f"a drafter of {target.architecture}", "the architecture")
    compare("token_embd.weight", config.vocab_size, target.vocab_size, "the vocabulary size")
    tokens, expected_tokens = metadata.get(_TOKENS, ()), target_metadata.get(_TOKENS, ())
    if tokens and expected_tokens:
        for i, (token, expected) in enumerate(zip(tokens, expected_tokens, strict=True)):
            compare(_TOKENS, repr(token), repr(expected), f"token {i}")
    prefix = f"{config.architecture}."
    compare(prefix + config.backbone_key, config.backbone_hidden_size, target.hidden_size, "the hidden size")
    for kind, layer in {layer.kind: layer for layer in config.layers}.items():
        index = shared_layer(target, kind)
        if index is None:
            refuse(f"{prefix}attention.sliding_window_pattern", f"{kind} layers", "none", "as in the layers")
            continue
        source = target.layers[index]
        is_sliding = kind is LayerKind.SLIDING
        suffix = "_swa" if is_sliding else ""
        own, theirs = layer.head_dim, source.head_dim
        compare(f"{prefix}attention.key_length{suffix}", own, theirs, f"the head size of {kind} layers")
        own, theirs = layer.num_attention_heads, source.num_key_value_heads
        if own % theirs:
            what = f"the key/value heads of {kind} layers"
            refuse(f"{prefix}attention.head_count", own, f"a multiple of {theirs}", what)
        if is_sliding:
            own, theirs = config.sliding_window, target.sliding_window
            compare(f"{prefix}attention.sliding_window", own, theirs, "the window")
            compare(f"{prefix}rope.freq_base_swa", config.rope_theta_sliding, target.rope_theta_sliding, "the base")
        else:
            compare(f"{prefix}rope.freq_base", config.rope_theta_full, target.rope_theta_full, "the base")
            if config.rope_freq_factors != target.rope_freq_factors:
                refuse("rope_freqs.weight", "other factors", "the same", "as those")
