"""The most memory that a piece of work takes, and how long its phases last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

_INTERVAL_S: Final = 0.02


class Peaks:
    """Samples host memory from a thread while it is entered; reads the GPU's from torch.

    host_bytes: most anonymous memory of this process (pages of mapped files do not count), None without Linux's /proc.
    device_bytes: most that torch held on the GPU, None on a CPU. seconds: by phase.
    """

    def __init__(self, device: torch.device, on_phase: Callable[[str], None] = lambda _: None) -> None:
        self.host_bytes = anonymous_bytes()
        self.seconds: dict[str, float] = {}
        self._device = device
        self._on_phase = on_phase
        self._stop = threading.Event()

    @property
    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(self._device)
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._on_phase(name)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            found = anonymous_bytes()
            if found is not None:
                self.host_bytes = max(found, self.host_bytes or 0)


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process that is resident now; None without Linux's /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), None)
