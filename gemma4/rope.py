"""Rotary position embeddings (RoFormer, arXiv 2104.09864): inverse frequencies of the two kinds of layer."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4.config import Gemma4Config, LayerConfig, LayerKind


def inverse_frequencies(config: Gemma4Config, layer: LayerConfig, device: torch.device | str) -> Tensor:
    """float32 [head_dim // 2]: radians per position of each rotated pair (i, i + head_dim // 2).

    Full layers divide theta^(-2i / head_dim) by the file's `rope_freqs` factors, whose huge values leave a pair
    unrotated (proportional RoPE of Gemma 4), and by the linear scaling factor (Gemma 3).
    """
    is_full = layer.kind is LayerKind.FULL
    theta = config.rope_theta_full if is_full else config.rope_theta_sliding
    exponent = torch.arange(0, layer.head_dim, 2, dtype=torch.float64) / layer.head_dim
    frequencies = theta**-exponent
    if is_full:
        frequencies /= config.rope_scaling_factor
        if config.rope_freq_factors is not None:
            frequencies /= torch.tensor(config.rope_freq_factors, dtype=torch.float64)
    return frequencies.to(device=device, dtype=torch.float32)
