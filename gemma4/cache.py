"""Key/value caches: objects that a forward pass is given, so that one model serves any number of generations.

Keys and values are [1, num_key_value_heads, length, head_dim]. Full layers keep every position, sliding layers a ring
of a little more than their window (`gemma4.ring`). Full layers whose values are their keys hold both as one tensor
(`gemma4.kernels.tied_rope_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from gemma4.config import CacheKind, Gemma4Config, LayerConfig, LayerKind
from gemma4.kernels.decode_attention import MAX_TOKENS
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache, rms_norm, rotate
from gemma4.kernels.tied_prefill_attention import tied_prefill_attention
from gemma4.kernels.tied_rope_cache import tied_norm_rope, tied_norm_rope_cache, tied_queries
from gemma4.quant.errors import ContextError
from gemma4.quant.linear import Rows
from gemma4.quant.reserve import reserve
from gemma4.ring import chunk_size, ring_length
from gemma4.rope import tied_dims
from gemma4.rows import RowMaker
from gemma4.turboquant_cache import TurboQuantCache


class HeadTransform(NamedTuple):
    """What turns projections into heads: RMS norm of q and k, of v too where `has_v_norm`, and rotary embedding."""

    q_weight: Tensor  # float32 [D]
    k_weight: Tensor | None  # float32 [D]; None in a layer that reads another's keys
    inv_freq: Tensor  # float32 [D // 2]
    eps: float
    has_v_norm: bool


class AttentionCache(Protocol):
    """Where the queries of one layer find keys and values."""

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
        """The attention of queries at positions input_pos [T]: rows [T, H * D] in the form of `make`.

        q [T, H * D], k, v [T, H_kv * D]: raw projections, which a cache lets go as soon as it has their heads; v None
        stands for k.
        """


class OwnCache(AttentionCache, Protocol):
    """The cache of a layer that projects its own keys. window: tokens a query sees, its own included; 0 for all."""

    window: int

    def read(
        self, queries: Tensor, k_weight: Tensor, input_pos: Tensor, scale: float, window: int, make: RowMaker
    ) -> Rows:
        """The attention of another model's queries at positions input_pos [T], T at most 8, to what was written.

        queries: [1, H, T, D], normalised and turned. k_weight: float32 [D], of this layer's key norm.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What it keeps between passes, by attribute name. An exporter makes them buffers and sets the attributes."""

    def commit(self, input_pos: Tensor) -> None:
        """Ends a pass: writes what still waits."""


class LayerCache:
    """Keys and values of one layer. window: tokens a query sees, its own included; 0 for all.

    is_shared: other layers read it too, so a chunk is written only by `commit`, when they have seen what it overwrites.
    """

    def __init__(
        self,
        layer: LayerConfig,
        length: int,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_shared: bool = False,
    ) -> None:
        shape = (1, layer.num_key_value_heads, length, layer.head_dim)
        self.window = window
        self.is_shared = is_shared
        self.chunk: tuple[Tensor, Tensor] | None = None
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def read(
        self, queries: Tensor, k_weight: Tensor, input_pos: Tensor, scale: float, window: int, make: RowMaker
    ) -> Rows:
        return make.decode_attention(queries, self.k, self.v, input_pos, scale, window)

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
        """Adds the keys and values of these positions, too. A few tokens are written and then attend; a chunk attends
        first, because it may overwrite what it reads.
        """
        q_weight, k_weight, inv_freq, eps, has_v_norm = heads
        assert k is not None, "a layer with its own cache projects keys"
        assert k_weight is not None, "and normalises them"
        if not make.is_open and self._takes(q.shape[0]):
            queries = qk_norm_rope_cache(
                q, k, v, q_weight, k_weight, self.k, self.v, inv_freq, input_pos, eps, has_v_norm
            )
            return make.decode_attention(queries, self.k, self.v, input_pos, scale, self.window)
        queries, keys, values = qk_norm_rope(q, k, v, q_weight, k_weight, inv_freq, input_pos, eps, has_v_norm)
        del q, k, v
        out = prefill_attention(queries, keys, values, self.k, self.v, input_pos, scale, self.window)
        self.chunk = keys, values
        if not self.is_shared:
            self.commit(input_pos)
        return make.heads(out)

    def _takes(self, tokens: int) -> bool:
        """Whether so many tokens may be written before they attend."""
        has_room = self.window == 0 or self.k.shape[2] >= self.window + MAX_TOKENS - 1
        return tokens <= (MAX_TOKENS if has_room else 1)

    def commit(self, input_pos: Tensor) -> None:
        if self.chunk is not None:
            length = self.k.shape[2]
            kept = last_of_each_slot(input_pos, length)
            slots = input_pos[kept] % length
            for ring, rows in zip((self.k, self.v), self.chunk, strict=True):
                ring.index_copy_(2, slots, rows[:, :, kept])
            self.chunk = None


def last_of_each_slot(input_pos: Tensor, length: int) -> slice | Tensor:
    """Which of a chunk's positions to write into a ring: which of two writes to one slot stays is not defined.

    Where the number of positions is open, each is replaced by the last that shares its slot: then all write the same.
    """
    tokens = input_pos.shape[0]
    if isinstance(tokens, int):
        return slice(max(0, tokens - length), None)
    if statically_known_true(tokens <= length):
        return slice(None)
    index = torch.arange(tokens, device=input_pos.device)
    return index + (tokens - 1 - index) // length * length


