"""Both methods of a GGUF file over weights and a cache that take no memory: all that a compiler wants to know.

Nothing of a weight is read: the header says types and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gemma4.cache import KVCache
from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.low_memory import without_storage
from gemma4.export.methods import EXAMPLE_TOKENS, Method, MethodName, methods_of
from gemma4.model import TextModel
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from gemma4.tokenizer import has_tokenizer, tokenizer_from_metadata


def hollow_methods(
    file: GGUFFile,
    config: Gemma4Config,
    plan: LoadPlan,
    max_seq_len: int,
    kv_cache: CacheKind,
    dtype: torch.dtype,
    device: torch.device,
) -> Mapping[MethodName, Method]:
    """Methods that return logits too. Only tensors that are neither of the file nor zeros at first have storage."""
    model = TextModel(config, plan, dtype, device).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                freed = nn.Parameter(without_storage(parameter, device), requires_grad=False)
                module.register_parameter(name, freed)
    cache = KVCache(config, max_seq_len, dtype, "meta", kv_cache)
    # A short cache shows what starts as zeros; what does not is the same for every length.
    short = KVCache(config, EXAMPLE_TOKENS, dtype, device, kv_cache)
    for i, layer in cache.own.items():
        start = short.own[i].tensors()
        for name, tensor in layer.tensors().items():
            setattr(layer, name, start[name] if bool(start[name].any()) else without_storage(tensor, device))
    has_text = has_tokenizer(file.metadata)
    suppress_ids = tokenizer_from_metadata(file.metadata, file.path).suppress_ids if has_text else ()
    return methods_of(model, cache, suppress_ids, with_logits=True)
