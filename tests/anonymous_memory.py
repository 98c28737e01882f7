"""How much anonymous memory a piece of code takes at its peak; mapped pages of files do not count."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_ROLLUP: Final = Path("/proc/self/smaps_rollup")
_INTERVAL_S: Final = 0.002


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident now."""
    (line,) = [line for line in _ROLLUP.read_text().splitlines() if line.startswith("Anonymous:")]
    return int(line.split()[1]) * 1024


class Meter:
    """Context manager that samples from a thread. peak_bytes: the most above what there was at the start."""

    def __enter__(self) -> Self:
        self._base = self._peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, anonymous_bytes())

    @property
    def peak_bytes(self) -> int:
        return self._peak - self._base

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._peak = max(self._peak, anonymous_bytes())
