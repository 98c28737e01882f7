"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits only before reading.

A decode step is a chain of short kernels; most of what they cost alone is starting. With dependent launch a kernel
places its programs early, brings its weights towards the chip, and only then waits for its inputs. CUDA programming
guide, "Programmatic Dependent Launch"; compute capability 9.0 and later.

A kernel calls `await_inputs` before its first read of anything an earlier kernel wrote and before its first store, and
is launched with `dependent_launch_options`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["await_inputs", "dependent_launch_options", "prefetch_bytes"]

_CACHE_LINE = tl.constexpr(128)
_FIRST_WAVE = tl.constexpr(4096)  # programs that may be on the chip before the inputs are ready


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Lets the next kernel start and waits until all earlier ones have finished."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_bytes(ptr, LANES: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr):
    """Asks for SIZE bytes from a scalar pointer on to be brought into L2, LANES cache lines at a time."""
    if PDL and tl.program_id(0) < _FIRST_WAVE:
        for first in tl.static_range(0, SIZE, LANES * _CACHE_LINE):
            offset = tl.minimum(first + tl.arange(0, LANES) * _CACHE_LINE, SIZE - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [tl.cast(ptr, tl.int64) + offset],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch_options(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel with a PDL switch; off where a compiler records the launch."""
    is_on = device.type == "cuda" and not torch.compiler.is_compiling() and _has_dependent_launch(device)
    return {"PDL": True, "launch_pdl": True} if is_on else {"PDL": False}
