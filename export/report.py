"""What an exporter tells: a report, or that it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma4.quant.errors import Gemma4Error


class ExportError(Gemma4Error):
    """The compiler failed, or what it made does not run."""

    code = "export"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """sizes: bytes of the files written. seconds: of each phase; methods may be compiled at once.

    peak_host_bytes, peak_device_bytes: as in `gemma4.export.peaks.Peaks`, of all processes together.
    """

    folder: Path
    sizes: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    fusions: tuple[str, ...]
