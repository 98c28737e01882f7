"""What is exported of a model: two methods over one state.

    decode   one token, static shapes: the packed matvecs where the device has them
    prefill  1 to `KVCache.chunk_size` tokens, dense rows for every number of them

Both are `(tokens [T], input_pos [T], temperature [1], seed [1]) -> next token [1]`, followed by the last position's
logits [1, vocab_size] where they are asked for. Weights are parameters and the cache's tensors buffers, under the same
names in both methods and sharing storage, so that one set of tensors serves both. Writes to the cache are mutations of
those buffers.

The next token is the argmax of logits + temperature * g with standard Gumbel noise g, which samples softmax(logits /
temperature) (Gumbel, 1954) and is greedy at temperature 0 without a branch. The noise is a hash of seed, position and
token id: the same on every device, and nothing is kept between steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from gemma4.cache import KVCache
from gemma4.model import TextModel
from gemma4.rows import DenseRows

EXAMPLE_TOKENS: Final = 32
"""Tokens of the prefill example, more than any packed matvec takes, so that no compiler picks one for all T."""

MethodInputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class MethodName(StrEnum):
    DECODE = "decode"
    PREFILL = "prefill"


class Method(nn.Module):
    """One method of a model. Parameters are named `model.*` as in the model, buffers `cache.LAYER.TENSOR`.

    suppress_ids: never sampled. with_logits: returns the logits too.
    """

    def __init__(
        self,
        name: MethodName,
        model: TextModel,
        cache: KVCache,
        suppress_ids: Sequence[int] = (),
        *,
        with_logits: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.with_logits = with_logits
        self.suppress_ids = tuple(suppress_ids)
        self.max_tokens = 1 if name is MethodName.DECODE else cache.chunk_size
        self._rows = model.rows_for(1) if name is MethodName.DECODE else DenseRows(model.dtype, is_open=True)
        self._kv_cache = cache
        self.cache = nn.Module()
        for i, layer in cache.own.items():
            tensors = nn.Module()
            for tensor_name, tensor in layer.tensors().items():
                tensors.register_buffer(tensor_name, tensor)
            self.cache.add_module(str(i), tensors)

    def forward(self, tokens: Tensor, input_pos: Tensor, temperature: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        """tokens, input_pos: int64 [T], consecutive positions; temperature: float32 [1]; seed: int64 [1]."""
        with self._buffers_in_cache():
            logits = self.model(tokens, input_pos, self._kv_cache, 1, self._rows)
        if self.suppress_ids:
            ids = torch.arange(logits.shape[-1], device=logits.device)
            is_suppressed = torch.zeros_like(ids, dtype=torch.bool)
            for first, last in _runs(self.suppress_ids):
                is_suppressed = is_suppressed | ((ids >= first) & (ids <= last))
            logits = logits.masked_fill(is_suppressed, float("-inf"))
        token = gumbel_max(logits, temperature, seed, input_pos[-1:])
        return (token, logits) if self.with_logits else (token,)

    def example_inputs(self) -> MethodInputs:
        """Inputs to trace with."""
        count = min(self.max_tokens, EXAMPLE_TOKENS)
        device = self.model.norm.weight.device
        return (
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.arange(count, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def dynamic_shapes(self) -> tuple[dict[int, Dim] | None, ...] | None:
        """Of the example inputs: T of prefill is open from 1 to `max_tokens`."""
        if self.max_tokens == 1:
            return None
        tokens = Dim("tokens", min=1, max=self.max_tokens)
        return {0: tokens}, {0: tokens}, None, None

    def export(self) -> ExportedProgram:
        """The method as a graph, with this library's operators in it whole."""
        with torch.no_grad():
            return export(self, self.example_inputs(), dynamic_shapes=self.dynamic_shapes(), strict=False)

    @contextmanager
    def _buffers_in_cache(self) -> Iterator[None]:
        """While tracing, buffers are stand-ins: the cache objects have to use those and get their own back."""
        own = [
            (layer, name, tensor) for layer in self._kv_cache.own.values() for name, tensor in layer.tensors().items()
        ]
        try:
            for i, layer in self._kv_cache.own.items():
                for name, buffer in self.cache.get_submodule(str(i)).named_buffers():
                    setattr(layer, name, buffer)
            yield
        finally:
            for layer, name, tensor in own:
                setattr(layer, name, tensor)


def methods_of(
    model: TextModel, cache: KVCache, suppress_ids: Sequence[int] = (), *, with_logits: bool = False
) -> Mapping[MethodName, Method]:
    """Both methods over one model and one cache."""
    return {name: Method(name, model, cache, suppress_ids, with_logits=with_logits) for name in MethodName}


def gumbel_max(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """A token int64 [1] from logits float32 [1, vocab_size]. temperature: float32 [1]; seed, position: int64 [1]."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    key = _mix(_mix(_mix((seed & _MASK) + 1) ^ ((seed >> 32) & _MASK)) ^ (position & _MASK))
    # 23 bits and a half: exact in float32 and never 0 or 1.
    uniform = ((_mix(_mix(_mix(_mix(ids ^ key)))) & 0x7FFFFF).float() + 0.5) * 2.0**-23
    # In two steps: compilers give the argmax of one row to a single program.
    rows = (logits + temperature * -torch.log(-torch.log(uniform))).view(math.gcd(ids.numel(), _ROWS), -1)
    best, column = rows.max(dim=-1)
    row = best.argmax(dim=0, keepdim=True)
    return row * rows.shape[1] + column.index_select(0, row)


_MASK: Final = 0xFFFFFFFF
_ROWS: Final = 512


def _mix(x: Tensor) -> Tensor:
    """A hash of 32-bit integers held in int64: twice the middle bits of a product, which depend on all bits of x.

    Every step reads the one before it once: a compiler that writes out a chain of such steps would double it otherwise.
    """
    x = ((x + 0x3C6EF372) * 0x5851F42D >> 15) & _MASK
    return ((x + 0x1B873593) * 0x4C957F2D >> 14) & _MASK


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted ids as ranges (first, last)."""
    runs: list[tuple[int, int]] = []
    for i in sorted(ids):
        if runs and i <= runs[-1][1] + 1:
            runs[-1] = runs[-1][0], i
        else:
            runs.append((i, i))
    return runs
