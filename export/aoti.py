"""`.pt2`: a model's two methods compiled ahead of time by AOTInductor, kernels only.

Nothing of a weight is read: the header says all that a compiler wants to know. At run time the weights come from the
GGUF itself (`gemma4.export.runtime`). The directory that is written holds

    model.pt2              both methods
    constants.safetensors  small constants that are neither weights of the file nor zeros at first
    manifest.json          what it was made from and for (`gemma4.export.manifest`)
"""

from __future__ import annotations

import logging
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma4 import __version__
from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.hollow_model import hollow_methods
from gemma4.export.low_memory import check_torch, is_without_storage, write_package
from gemma4.export.manifest import (
    CONSTANTS,
    FORMAT,
    MANIFEST,
    PACKAGE,
    FileIdentity,
    Manifest,
    StateTensor,
    target_of,
    triton_version,
)
from gemma4.export.method_process import MethodRequest, compile_methods, failure_of, python_command
from gemma4.export.methods import EXAMPLE_TOKENS, Method, MethodName
from gemma4.export.peaks import Peaks
from gemma4.export.report import ExportError, ExportReport
from gemma4.kernels.dependent_launch import dependent_kernels
from gemma4.mapping import plan_load
from gemma4.quant.atomic_directory import atomic_directory
from gemma4.quant.errors import ContextError, UnsupportedFeatureError
from gemma4.quant.gguf_file import GGUFFile

logger = logging.getLogger(__name__)

_CHECK_TIMEOUT_S: Final = 600


def export_aoti(
    gguf: str | Path,
    out: str | Path,
    *,
    max_seq_len: int = 4096,
    kv_cache: str = CacheKind.LOSSLESS,
    target: str | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Exports a GGUF file to the directory `out`, which must not exist or be empty.

    max_seq_len: positions a generation may use, at most the model's context. kv_cache: as in `Gemma4.from_gguf`.
    target: "cpu" or the compute capability of this machine's GPU ("sm_90"), by default that GPU's, else "cpu".
    on_phase: called with the name of each phase.
    Compiling reads shapes only: weights and caches take no memory on host or device.

    Raises a Gemma4Error that names the file, UnsupportedFeatureError for a target that is not this machine's or a
    version of torch that is not known, ExportError where compiling or the trial run fails, FileUnwritableError.
    """
    check_torch()
    device, dtype = _placement(target)
    peaks = Peaks(device, on_phase)
    with peaks.watching(), GGUFFile.open(gguf) as file:
        config = Gemma4Config.from_gguf(file)
        if not EXAMPLE_TOKENS <= max_seq_len <= config.context_length:
            raise ContextError(
                f"found {max_seq_len}, expected {EXAMPLE_TOKENS} to {config.context_length}", field="max_seq_len"
            )
        plan = plan_load(file, config)
        for fusion in plan.fusions:
            logger.info("%s", fusion)
        kind, host = CacheKind(kv_cache), torch.device("cpu")
        dtype_name = str(dtype).removeprefix("torch.")
        methods = hollow_methods(file, config, plan, max_seq_len, kind, dtype, host)
        with atomic_directory(out) as folder:
            requests = [
                MethodRequest(
                    gguf=file.path.resolve(),
                    method=name,
                    max_seq_len=max_seq_len,
                    kv_cache=kind,
                    dtype=dtype_name,
                    device=str(device),
                )
                for name in methods
            ]
            with peaks.phase("both methods"):
                compiled = compile_methods(requests, on_phase)
            with peaks.phase("package"):
                write_package(
                    folder / PACKAGE, {str(r.method): c.files for r, c in zip(requests, compiled, strict=True)}
                )
            state, constants = _split(methods[MethodName.DECODE])
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in constants.items()}, folder / CONSTANTS
            )
            Manifest(
                format=FORMAT,
                library=__version__,
                torch=torch.__version__,
                triton=triton_version(),
                machine=platform.machine(),
                target=target_of(device),
                dtype=dtype_name,
                max_seq_len=max_seq_len,
                chunk_size=methods[MethodName.PREFILL].max_tokens,
                kv_cache=str(kind),
                has_fusion=True,
                methods=tuple(map(str, methods)),
                dependent_kernels=dependent_kernels() if device.type == "cuda" else (),
                gguf=FileIdentity.of(file),
                state=state,
                config=config.model_dump(mode="json"),
            ).write(folder)
            with peaks.phase("trial run"):
                _try(folder, file.path)
            sizes = {name: (folder / name).stat().st_size for name in (PACKAGE, CONSTANTS, MANIFEST)}
    fusions = tuple(map(str, plan.fusions))
    seconds = {phase: s for method in compiled for phase, s in method.seconds.items()} | peaks.seconds
    hosts = [peaks.host_bytes, *(method.peak_host_bytes for method in compiled)]
    devices = [method.peak_device_bytes for method in compiled]
    return ExportReport(Path(out), sizes, seconds, _total(hosts), _total(devices), fusions)


def _total(peaks: Sequence[int | None]) -> int | None:
    """Of processes that run at once: no less than their peak together."""
    return None if None in peaks else sum(peak for peak in peaks if peak is not None)


def _placement(target: str | None) -> tuple[torch.device, torch.dtype]:
    here = target_of(torch.device("cuda")) if torch.cuda.is_available() else "cpu"
    if target not in (None, "cpu", here):
        raise UnsupportedFeatureError(f"found {target}, this machine compiles for cpu and runs {here}", field="target")
    if (target or here) == "cpu":
        return torch.device("cpu"), torch.float32
    return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16


def _split(method: Method) -> tuple[dict[str, StateTensor], dict[str, Tensor]]:
    """What a method reads beside the file's weights: tensors that start as zeros, and constants."""
    state: dict[str, StateTensor] = {}
    constants: dict[str, Tensor] = {}
    for name, buffer in method.named_buffers():
        if is_without_storage(buffer):
            state[name] = StateTensor(tuple(buffer.shape), str(buffer.dtype).removeprefix("torch."))
        else:
            constants[name] = buffer
    constants |= {name: p for name, p in method.named_parameters() if not is_without_storage(p)}
    return state, constants


def _try(folder: Path, gguf: Path) -> None:
    """Loads and runs both methods in another process, on zeros."""
    command, environment = python_command("gemma4.export.trial_run", str(folder), str(gguf))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"the exported model did not answer in {_CHECK_TIMEOUT_S} s", path=folder) from error
    if done.returncode:
        reason = failure_of(done.returncode, done.stderr)
        raise ExportError(f"the exported model does not run: {reason}", path=folder)
