"""What ExecuTorch's language model runner expects of a program: the inputs of its methods and its constant methods.

Its methods are `decode` and `prefill`, `(tokens [1, T], input_pos [T], temperature [1]) -> next token [1, 1]`; the
constants it asks for are methods without inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.export import Dim

from gemma4.cache import KVCache
from gemma4.export.low_memory import is_without_storage
from gemma4.export.methods import Method, MethodName
from gemma4.model import TextModel

ConstantMethods: TypeAlias = dict[str, int | bool | str | list[int]]

_SEEDS = 2.0**24
"""Seeds drawn at run time: as many as float32 numbers below 1 tell apart."""


class RunnerMethod(Method):
    """A method of `gemma4.export.methods` with the runner's inputs. The seed is drawn by the runtime at every step."""

    @classmethod
    def of(cls, method: Method, *, with_logits: bool) -> RunnerMethod:
        """A method with other inputs, over the same model and cache."""
        return cls(method.name, method.model, method._kv_cache, method.suppress_ids, with_logits=with_logits)

    def forward(self, tokens: Tensor, input_pos: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """tokens: int64 [1, T]; input_pos: int64 [T]; temperature: float32 [1]. Returns the token, int64 [1, 1]."""
        seed = (torch.rand(1, device=tokens.device) * _SEEDS).to(torch.int64)
        token, *logits = super().forward(tokens[0], input_pos, temperature, seed)
        return token[None], *logits

    def example_inputs(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        tokens, input_pos, temperature, _ = super().example_inputs()
        return tokens[None], input_pos, temperature

    def dynamic_shapes(self) -> tuple[dict[int, Dim] | None, ...] | None:
        shapes = super().dynamic_shapes()
        if shapes is None or shapes[0] is None:
            return None
        return {1: shapes[0][0]}, shapes[1], None


def runner_methods(
    model: TextModel, cache: KVCache, suppress_ids: Sequence[int] = (), *, with_logits: bool = False
) -> Mapping[MethodName, RunnerMethod]:
    """Both methods over one model and one cache. with_logits: they return the last position's logits [1, V] too."""
    return {name: RunnerMethod(name, model, cache, suppress_ids, with_logits=with_logits) for name in MethodName}


def constant_methods(
    methods: Mapping[MethodName, RunnerMethod], max_seq_len: int, eos_ids: Sequence[int] = ()
) -> ConstantMethods:
    """The constants by name. eos_ids: where to stop; the runner asks its tokenizer where there are none."""
    prefill = methods[MethodName.PREFILL]
    # Constants of a cache, such as a codebook, are no zeros.
    mutable = [name for name, buffer in prefill.named_buffers() if is_without_storage(buffer) or not bool(buffer.any())]
    constants: ConstantMethods = {
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": max_seq_len,
        "get_vocab_size": prefill.model.config.vocab_size,
        "get_n_layers": len(prefill.model.config.layers),
        "get_max_prefill_chunk": prefill.max_tokens,
        "get_min_prefill_chunk": 1,
        "get_mutable_buffer_metadata": json.dumps({"version": 1, "mutable_buffers": mutable}),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": prefill.max_tokens > 1,
    }
    return constants | {"get_eos_ids": list(eos_ids)} if eos_ids else constants
