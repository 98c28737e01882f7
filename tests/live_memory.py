"""Which tensors are alive while a function runs, on any device, the meta device included.

What an op allocates inside itself is not seen, unless it is opened (`opened_ops`); what it returns is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma4.quant.linear import LINEAR_OPS

H100: Final = (True, 232448)
"""What `gemma4.kernels.prefill_attention.device_limits` returns there."""


@dataclass(frozen=True, slots=True)
class Event:
    """A storage is allocated with `size` bytes, or freed where that is None."""

    storage: int
    size: int | None = None


class _LiveBytes(TorchDispatchMode):
    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self.events: list[Event] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for address, (ref, _, number) in list(self.live.items()):
            if ref.expired():
                del self.live[address]
                self.events.append(Event(number))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.live:
                    number = len(self.events)
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), number
                    self.events.append(Event(number, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size, _ in self.live.values()))
        return out


def peak_live_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """known: tensors that were there before; views of them and writes into them are not counted."""
    with _LiveBytes(known) as mode, torch.inference_mode():
        run()
    return mode.peak


def allocations(run: Callable[[], object], known: Iterable[Tensor]) -> tuple[list[Event], int]:
    """What is allocated and freed, in order, and the most bytes alive at a time."""
    with _LiveBytes(known) as mode, torch.inference_mode():
        run()
    return mode.events, mode.peak


class _NoKernel:
    """Stands for a Triton kernel that is launched on nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda **_: None


@contextmanager
def opened_ops() -> Iterator[None]:
    """Runs the functions of this library's ops in place of them, as on an H100, without their kernels."""
    stand_ins = {
        "wrap_triton": lambda _: _NoKernel(),
        "dependent_launch_options": lambda _: {},
        "device_limits": lambda _: H100,
    }
    with mock.patch.dict(LINEAR_OPS, {kind: op._init_fn for kind, op in LINEAR_OPS.items()}):  # type: ignore[arg-type]
        patches = []
        for name, module in list(sys.modules.items()):
            if name.startswith("gemma4."):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, CustomOpDef) and "decode" not in attribute:
                        patches.append(mock.patch.object(module, attribute, value._init_fn))
                    elif attribute in stand_ins and "decode" not in name:
                        patches.append(mock.patch.object(module, attribute, stand_ins[attribute]))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
