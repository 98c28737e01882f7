"""The cache of a full-attention layer in 4 or 6 bits a number: TurboQuant (arXiv 2504.19874).

Its tensors, zero where nothing was written, are those of `gemma4.kernels.tq4_cache`. Keys have codes of their own, or,
where values serve as keys (`gemma4.rope.tied_dims`), only of the dimensions that rotary embedding turns. The rotation
and the codebook are numbers in the code, so these tensors are all that a cache holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4.config import LayerConfig
from gemma4.kernels.pieces import SLICE_KEYS
from gemma4.kernels.rope_cache import qk_norm_rope
from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_sdpa import tq4_sdpa
from gemma4.kernels.tq4_write import tq4_write
from gemma4.kernels.turboquant import MIN_DIM
from gemma4.quant.errors import UnsupportedFeatureError
from gemma4.quant.linear import Rows
from gemma4.rows import RowMaker

if TYPE_CHECKING:
    from gemma4.cache import HeadTransform


class TurboQuantCache:
    """Keys and values of one full layer. tied_dims: dimensions of k kept beside v, 0 for all of k."""

    def __init__(self, layer: LayerConfig, length: int, tied_dims: int, bits: int, device: torch.device) -> None:
        """Raises UnsupportedFeatureError for heads that the rotation does not fit."""
        head_dim = layer.head_dim
        if head_dim < MIN_DIM or head_dim & (head_dim - 1):
            raise UnsupportedFeatureError(
                f"found heads of {head_dim}, the TurboQuant cache takes powers of two from {MIN_DIM} on",
                field="kv_cache",
            )
        self.window = 0
        self.end = length  # past the last position that is attended to
        self.is_tied = tied_dims >= MIN_DIM
        shape = (1, layer.num_key_value_heads, length)
        key_bytes, value_bytes = ((dim * bits // 8) for dim in (tied_dims if self.is_tied else head_dim, head_dim))
        self.k_codes = torch.zeros(*shape, key_bytes, dtype=torch.uint8, device=device)
        self.k_scale = torch.zeros(shape, dtype=torch.float32, device=device)
        self.v_codes = torch.zeros(*shape, value_bytes, dtype=torch.uint8, device=device)
        self.v_scale = torch.zeros(shape, dtype=torch.float32, device=device)
        width = tied_dims * self.is_tied + head_dim
        self.first_key = torch.zeros(1, layer.num_key_value_heads, width, dtype=torch.float32, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return self._cache()._asdict()

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: HeadTransform,
        input_pos: Tensor,
        scale: float,
        make: RowMaker,
    ) -> Rows:
        """Adds the keys and values of these positions first, so a chunk sees of itself what later tokens will see."""
        q_weight, k_weight, inv_freq, eps, has_v_norm = heads
        assert k is not None, "a layer with its own cache projects keys"
        assert k_weight is not None, "and normalises them"
        queries, keys, values = qk_norm_rope(q, k, v, q_weight, k_weight, inv_freq, input_pos, eps, has_v_norm)
        del q, k, v
        tq4_write(keys, values, *self._cache(), input_pos)
        del keys, values
        return self.read(queries, k_weight, input_pos, scale, 0, make)

    def read(
        self, queries: Tensor, k_weight: Tensor | None, input_pos: Tensor, scale: float, window: int, make: RowMaker
    ) -> Rows:
        """The attention of any number of queries [1, H, T, D], normalised and turned, to what was written.

        k_weight: float32 [D], of this layer's key norm; read only where values serve as keys.
        """
        assert window == 0, "full layers have none"
        cache = self._cache()
        slots = -(-self.end // SLICE_KEYS) * SLICE_KEYS
        if slots < cache.length:
            cache = cache.first_slots(slots)
        out = tq4_sdpa(queries, *cache, k_weight if self.is_tied else None, input_pos, scale)
        return make.heads(out)

    def _cache(self) -> TQ4Cache:
        return TQ4Cache(self.k_codes, self.k_scale, self.v_codes, self.v_scale, self.first_key)

    def commit(self, input_pos: Tensor) -> None:
        """Nothing waits: a pass writes at once, because it overwrites nothing that is still read."""
