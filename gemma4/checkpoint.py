"""A loaded model as one safetensors file: the packed weights as they lie in memory, and all that is needed to use them.

Beside the weights the file holds, as JSON strings, `gemma4.config`, `gemma4.plan` and `gemma4.gguf_metadata` (the keys
of the GGUF that are not about shapes: tokenizer, chat template, sampling defaults).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gemma4.config import Gemma4Config
from gemma4.model import TextModel
from gemma4.quant.dense import F32Tensor
from gemma4.quant.errors import MetadataError, MissingTensorError
from gemma4.quant.formats import QuantTensor
from gemma4.quant.linear import PackedWeight
from gemma4.quant.packed_io import load_packed, save_packed
from gemma4.quant.plan import LoadPlan

_CONFIG: Final = "gemma4.config"
_PLAN: Final = "gemma4.plan"
_METADATA: Final = "gemma4.gguf_metadata"
_KEPT_PREFIXES: Final = ("general.", "tokenizer.")
_PLAN_JSON: Final = TypeAdapter(LoadPlan)


def save_model(path: str | Path, model: TextModel, plan: LoadPlan, metadata: Mapping[str, Any]) -> None:
    """Writes model, plan and tokenizer to `path`, atomically. Raises a Gemma4Error where writing fails."""
    modules = dict(model.named_modules())
    tensors: dict[str, QuantTensor] = {}
    for entry in plan.entries:
        module = modules.get(entry.target)
        if isinstance(module, PackedWeight):
            tensors[entry.target] = module.tensor
        else:
            tensors[entry.target] = F32Tensor(model.get_parameter(entry.target).detach()[None])
    kept = {key: _plain(value) for key, value in metadata.items() if key.startswith(_KEPT_PREFIXES)}
    strings = {
        _CONFIG: model.config.model_dump_json(),
        _PLAN: _PLAN_JSON.dump_json(plan).decode(),
        _METADATA: json.dumps(kept, ensure_ascii=False),
    }
    save_packed(path, tensors, strings)


def load_model(
    path: str | Path, dtype: torch.dtype, device: torch.device
) -> tuple[TextModel, LoadPlan, dict[str, Any]]:
    """Model, plan and GGUF metadata of a file of `save_model`. Raises a Gemma4Error that names what is wrong."""
    tensors, strings = load_packed(path, device)
    try:
        config = Gemma4Config.model_validate_json(strings[_CONFIG])
        plan = _PLAN_JSON.validate_json(strings[_PLAN])
        metadata: dict[str, Any] = json.loads(strings[_METADATA])
    except KeyError as error:
        raise MetadataError("the key is missing; not a saved model", path=path, field=error.args[0]) from error
    except (ValidationError, json.JSONDecodeError) as error:
        raise MetadataError(f"not what a saved model holds: {error}", path=path) from error
    model = TextModel(config, plan, dtype, device)
    modules = dict(model.named_modules())
    for entry in plan.entries:
        if entry.target not in tensors:
            raise MissingTensorError("the tensor is missing from the file", path=Path(path), field=entry.target)
        module = modules.get(entry.target)
        if isinstance(module, PackedWeight):
            module.assign(tensors[entry.target])
        else:
            owner, _, name = entry.target.rpartition(".")
            vector = nn.Parameter(tensors[entry.target].dequantize()[0], requires_grad=False)
            setattr(model.get_submodule(owner), name, vector)
    return model, plan, metadata


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
