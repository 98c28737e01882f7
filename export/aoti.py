"""`.pt2`: a model's two methods compiled ahead of time by AOTInductor, kernels only.

Nothing of a weight is read: the header says all that a compiler wants to know. At run time the weights come from the
GGUF itself (`gemma4.export.runtime`). The directory that is written holds

    model.pt2              both methods
    constants.safetensors  small constants that are neither weights of the file nor zeros at first
    manifest.json          what it was made from and for (`gemma4.export.manifest`)
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gemma4 import __version__
from gemma4.cache import KVCache
from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.low_memory import (
    check_torch,
    compile_method,
    is_without_storage,
    low_memory,
    without_storage,
    write_package,
)
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
from gemma4.export.methods import EXAMPLE_TOKENS, Method, MethodName, methods_of
from gemma4.export.peaks import Peaks
from gemma4.kernels.dependent_launch import dependent_kernels, recorded_as_dependent
from gemma4.mapping import plan_load
from gemma4.model import TextModel
from gemma4.quant.atomic_directory import atomic_directory
from gemma4.quant.errors import ContextError, Gemma4Error, UnsupportedFeatureError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from gemma4.tokenizer import has_tokenizer, tokenizer_from_metadata

logger = logging.getLogger(__name__)

_CHECK_TIMEOUT_S: Final = 600


class ExportError(Gemma4Error):
    """The compiler failed, or what it made does not run."""

    code = "export"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """sizes: bytes of the files written. seconds: of each phase. Peaks as in `gemma4.export.peaks.Peaks`."""

    folder: Path
    sizes: Mapping[str, int]
    seconds: Mapping[str, float]
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    fusions: tuple[str, ...]


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
        with atomic_directory(out) as folder:
            methods = _methods(file, config, plan, max_seq_len, CacheKind(kv_cache), dtype, device)
            _compile(methods, device, folder / PACKAGE, peaks)
            first = methods[MethodName.DECODE]
            state, constants = _split(first, plan)
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
                dtype=str(dtype).removeprefix("torch."),
                max_seq_len=max_seq_len,
                chunk_size=methods[MethodName.PREFILL].max_tokens,
                kv_cache=str(CacheKind(kv_cache)),
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
    return ExportReport(Path(out), sizes, peaks.seconds, peaks.host_bytes, peaks.device_bytes, fusions)


def _placement(target: str | None) -> tuple[torch.device, torch.dtype]:
    here = target_of(torch.device("cuda")) if torch.cuda.is_available() else "cpu"
    if target not in (None, "cpu", here):
        raise UnsupportedFeatureError(f"found {target}, this machine compiles for cpu and runs {here}", field="target")
    if (target or here) == "cpu":
        return torch.device("cpu"), torch.float32
    return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16


def _methods(
    file: GGUFFile,
    config: Gemma4Config,
    plan: LoadPlan,
    max_seq_len: int,
    kv_cache: CacheKind,
    dtype: torch.dtype,
    device: torch.device,
) -> Mapping[MethodName, Method]:
    """Both methods over weights and a cache that take no memory."""
    model = TextModel(config, plan, dtype, device).eval()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                freed = nn.Parameter(without_storage(parameter, device), requires_grad=False)
                module.register_parameter(name, freed)
    cache = KVCache(config, max_seq_len, dtype, "meta", kv_cache)
    # A short cache shows what starts as zeros; what does not is the same for every length.
    short = KVCache(config, EXAMPLE_TOKENS, dtype, device, kv_cache)
    for i, layer in cache.own.items():
        start = short.own[i].tensors()
        for name, tensor in layer.tensors().items():
            setattr(layer, name, start[name] if bool(start[name].any()) else without_storage(tensor, device))
    has_text = has_tokenizer(file.metadata)
    suppress_ids = tokenizer_from_metadata(file.metadata, file.path).suppress_ids if has_text else ()
    return methods_of(model, cache, suppress_ids, with_logits=True)


def _compile(methods: Mapping[MethodName, Method], device: torch.device, package: Path, peaks: Peaks) -> None:
    files = {}
    try:
        for name, method in methods.items():
            with low_memory(method), recorded_as_dependent():
                with peaks.phase(f"trace {name}"):
                    program = method.export()
                with peaks.phase(f"compile {name}"):
                    files[str(name)] = compile_method(program, device)
        with peaks.phase("package"):
            write_package(package, files)
    except MemoryError as error:
        raise ExportError("out of memory on the host while compiling", path=package.parent) from error
    except RuntimeError as error:  # what the compiler raises, and torch without memory: one of them wraps the other
        is_full = "out of memory" in str(error)
        what = "out of memory on the GPU while compiling" if is_full else "the compiler failed"
        raise ExportError(f"{what}: {str(error).strip().splitlines()[0]}", path=package.parent) from error


def _split(method: Method, plan: LoadPlan) -> tuple[dict[str, StateTensor], dict[str, Tensor]]:
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
    command = [sys.executable, "-m", "gemma4.export.trial_run", str(folder), str(gguf)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"the exported model did not answer in {_CHECK_TIMEOUT_S} s", path=folder) from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        if done.returncode < 0:
            reason = [
                f"it ended by signal {-done.returncode}; a C++ compiler that links libstdc++ statically makes such "
                "libraries, try CXX=/usr/bin/g++ CC=/usr/bin/gcc"
            ]
        raise ExportError(f"the exported model does not run: {reason[0]}", path=folder)
