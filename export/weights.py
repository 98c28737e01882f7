"""The weights of an exported model: a tree of modules that hold tensors under the model's names and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from gemma4.export.low_memory import CompiledMethod
from gemma4.quant.errors import MissingTensorError
from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.plan import LoadPlan

_MODEL = "model."
_HEAD, _EMBEDDINGS = "lm_head.weight.", "embed_tokens.weight."


def weight_tree(plan: LoadPlan) -> nn.Module:
    """A module for `gemma4.quant.loader` to fill, on the meta device."""
    root = nn.Module()
    for entry in plan.entries:
        *path, name = entry.target.split(".")
        owner = root
        for step in path:
            if step not in dict(owner.named_children()):
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        if len(entry.shape) > 1:
            owner.add_module(name, PackedWeight(entry.type, (entry.shape[0], entry.shape[1])))
        else:
            vector = torch.empty(entry.shape, dtype=torch.float32, device="meta")
            owner.register_parameter(name, nn.Parameter(vector, requires_grad=False))
    return root


def bind_methods(
    methods: Iterable[CompiledMethod],
    weights: nn.Module,
    others: Mapping[str, Tensor],
    *,
    fill: Callable[[Tensor], Tensor],
) -> None:
    """Gives every method its constants: the same tensors to all.

    others: by name in the methods, cache tensors included. fill: makes of each weight the tensor to use. Raises
    MissingTensorError for a constant that neither `weights` nor `others` has.
    """
    own = {name: fill(parameter) for name, parameter in weights.named_parameters()}
    for method in methods:
        constants: dict[str, Tensor] = {}
        for name in method.constant_names():
            weight = name.removeprefix(_MODEL)
            tied = weight.replace(_HEAD, _EMBEDDINGS, 1) if weight.startswith(_HEAD) else weight
            found = others.get(name, own.get(weight, own.get(tied)))
            if found is None:
                raise MissingTensorError("the exported program wants a tensor that the file does not have", field=name)
            constants[name] = found
        method.bind(constants)
