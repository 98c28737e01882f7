"""Drafter files (`gemma4-assistant`) for the synthetic models of tests.tiny_gguf and tests.family_gguf.

model = drafter_for(gemma4())
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.tiny_gguf import Model, Tensor

HIDDEN, FFN, LAYERS = 96, 224, 4


def drafter_for(
    target: Model,
    *,
    hidden: int = HIDDEN,
    heads: int = 8,
    kind: str = "F32",
    seed: int = 1,
    architecture: str = "gemma4-assistant",
    backbone_key: str = "embedding_length_out",
    projections: str = "nextn",
) -> Model:
    """A drafter of random weights: three sliding layers and a full one. kind: type of its matrices."""

    def of_target(key: str) -> Any:
        return target.metadata[f"gemma4.{key}"]

    copied = (
        "context_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.key_length",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.dimension_count",
        "rope.dimension_count_swa",
    )
    pattern = [True] * (LAYERS - 1) + [False]
    own = {
        "block_count": LAYERS,
        "embedding_length": hidden,
        "feed_forward_length": FFN,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "attention.sliding_window_pattern": pattern,
        "attention.shared_kv_layers": LAYERS,
        "embedding_length_per_layer_input": 0,
        "nextn_predict_layers": LAYERS,
        backbone_key: of_target("embedding_length"),
    }
    keys = {key: of_target(key) for key in copied} | own
    metadata = {
        "general.architecture": architecture,
        "general.name": "synthetic drafter",
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "none",
    }
    backbone = of_target("embedding_length")
    pairs = target.tensors["rope_freqs.weight"].shape
    tensors = {
        "token_embd.weight": Tensor((target.tensors["token_embd.weight"].shape[0], hidden), kind),
        "output_norm.weight": Tensor((hidden,), "F32"),
        "rope_freqs.weight": Tensor(pairs, "F32"),
        f"{projections}.pre_projection.weight": Tensor((hidden, 2 * backbone), kind),
        f"{projections}.post_projection.weight": Tensor((backbone, hidden), kind),
    }
    for i, is_sliding in enumerate(pattern):
        head_dim = of_target("attention.key_length_swa" if is_sliding else "attention.key_length")
        matrices = {
            "attn_q": (heads * head_dim, hidden),
            "attn_output": (hidden, heads * head_dim),
            "ffn_gate": (FFN, hidden),
            "ffn_up": (FFN, hidden),
            "ffn_down": (hidden, FFN),
        }
        vectors = {
            "attn_norm": hidden,
            "attn_q_norm": head_dim,
            "post_attention_norm": hidden,
            "ffn_norm": hidden,
            "post_ffw_norm": hidden,
            "layer_output_scale": 1,
        }
        tensors |= {f"blk.{i}.{name}.weight": Tensor(shape, kind) for name, shape in matrices.items()}
        tensors |= {f"blk.{i}.{name}.weight": Tensor((size,), "F32") for name, size in vectors.items()}
    values: dict[str, np.ndarray] = {"rope_freqs.weight": target.values["rope_freqs.weight"]}
    return Model(metadata, tensors, values, seed)
