"""A loaded model as one safetensors file: the packed weights as they lie in memory, and all that is needed to use them.

Beside the weights the file holds, as JSON strings, `gemma4.config`, `gemma4.plan` and `gemma4.gguf_metadata` (the keys
of the GGUF that are not about shapes: tokenizer, chat template, sampling defaults).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gemma4.config import CacheKind, Gemma4Config
from gemma4.model import TextModel
from gemma4.opening import require_memory
from gemma4.quant.dense import F32Tensor
from gemma4.quant.errors import MetadataError, MissingTensorError, ShapeError, UnexpectedTensorError
from gemma4.quant.formats import QuantTensor
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.packed_io import load_packed, save_packed
from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.plan import LoadPlan
from gemma4.quant.reserve import reserve_weights

_CONFIG: Final = "gemma4.config"
_PLAN: Final = "gemma4.plan"
_METADATA: Final = "gemma4.gguf_metadata"
_KEPT_PREFIXES: Final = ("general.", "tokenizer.")
_PLAN_JSON: Final = TypeAdapter(LoadPlan)
_METADATA_JSON: Final = TypeAdapter(dict[str, Any])

T = TypeVar("T")


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
    path: str | Path, dtype: torch.dtype, device: torch.device, max_seq_len: int, kv_cache: CacheKind
) -> tuple[TextModel, LoadPlan, dict[str, Any]]:
    """Model, plan and GGUF metadata of a file of `save_model`, for generations of max_seq_len tokens in such a cache.

    Raises a Gemma4Error that names what is wrong; DoesNotFitError before anything is moved to a GPU.
    """
    path = Path(path)
    tensors, strings = load_packed(path)
    config = _parse(Gemma4Config.model_validate_json, strings, _CONFIG, path)
    plan = _parse(_PLAN_JSON.validate_json, strings, _PLAN, path)
    metadata = _parse(_METADATA_JSON.validate_json, strings, _METADATA, path)
    _check_weights(plan, tensors, path)
    require_memory(config, plan, device, dtype, max_seq_len, path, kv_cache)
    try:
        model = TextModel(config, plan, dtype, device)
    except MissingTensorError as error:
        raise MetadataError(f"the plan lacks the weight {error.field}", path=path, field=_PLAN) from error
    reserve_weights(model, device)
    modules, vectors = dict(model.named_modules()), dict(model.named_parameters())
    for name, tensor in tensors.items():
        module = modules.get(name)
        if isinstance(module, PackedWeight):
            module.take(tensor, device)
        elif name in vectors and tensor.shape == (1, vectors[name].numel()):
            owner, _, attribute = name.rpartition(".")
            values = tensor.dequantize()[0].to(device)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))
        else:
            raise UnexpectedTensorError(f"the model has no place for {list(tensor.shape)}", path=path, field=name)
    if unfilled := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise MetadataError(f"the plan lacks the weight {unfilled[0]}", path=path, field=_PLAN)
    return model, plan, metadata


def _parse(parse: Callable[[str], T], strings: Mapping[str, str], key: str, path: Path) -> T:
    if key not in strings:
        raise MetadataError("the key is missing; not a saved model", path=path, field=key)
    try:
        return parse(strings[key])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise MetadataError(f"not what a saved model holds: {where}: {first['msg']}", path=path, field=key) from error


def _check_weights(plan: LoadPlan, tensors: Mapping[str, QuantTensor], path: Path) -> None:
    """Raises a Gemma4Error unless the file holds the weights of its plan, no more and no less."""
    entries = plan.by_target()
    for name, entry in entries.items():
        if name not in tensors:
            raise MissingTensorError("the plan's weight is missing from the file", path=path, field=name)
        found = tensors[name]
        shape = entry.shape if len(entry.shape) > 1 else (1, *entry.shape)
        kind = entry.type if len(entry.shape) > 1 else GGMLType.F32
        if (found.ggml_type, found.shape) != (kind, shape):
            message = f"found {found.ggml_type.name} {list(found.shape)}, the plan has {kind.name} {list(shape)}"
            raise ShapeError(message, path=path, field=name)
    if extra := tensors.keys() - entries.keys():
        raise UnexpectedTensorError("the plan has no such weight", path=path, field=min(extra))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
