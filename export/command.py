"""`gemma4 export`: the command line of both exporters."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma4.config import CacheKind

if TYPE_CHECKING:
    from gemma4.export.report import ExportReport


class Format(StrEnum):
    """pt2: AOTInductor, for Python. pte: ExecuTorch."""

    PT2 = "pt2"
    PTE = "pte"


def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A GGUF file, or any part of a split one.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A directory that does not exist, or is empty.", show_default=False)],
    format_: Annotated[Format, typer.Option("--format", help="pt2: for Python. pte: for ExecuTorch.")] = Format.PT2,
    max_seq_len: Annotated[int, typer.Option(min=1, help="Positions of prompt and answer together.")] = 4096,
    kv_cache: Annotated[
        CacheKind, typer.Option("--kv-cache", help="How full layers keep keys and values.")
    ] = CacheKind.LOSSLESS,
    target: Annotated[
        str | None,
        typer.Option(help="cpu, or the compute capability of this machine's GPU as in sm_90. Default: the GPU's."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compile a model ahead of time. It then runs without a compiler; weights are not part of a pt2 artifact."""
    phases = _Phases()
    if format_ is Format.PT2:
        from gemma4.export.aoti import export_aoti

        report = export_aoti(file, out, max_seq_len=max_seq_len, kv_cache=kv_cache, target=target, on_phase=phases)
    else:
        from gemma4.export.executorch import ExecutorchBackend, export_executorch

        backend = ExecutorchBackend.PORTABLE if target == "cpu" else ExecutorchBackend.CUDA
        report = export_executorch(
            file, out, backend=backend, max_seq_len=max_seq_len, kv_cache=kv_cache, on_phase=phases
        )
    if json_:
        print(json.dumps(_figures(report), indent=2), flush=True)
    else:
        _print_summary(report)


class _Phases:
    """Names each phase on stderr as it begins, with the time since the first; silent without a terminal."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def __call__(self, name: str) -> None:
        if sys.stderr.isatty():
            print(f"{time.perf_counter() - self._begin:7.1f} s  {name}", file=sys.stderr, flush=True)


def _figures(report: ExportReport) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "bytes": dict(report.sizes),
        "seconds": dict(report.seconds),
        "peak_host_anonymous_bytes": report.peak_host_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "fusions": list(report.fusions),
    }


def _print_summary(report: ExportReport) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(title=str(report.folder), title_justify="left", show_header=False)
    for name, size in report.sizes.items():
        table.add_row(name, decimal(size))
    for name, seconds in report.seconds.items():
        table.add_row(name, f"{seconds:.1f} s")
    for name, peak in (("host, anonymous", report.peak_host_bytes), ("device", report.peak_device_bytes)):
        if peak is not None:
            table.add_row(f"peak memory, {name}", decimal(peak))
    for fusion in report.fusions:
        table.add_row("fusion", fusion)
    Console(width=None if sys.stdout.isatty() else 132, highlight=False, markup=False, emoji=False).print(table)