class TiedCache:
    """Keys and values of one full layer as one row a position, of head_dim + rotated columns. rotated: `tied_dims`."""

    def __init__(self, layer: LayerConfig, length: int, rotated: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, layer.num_key_value_heads, length, layer.head_dim + rotated)
        self.window = 0
        self.rotated = rotated
        self.kv = torch.zeros(shape, dtype=dtype, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {"kv": self.kv}

    def read(
        self, queries: Tensor, k_weight: Tensor, input_pos: Tensor, scale: float, window: int, make: RowMaker
    ) -> Rows:
        assert window == 0, "full layers have none"
        return make.tied_decode_attention(tied_queries(queries, k_weight, self.rotated), self.kv, input_pos, scale)

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
        """Adds the rows of these positions, too."""
        q_weight, k_weight, inv_freq, eps, has_v_norm = heads
        assert k is not None, "a layer with its own cache projects keys"
        assert k_weight is not None, "and normalises them"
        assert v is None, "its values are the raw keys"
        assert has_v_norm, "normalised"
        if not make.is_open and q.shape[0] <= MAX_TOKENS:
            queries = tied_norm_rope_cache(q, k, q_weight, k_weight, self.kv, inv_freq, input_pos, eps)
            return make.tied_decode_attention(queries, self.kv, input_pos, scale)
        queries, rows = tied_norm_rope(q, k, q_weight, k_weight, inv_freq, input_pos, eps, self.rotated)
        del q, k
        out = tied_prefill_attention(queries, rows, self.kv, input_pos, scale)
        self.kv.index_copy_(2, input_pos, rows)
        return make.heads(out)

    def commit(self, input_pos: Tensor) -> None:
        """Nothing waits: a pass writes its rows at once, because they overwrite nothing that is still read."""


class SharedCache:
    """The cache of an earlier layer, read by one that projects queries only."""

    def __init__(self, source: LayerCache | TurboQuantCache) -> None:
        self.source = source

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
        source = self.source
        rows = q.view(q.shape[0], -1, heads.q_weight.shape[0]).transpose(0, 1)
        queries = rotate(rms_norm(rows, heads.q_weight, heads.eps), input_pos, heads.inv_freq)[None]
        if isinstance(source, TurboQuantCache):
            return source.read(queries, heads.k_weight, input_pos, scale, source.window, make)
        if source.chunk is None:
            return make.decode_attention(queries, source.k, source.v, input_pos, scale, source.window)
        out = prefill_attention(queries, *source.chunk, source.k, source.v, input_pos, scale, source.window)
        return make.heads(out)


class KVCache:
    """The caches of all layers, for at most `max_seq_len` positions; bytes are taken when it is made."""

    def __init__(
        self,
        config: Gemma4Config,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kind: CacheKind = CacheKind.LOSSLESS,
    ) -> None:
        """Raises ContextError where the model has no such positions, UnsupportedFeatureError where `kind` does not
        suit its heads.
        """
        if not 0 < max_seq_len <= config.context_length:
            raise ContextError(
                f"found {max_seq_len}, expected 1 to {config.context_length}, the model's context", field="max_seq_len"
            )
        device = torch.device(device)
        if device.type == "cuda":
            reserve(KVCache(config, max_seq_len, dtype, "meta", kind).tensors(), device)
        self.max_seq_len = max_seq_len
        self.chunk_size = chunk_size(config.sliding_window, max_seq_len)  # the longest forward pass
        self.ring_length = ring_length(config.sliding_window, max_seq_len)
        # A context within the window needs no ring: every position stays visible.
        window_or_all = config.sliding_window if config.sliding_window < max_seq_len else 0
        shared = {layer.kv_source for layer in config.layers}
        self.own: dict[int, OwnCache] = {}
        self.layers: list[AttentionCache] = []
        for i, layer in enumerate(config.layers):
            if layer.kv_source is not None:
                source = self.own[layer.kv_source]
                assert isinstance(source, LayerCache | TurboQuantCache), "tied rows serve one layer only"
                self.layers.append(SharedCache(source))
                continue
            is_sliding, rotated = layer.kind is LayerKind.SLIDING, tied_dims(config, layer)
            length, window = (self.ring_length, window_or_all) if is_sliding else (max_seq_len, 0)
            if kind.bits and not is_sliding:
                self.own[i] = TurboQuantCache(layer, length, rotated, kind.bits, device)
            elif rotated:
                self.own[i] = TiedCache(layer, length, rotated, dtype, device)
            else:
                self.own[i] = LayerCache(layer, length, window, dtype, device, is_shared=i in shared)
            self.layers.append(self.own[i])

    def commit(self, input_pos: Tensor) -> None:
        """Ends a pass: writes the chunks that shared layers held back."""
        for layer in self.own.values():
            layer.commit(input_pos)

    @contextmanager
    def up_to(self, end: int) -> Iterator[None]:
        """Within, passes are at positions before `end`: layers that read a cache by slices leave out those behind."""
        sliced = [layer for layer in self.own.values() if isinstance(layer, TurboQuantCache)]
        for layer in sliced:
            layer.end = end
        try:
            yield
        finally:
            for layer in sliced:
                layer.end = self.max_seq_len

    def tensors(self) -> list[Tensor]:
        """Those of all layers."""
        return [tensor for layer in self.own.values() for tensor in layer.tensors().values()]

    @property
    def rings(self) -> list[Tensor]:
        """The tensors in which new positions overwrite old ones."""
        return [tensor for layer in self.own.values() if layer.window for tensor in layer.tensors().values()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())
