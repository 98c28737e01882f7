"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits before it reads.

A decode step is a chain of short kernels, and much of what a short kernel costs is starting. With dependent launch the
programs of a kernel are placed as soon as those of the kernel before it all run; they fetch weights, which nobody
writes, and only then wait for their inputs. CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"; compute capability 9.0 and later.

A kernel calls `await_inputs` before its first read of anything an earlier kernel wrote and before its first store, and
is launched with `dependent_launch_options`. Every one of its programs waits, so a finished kernel means that all before
it have finished too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["await_inputs", "dependent_kernels", "dependent_launch_options", "recorded_as_dependent"]


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Lets the next kernel start and waits until all earlier ones have finished."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_is_recorded: ContextVar[bool] = ContextVar("_is_recorded", default=False)


@contextmanager
def recorded_as_dependent() -> Iterator[None]:
    """Has a compiler record kernels that wait, though not how to launch them: it has no way to write that down.

    Launched plainly they wait for nothing. Whoever captures the launches as a graph may make them dependent.
    """
    token = _is_recorded.set(True)
    try:
        yield
    finally:
        _is_recorded.reset(token)


def dependent_launch_options(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel with a PDL switch; off where a compiler records the launch for other uses."""
    if not _has_dependent_launch(device):
        return {"PDL": False}
    if torch.compiler.is_compiling():
        return {"PDL": _is_recorded.get()}
    return {"PDL": True, "launch_pdl": True}


def dependent_kernels() -> tuple[str, ...]:
    """Names of the kernels with a PDL switch, of all modules of this package that are imported."""
    package = __name__.rpartition(".")[0]
    return tuple(
        sorted(
            value.__name__
            for name, module in sys.modules.items()
            if name.startswith(package)
            for value in vars(module).values()
            if isinstance(value, triton.runtime.JITFunction)
            and value.__name__.endswith("_kernel")
            and "PDL" in value.arg_names
        )
    )
