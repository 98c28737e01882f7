"""Verifies what `export_executorch` wrote, as far as a machine without ExecuTorch's CUDA backend can.

program    loads in `executorch.runtime`; its methods and constants read back
weights    each one in the data file has the bytes of the model's own, and none is missing
libraries  the library of each CUDA method loads, has the entry points that the backend calls, and needs no symbol
           but those of the libraries it names, of the CUDA runtime and of the backend's shims
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gemma4.export.cuda_weights import CudaMethod
from gemma4.export.elf import SharedLibrary
from gemma4.export.executorch_files import DataFile, ProgramFile
from gemma4.export.method_process import python_command
from gemma4.export.methods import MethodName
from gemma4.quant.errors import MalformedError, MissingTensorError, UnexpectedTensorError

CUDA_BACKEND: Final = "CudaBackend"
# What ExecuTorch's CUDA backend looks up in a library.
ENTRY_POINTS: Final = tuple(
    f"AOTInductorModel{name}"
    for name in (
        "ContainerCreateWithDevice",
        "ContainerDelete",
        "ContainerGetNumInputs",
        "ContainerGetNumOutputs",
        "ContainerRun",
        "ContainerGetNumConstants",
        "ContainerGetConstantName",
        "ContainerGetConstantOriginalFQN",
        "ContainerUpdateUserManagedConstantBufferPairs",
    )
)
_DTYPES: Final = ("float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SHIMS: Final = (
    *("get_data_ptr", "get_sizes", "get_strides", "get_dtype", "get_dim", "get_numel", "get_storage_offset"),
    *("get_storage_size", "get_device_type", "get_device_index", "layout_strided", "check", "warn"),
    *("grad_mode_is_enabled", "grad_mode_set_enabled", "device_type_cpu", "device_type_cuda"),
    *("create_tensor_from_blob", "create_tensor_from_blob_v2", "empty_strided", "empty_strided_pinned"),
    *("delete_tensor_object", "new_tensor_handle", "clone", "clone_preserve_strides", "_reinterpret_tensor"),
    *("copy_", "assign_tensors_out", "create_cuda_guard", "delete_cuda_guard", "cuda_guard_set_index"),
    *("create_cuda_stream_guard", "delete_cuda_stream_guard", "get_current_cuda_stream"),
    *("cuda_rand", "cuda_randint_low_out", "cuda_sort_stable", "cuda__weight_int4pack_mm"),
    *(f"dtype_{name}" for name in _DTYPES),
    *(f"item_{name}" for name in _DTYPES if name not in ("float16",)),
)
SHIMS: Final = frozenset(f"aoti_torch_{name}" for name in _SHIMS)
"""Functions that ExecuTorch's CUDA backend offers to the libraries it loads (its `common_shims` and `shims/*.h`)."""
# The CUDA runtime, which the backend is linked with, has functions of such names.
_CUDA_RUNTIME: Final = re.compile("cuda[A-Z]")
# Torch has functions of the same names, which a library may call while it is loaded.
_TORCH_FUNCTIONS: Final = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_CHUNK_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class PteReport:
    """constants: by name. weight_bytes: of those compared. shims: what the libraries take from the CUDA backend."""

    methods: tuple[str, ...]
    constants: Mapping[str, tuple[Any, ...]]
    backends: tuple[str, ...]
    weights: int
    weight_bytes: int
    libraries: int
    shims: tuple[str, ...]


def verify_pte(program: str | Path, data: str | Path, weights: Mapping[str, Tensor]) -> PteReport:
    """weights: the exported module's parameters and buffers under all of their names; each is asked for once or twice.

    Raises MalformedError, MissingTensorError or UnexpectedTensorError, which name the file and what is wrong with it.
    """
    program, data = Path(program), Path(data)
    names, constants = _load(program, data)
    file, blobs = ProgramFile.open(program), DataFile.open(data)
    delegates = [delegate for name in MethodName for delegate in file.delegates.get(name, ())]
    used: dict[str, str] = {}  # keys of the data file by name
    shims: set[str] = set()
    libraries: set[str] = set()
    for delegate in delegates:
        if delegate.backend != CUDA_BACKEND:
            raise MalformedError(f"found the backend {delegate.backend}, expected {CUDA_BACKEND}", path=program)
        method = CudaMethod.parse(delegate.payload, program)
        for weight in method.weights:
            # Names without a dot are of numbers in the graph, which tracing named. Methods share keys.
            if "." in weight.name and used.get(weight.name) != weight.key:
                _compare(weight.name, weights, blobs, weight.key)
                used[weight.name] = weight.key
        library = file.named_data.get(method.library) or blobs.blobs.get(method.library)
        if library is None:
            raise MalformedError(f"no library {method.library}", path=program)
        shims |= check_library(library, program)
        libraries.add(method.library)
    if not delegates:
        for name in blobs.blobs:
            _compare(name, weights, blobs, name)
            used[name] = name
    _check_complete(used, weights, blobs, has_buffers=bool(delegates))
    return PteReport(
        methods=tuple(sorted(names & set(MethodName))),
        constants=constants,
        backends=tuple(sorted({delegate.backend for delegate in delegates})),
        weights=len(used),
        weight_bytes=sum(len(blobs.blobs[key]) for key in used.values()),
        libraries=len(libraries),
        shims=tuple(sorted(shims)),
    )


