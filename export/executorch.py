"""`export_executorch`: a GGUF file as an ExecuTorch program (`model.pte`) and its weights (a `.ptd`).

`cuda` is for builds of ExecuTorch with its CUDA backend, which PyPI's has not; `portable` runs anywhere, slowly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

from gemma4.api import Gemma4
from gemma4.cache import KVCache
from gemma4.config import CacheKind
from gemma4.export.aoti import ExportError, ExportReport
from gemma4.export.executorch_cuda import lower_cuda
from gemma4.export.executorch_method import constant_methods, runner_methods
from gemma4.export.executorch_portable import lower_portable
from gemma4.export.peaks import Peaks
from gemma4.quant.atomic_directory import atomic_directory
from gemma4.quant.errors import UnsupportedFeatureError
from gemma4.tokenizer import has_tokenizer

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
        with peaks.phase("load"):
            model = Gemma4.from_gguf(gguf, device=device, max_seq_len=max_seq_len, kv_cache=kv_cache)
        cache = KVCache(model.config, model.max_seq_len, model.model.dtype, device, model.kv_cache)
        has_text = has_tokenizer(model.metadata)
        suppress_ids = model.tokenizer.suppress_ids if has_text else ()
        eos_ids = sorted(model.tokenizer.eog_ids) if has_text else ()
        methods = runner_methods(model.model, cache, suppress_ids, with_logits=with_logits)
        constants = constant_methods(model.model, methods, model.max_seq_len, eos_ids)
        with peaks.phase("trace"):
            programs = {str(name): method.export() for name, method in methods.items()}
        with peaks.phase("compile"):
            try:
                manager = (lower_cuda if is_cuda else lower_portable)(programs, constants)
            except (RuntimeError, MemoryError) as error:
                raise ExportError(f"ExecuTorch cannot compile the model: {error}", path=out) from error
        with peaks.phase("write"):
            with open(folder / PROGRAM, "wb") as file:
                manager.write_to_file(file)
            manager.write_tensor_data_to_file(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    fusions = tuple(map(str, model.plan.fusions))
    return ExportReport(Path(out), sizes, peaks.seconds, peaks.host_bytes, peaks.device_bytes, fusions)


def check_executorch() -> None:
    """Raises UnsupportedFeatureError where ExecuTorch cannot be imported or is of another version."""
    if importlib.util.find_spec("executorch") is None:
        raise UnsupportedFeatureError("is not installed: pip install 'gemma4-gguf[export]'", field="executorch")
    found = metadata.version("executorch")
    if not found.startswith(f"{EXECUTORCH_VERSION}."):
        raise UnsupportedFeatureError(f"found {found}, export knows {EXECUTORCH_VERSION}", field="executorch")
