"""The tensors of an exported method on the host, where only those are in memory that somebody reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.hollow_model import hollow_methods
from gemma4.export.low_memory import is_without_storage, untouched_zeros
from gemma4.export.methods import Method, MethodName
from gemma4.export.weights import weight_tree
from gemma4.mapping import plan_load
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.loader import load_weights
from gemma4.quant.plan import LoadEntry, LoadPlan
from gemma4.quant.weight_file import WeightFile

_MODEL: Final = "model."


class HostTensors(Mapping[str, Tensor]):
    """Parameters and buffers of an exported method under all of their names.

    A weight is unpacked from the file when it is asked for; the weight before it is let go of, so ask for its planes
    together. What starts as zeros takes no memory. Other constants are copied from the method.
    """

    def __init__(self, file: WeightFile, plan: LoadPlan, method: Method) -> None:
        """file: open as long as tensors are asked for. method: over weights and a cache without storage."""
        self._file = file
        self._plan = plan
        self._weights: dict[str, tuple[LoadEntry, str]] = {}
        self._others: dict[str, Tensor] = {}
        self._zeros: set[str] = set()
        self._unpacked: tuple[LoadEntry, nn.Module] | None = None
        entries = {entry.target: entry for entry in plan.entries}
        parameters = list(method.named_parameters(remove_duplicate=False))
        of_file: dict[int, tuple[LoadEntry, str]] = {}  # one of a tensor's names is that in the plan
        for name, parameter in parameters:
            weight = name.removeprefix(_MODEL)
            entry = entries.get(weight) or entries.get(weight.rpartition(".")[0])
            if entry is not None:
                of_file[id(parameter)] = entry, weight
        for name, tensor in chain(parameters, method.named_buffers(remove_duplicate=False)):
            if id(tensor) in of_file:
                self._weights[name] = of_file[id(tensor)]
            elif is_without_storage(tensor):
                self._others[name] = untouched_zeros(tensor)
                self._zeros.add(name)
            else:
                self._others[name] = tensor.detach().to("cpu", copy=True)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._others:
            return self._others[name]
        entry, weight = self._weights[name]
        if self._unpacked is None or self._unpacked[0] is not entry:
            self._unpacked = None  # its memory is free before more is taken
            plan = replace(self._plan, entries=(entry,))
            tree = weight_tree(plan)
            load_weights(tree, plan, self._file, torch.device("cpu"))
            self._unpacked = entry, tree
        return self._unpacked[1].get_parameter(weight).detach()

    def __iter__(self) -> Iterator[str]:
        return chain(self._weights, self._others)

    def __len__(self) -> int:
        return len(self._weights) + len(self._others)

    def content(self, name: str) -> str:
        """Text that is the same for tensors with the same bytes: names of one weight, and zeros of one size."""
        if name in self._weights:
            return self._weights[name][1]
        return f"{self._others[name].nbytes} zeros" if name in self._zeros else name


@contextmanager
def host_tensors(
    gguf: str | Path, *, max_seq_len: int, kv_cache: CacheKind = CacheKind.LOSSLESS, dtype: torch.dtype = torch.bfloat16
) -> Iterator[HostTensors]:
    """Those of a file's methods as they are exported for a GPU. Raises a Gemma4Error that names the file."""
    with GGUFFile.open(gguf) as file:
        config = Gemma4Config.from_gguf(file)
        plan, length = plan_load(file, config), min(max_seq_len, config.context_length)
        methods = hollow_methods(file, config, plan, length, kv_cache, dtype, torch.device("cpu"))
        yield HostTensors(file, plan, methods[MethodName.DECODE])