def check_library(library: memoryview, path: Path) -> set[str]:
    """Loads a CUDA method's library and returns the shims it needs. path: named in errors. Raises MalformedError."""
    parsed = SharedLibrary.parse(library, path)
    missing = [name for name in ENTRY_POINTS if name not in parsed.defined]
    if missing:
        raise MalformedError(f"a library lacks {', '.join(missing)}", path=path)
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        command, environment = python_command("gemma4.export.library_check", file.name, str(_TORCH_FUNCTIONS))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise MalformedError(f"a library does not load: {reason}", path=path)
    unresolved = set(json.loads(done.stdout.splitlines()[-1]))
    shims = {name for name in unresolved if not _CUDA_RUNTIME.match(name)}
    unknown = shims - SHIMS
    if unknown:
        raise MalformedError(f"a library needs what ExecuTorch lacks: {', '.join(sorted(unknown))}", path=path)
    return shims


def _load(program: Path, data: Path) -> tuple[set[str], dict[str, tuple[Any, ...]]]:
    """Names of all methods, and what those without inputs return."""
    from executorch.runtime import Runtime

    try:
        loaded = Runtime.get().load_program(program, data_path=data)
        names = set(loaded.method_names)
        missing = set(MethodName) - names
        if missing:
            raise MalformedError(f"no method {', '.join(sorted(missing))}", path=program)
        constants = {name: tuple(loaded.load_method(name).execute([])) for name in sorted(names - set(MethodName))}
        for name in MethodName:
            loaded.metadata(name)
    except RuntimeError as error:
        raise MalformedError(f"does not load in executorch.runtime: {error}", path=program) from error
    return names, constants


def _compare(name: str, weights: Mapping[str, Tensor], blobs: DataFile, key: str) -> None:
    if name not in weights:
        raise UnexpectedTensorError("the model has no such weight", path=blobs.path, field=name)
    if key not in blobs.blobs:
        raise MissingTensorError("is not in the data file", path=blobs.path, field=name)
    blob, tensor = blobs.blobs[key], weights[name]
    if len(blob) != tensor.nbytes:
        raise MalformedError(f"found {len(blob)} bytes, expected {tensor.nbytes}", path=blobs.path, field=name)
    if not _is_equal(tensor, blob):
        raise MalformedError("its bytes differ from the model's", path=blobs.path, field=name)


def _is_equal(tensor: Tensor, blob: memoryview) -> bool:
    starts = range(0, tensor.nbytes, _CHUNK_BYTES)
    chunks = zip(starts, _chunks(tensor), strict=True)
    return len(blob) == tensor.nbytes and all(blob[at : at + len(chunk)] == chunk for at, chunk in chunks)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        yield memoryview(flat[start : start + _CHUNK_BYTES].cpu().numpy())  # type: ignore[arg-type]


def _check_complete(
    used: Mapping[str, str], weights: Mapping[str, Tensor], blobs: DataFile, *, has_buffers: bool
) -> None:
    """Every weight is there under one of its names. has_buffers: those of the cache, too, are in the data file."""
    for name in weights.keys() - used.keys():
        tensor = weights[name]
        if not has_buffers and not isinstance(tensor, torch.nn.Parameter):
            continue
        equal = [other for other, key in used.items() if _is_equal(tensor, blobs.blobs[key])]
        if not any(weights[other].data_ptr() == tensor.data_ptr() for other in equal):
            raise MissingTensorError("is not in the data file", path=blobs.path, field=name)
