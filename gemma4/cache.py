"""Key/value caches: objects that a forward pass is given, so that one model serves any number of generations.

Keys and values are [1, num_key_value_heads, length, head_dim]. Full layers keep every position. Sliding layers keep a
ring of twice their window, position p in slot p % length, so that a prefill chunk may be as long as the ring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma4.config import Gemma4Config, LayerConfig, LayerKind
from gemma4.kernels.decode_attention import decode_attention
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache
from gemma4.quant.errors import ContextError


class HeadTransform(NamedTuple):
    """What turns projections into heads: RMS norm of q and k, of v too where `has_v_norm`, and rotary embedding."""

    q_weight: Tensor  # float32 [D]
    k_weight: Tensor  # float32 [D]
    inv_freq: Tensor  # float32 [D // 2]
    eps: float
    has_v_norm: bool


class LayerCache:
    """Keys and values of one layer. window: tokens a query sees, its own included; 0 for all."""

    def __init__(self, layer: LayerConfig, length: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, layer.num_key_value_heads, length, layer.head_dim)
        self.window = window
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, heads: HeadTransform, input_pos: Tensor, scale: float
    ) -> Tensor:
        """Adds keys and values of positions input_pos [T] and returns the attention of their queries [1, H, T, D].

        q [T, H * D], k, v [T, H_kv * D]: raw projections; v None stands for k. A single token is written and then
        attends; a chunk attends first, because it may overwrite what it reads.
        """
        q_weight, k_weight, inv_freq, eps, has_v_norm = heads
        if q.shape[0] == 1:
            queries = qk_norm_rope_cache(
                q, k, v, q_weight, k_weight, self.k, self.v, inv_freq, input_pos, eps, has_v_norm
            )
            out: Tensor = decode_attention(queries, self.k, self.v, input_pos, scale, self.window)
            return out
        queries, keys, values = qk_norm_rope(q, k, v, q_weight, k_weight, inv_freq, input_pos, eps, has_v_norm)
        out = prefill_attention(queries, keys, values, self.k, self.v, input_pos, scale, self.window)
        slots = input_pos % self.k.shape[2]
        self.k.index_copy_(2, slots, keys)
        self.v.index_copy_(2, slots, values)
        return out


class KVCache:
    """The caches of all layers, for at most `max_seq_len` positions; bytes are taken when it is made."""

    def __init__(
        self, config: Gemma4Config, max_seq_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Raises ContextError where the model has no such positions."""
        if not 0 < max_seq_len <= config.context_length:
            raise ContextError(
                f"found {max_seq_len}, expected 1 to {config.context_length}, the model's context", field="max_seq_len"
            )
        self.max_seq_len = max_seq_len
        self.chunk_size = min(2 * config.sliding_window, max_seq_len)  # the longest forward pass the rings take
        # A context within the window needs no ring: every position stays visible.
        window_or_all = config.sliding_window if config.sliding_window < max_seq_len else 0
        self.layers: list[LayerCache] = []
        for layer in config.layers:
            is_sliding = layer.kind is LayerKind.SLIDING
            length, window = (self.chunk_size, window_or_all) if is_sliding else (max_seq_len, 0)
            self.layers.append(LayerCache(layer, length, window, dtype, torch.device(device)))

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)
