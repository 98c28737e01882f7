"""Key/value caches: objects that a forward pass is given, so that one model serves any number of generations.

Keys and values are [1, num_key_value_heads, length, head_dim]. Full layers keep every position. Sliding layers keep a
ring of twice their window, position p in slot p % length, so that a prefill chunk may be as long as the ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma4.config import Gemma4Config, LayerConfig, LayerKind
from gemma4.kernels.decode_attention import decode_attention
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.quant.errors import ContextError


class LayerCache:
    """Keys and values of one layer. window: tokens a query sees, its own included; 0 for all."""

    def __init__(self, layer: LayerConfig, length: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, layer.num_key_value_heads, length, layer.head_dim)
        self.window = window
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float) -> Tensor:
        """Adds k, v [1, H_kv, T, D] at positions input_pos [T] and returns the attention of q [1, H, T, D] -> same.

        A chunk reads what it may overwrite, so it attends before it is written.
        """
        if q.shape[2] == 1:
            self._write(k, v, input_pos)
            out: Tensor = decode_attention(q, self.k, self.v, input_pos, scale, self.window)
            return out
        out = prefill_attention(q, k, v, self.k, self.v, input_pos, scale, self.window)
        self._write(k, v, input_pos)
        return out

    def _write(self, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        slots = input_pos % self.k.shape[2]
        self.k.index_copy_(2, slots, k)
        self.v.index_copy_(2, slots, v)


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
