"""`export_executorch`: a GGUF file as an ExecuTorch program (`model.pte`) and its weights (a `.ptd`).

`cuda` is for builds of ExecuTorch with its CUDA backend, which PyPI's has not; `portable` runs anywhere, slowly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from gemma4.api import Gemma4
from gemma4.cache import KVCache
from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.executorch_cuda import lower_cuda
from gemma4.export.executorch_method import RunnerMethod, constant_methods, runner_methods
from gemma4.export.executorch_portable import lower_portable
from gemma4.export.hollow_model import hollow_methods
from gemma4.export.host_tensors import HostTensors
from gemma4.export.low_memory import patched_compiler
from gemma4.export.methods import MethodName
from gemma4.export.peaks import Peaks
from gemma4.export.report import ExportError, ExportReport
from gemma4.mapping import plan_load
from gemma4.quant.atomic_directory import atomic_directory
from gemma4.quant.errors import UnsupportedFeatureError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from gemma4.tokenizer import has_tokenizer, tokenizer_from_metadata

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

PROGRAM: Final = "model.pte"
EXECUTORCH_VERSION: Final = "1.5"
"""What these exporters were tried with."""


class ExecutorchBackend(StrEnum):
    CUDA = "cuda"
    PORTABLE = "portable"


def export_executorch(
    gguf: str | Path,
    out: str | Path,
    *,
    backend: ExecutorchBackend | str = ExecutorchBackend.CUDA,
    max_seq_len: int = 4096,
    kv_cache: str = CacheKind.LOSSLESS,
    with_logits: bool = False,
    on_phase: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Exports a GGUF file to the directory `out`, which must not exist or be empty.

    backend: `cuda` compiles on and for this machine's GPU. max_seq_len: positions of the cache, at most the model's
    context. kv_cache: as in `Gemma4.from_gguf`. with_logits: methods return logits beside the token. on_phase: called
    with the name of each phase.

    Raises a Gemma4Error that names the file, UnsupportedFeatureError where ExecuTorch is missing or of another version,
    ExportError where it cannot compile the model, FileUnwritableError.
    """
    backend = ExecutorchBackend(backend)
    check_executorch()
    is_cuda = backend is ExecutorchBackend.CUDA
    if is_cuda and not torch.cuda.is_available():
        raise UnsupportedFeatureError("found no GPU to compile for", field="backend")
    if not is_cuda and kv_cache != CacheKind.LOSSLESS:
        raise UnsupportedFeatureError(
            f"found {kv_cache}, portable programs hold {CacheKind.LOSSLESS}", field="kv_cache"
        )
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
    peaks = Peaks(device, on_phase)
    with peaks.watching(), atomic_directory(out) as folder:
        if is_cuda:
            plan = _export_cuda(gguf, folder, device, max_seq_len, CacheKind(kv_cache), with_logits, peaks)
        else:
            plan = _export_portable(gguf, folder, max_seq_len, with_logits, peaks)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    fusions = tuple(map(str, plan.fusions))
    return ExportReport(Path(out), sizes, peaks.seconds, peaks.host_bytes, peaks.device_bytes, fusions)


def _export_cuda(
    gguf: str | Path,
    folder: Path,
    device: torch.device,
    max_seq_len: int,
    kv_cache: CacheKind,
    with_logits: bool,
    peaks: Peaks,
) -> LoadPlan:
    """Compiles without weights, which are unpacked from the file while the data file is written."""
    with GGUFFile.open(gguf) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
        max_seq_len = min(max_seq_len, config.context_length)
        hollow = hollow_methods(file, config, plan, max_seq_len, kv_cache, torch.bfloat16, device)
        methods = {name: RunnerMethod.of(method, with_logits=with_logits) for name, method in hollow.items()}
        tensors = HostTensors(file, plan, methods[MethodName.DECODE])
        constants = constant_methods(methods, max_seq_len, _eos_ids(file.metadata, file.path))
        with peaks.phase("trace"), patched_compiler():
            programs = {str(name): method.export() for name, method in methods.items()}
        with _compiling(peaks, gguf):
            manager = lower_cuda(programs, constants, tensors)
        with peaks.phase("write"):
            _write(manager, folder)
    return plan


def _export_portable(gguf: str | Path, folder: Path, max_seq_len: int, with_logits: bool, peaks: Peaks) -> LoadPlan:
    with peaks.phase("load"):
        model = Gemma4.from_gguf(gguf, device="cpu", max_seq_len=max_seq_len)
    cache = KVCache(model.config, model.max_seq_len, model.model.dtype)
    suppress_ids = model.tokenizer.suppress_ids if has_tokenizer(model.metadata) else ()
    methods = runner_methods(model.model, cache, suppress_ids, with_logits=with_logits)
    constants = constant_methods(methods, model.max_seq_len, _eos_ids(model.metadata, model.path))
    with peaks.phase("trace"):
        programs = {str(name): method.export() for name, method in methods.items()}
    with _compiling(peaks, gguf):
        manager = lower_portable(programs, constants)
    with peaks.phase("write"):
        _write(manager, folder)
    return model.plan


@contextmanager
def _compiling(peaks: Peaks, gguf: str | Path) -> Iterator[None]:
    with peaks.phase("compile"):
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise ExportError(f"ExecuTorch cannot compile the model: {error}", path=gguf) from error


def _eos_ids(header: Mapping[str, Any], path: Path) -> list[int]:
    return sorted(tokenizer_from_metadata(header, path).eog_ids) if has_tokenizer(header) else []


def _write(manager: ExecutorchProgramManager, folder: Path) -> None:
    with open(folder / PROGRAM, "wb") as file:
        manager.write_to_file(file)
    manager.write_tensor_data_to_file(folder)


def check_executorch() -> None:
    """Raises UnsupportedFeatureError where ExecuTorch cannot be imported or is of another version."""
    if importlib.util.find_spec("executorch") is None:
        raise UnsupportedFeatureError("is not installed: pip install 'gemma4-gguf[export]'", field="executorch")
    found = metadata.version("executorch")
    if not found.startswith(f"{EXECUTORCH_VERSION}."):
        raise UnsupportedFeatureError(f"found {found}, export knows {EXECUTORCH_VERSION}", field="executorch")
