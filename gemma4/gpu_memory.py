"""The memory of this machine's first NVIDIA GPU, from the driver's management library: no torch, no CUDA context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_NAME_BYTES = 96


@dataclass(frozen=True, slots=True)
class GPUMemory:
    """Bytes of a GPU. free_bytes: not taken by any process at the moment."""

    name: str
    total_bytes: int
    free_bytes: int


class _MemoryInfo(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def first_gpu() -> GPUMemory | None:
    """None where there is no driver or no GPU."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        device, memory = ctypes.c_void_p(), _MemoryInfo()
        name = ctypes.create_string_buffer(_NAME_BYTES)
        failed = (
            nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
            or nvml.nvmlDeviceGetName(device, name, _NAME_BYTES)
            or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        )
        return None if failed else GPUMemory(name.value.decode(errors="replace"), memory.total, memory.free)
    finally:
        nvml.nvmlShutdown()
