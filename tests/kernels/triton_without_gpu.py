"""Two ways to try Triton kernels without a GPU: run them in the interpreter, and compile them for a named GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

SHARED_LIMITS = {80: 166912, 90: 232448, 120: 101376}
"""Bytes of shared memory that one program may use, by compute capability (CUDA programming guide)."""

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def allow_loops_over_tensors() -> None:
    """Let interpreted loops take their bounds from loaded values, which NumPy 2.4 made an error."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


def run_interpreted(file: Path) -> str:
    """Run the tests of one file, with kernels in the interpreter, in a process of their own; returns the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class _Recorder:
    """Stands in for wrap_triton: notes each launch instead of making it."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __call__(self, kernel: Any) -> Any:
        launch = mock.MagicMock()
        launch.__getitem__.return_value = lambda **arguments: self.launches.append((kernel, arguments))
        return launch


def record_launches(module: ModuleType, function: str, *args: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Every kernel that module.function(*args) would launch, with its arguments."""
    recorder = _Recorder()
    with mock.patch.object(module, "wrap_triton", recorder):
        getattr(module, function)(*args)
    return recorder.launches


def compile_launches(module: ModuleType, capability: int, function: str, *args: Any) -> list[Any]:
    """Compile every kernel that module.function(*args), given meta tensors, would launch on that capability."""
    launches = record_launches(module, function, *args)
    return [_compile(kernel, arguments, capability) for kernel, arguments in launches]


def _compile(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            # Inductor declares Python floats as fp64, a plain launch as fp32: fp64 is the harder one to compile.
            signature[parameter.name] = "fp64" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    attributes = {index: value for index, value in attributes.items() if index not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": arguments["num_warps"]}
    )
