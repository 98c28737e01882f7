"""Rotary position embeddings (RoFormer, arXiv 2104.09864): inverse frequencies of the two kinds of layer; no torch."""

from __future__ import annotations

from typing import Final

from gemma4.config import Gemma4Config, LayerConfig, LayerKind

# An angle below which a rotation changes nothing in float32.
_STILL: Final = 2.0**-24


def inverse_frequencies(config: Gemma4Config, layer: LayerConfig) -> list[float]:
    """head_dim // 2 numbers: radians per position of each rotated pair (i, i + head_dim // 2).

    Full layers divide theta^(-2i / head_dim) by the file's `rope_freqs` factors, whose huge values leave a pair
    unrotated (proportional RoPE of Gemma 4), and by the linear scaling factor (Gemma 3).
    """
    is_full = layer.kind is LayerKind.FULL
    theta = config.rope_theta_full if is_full else config.rope_theta_sliding
    scaling = config.rope_scaling_factor if is_full else 1.0
    factors = config.rope_freq_factors if is_full else None
    divisors = factors or (1.0,) * (layer.head_dim // 2)
    return [theta ** (-2 * i / layer.head_dim) / scaling / divisor for i, divisor in enumerate(divisors)]


def tied_dims(config: Gemma4Config, layer: LayerConfig) -> int:
    """Where one row of the layer's cache serves as key and value (`gemma4.kernels.tied_rope_cache`): the dimensions of
    a head that turn within the model's context, a quarter of all. 0 where keys and values are two tensors.

    A row needs values that are the normalised keys, and queries of one layer only, whose key weights they take.
    """
    is_one_projection = layer.k_eq_v and config.has_v_norm
    if not is_one_projection or any(other.kv_source is not None for other in config.layers):
        return 0
    turns = [frequency * config.context_length > _STILL for frequency in inverse_frequencies(config, layer)]
    pairs = sum(turns)
    is_quarter = 8 * pairs == layer.head_dim and all(turns[:pairs])
    has_kernels = layer.head_dim >= 32 and layer.head_dim & (layer.head_dim - 1) == 0
    return 2 * pairs if is_quarter and has_kernels else 0
