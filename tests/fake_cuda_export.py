"""Traces both methods of a model for a GPU that is not there, down to the kernels.

usage: FAKE_CUDA_GUARD=LIBRARY python -m tests.fake_cuda_export FILE KV_CACHE

Tensors are fake ones on a CUDA device, for which LIBRARY stands in (see `GUARD`), and Triton is told of an H100. Writes
JSON: for each method the names of all operators, the number of kernels, and which arguments kernels write.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
import triton
from torch import nn
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from gemma4.cache import KVCache
from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.low_memory import patched_compiler
from gemma4.export.methods import Method, methods_of
from gemma4.kernels.dependent_launch import recorded_as_dependent
from gemma4.mapping import plan_load
from gemma4.model import TextModel
from gemma4.quant.gguf_file import GGUFFile

GUARD: Final = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }
"""
"""C++ of a library that lets a torch without CUDA enter the CUDA device of fake tensors."""

H100: Final = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448, major=9, minor=0)


def graph_of(method: Method) -> dict[str, Any]:
    program = method.export()
    flag = mock.patch.object(torch.compiler, "_is_compiling_flag", new=True)
    with flag, patched_compiler(), recorded_as_dependent():
        program = program.run_decompositions({}, decompose_custom_triton_ops=True)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    kernels = [node for node in calls if "triton_kernel_wrapper" in str(node.target)]
    return {
        "operators": sorted({str(node.target) for node in calls}),
        "kernels": len(kernels),
        "written": sorted({name for node in kernels for name in node.kwargs.get("tensors_to_clone", ())}),
    }


def main() -> None:
    ctypes.CDLL(os.environ["FAKE_CUDA_GUARD"])
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    device = torch.device("cuda", 0)
    with (
        GGUFFile.open(Path(sys.argv[1])) as file,
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch("torch.cuda.get_device_properties", return_value=H100),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        FakeTensorMode(),
    ):
        config = Gemma4Config.from_gguf(file)
        model = TextModel(config, plan_load(file, config), torch.bfloat16, device).eval()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty_like(parameter, device=device)
                module.register_parameter(name, nn.Parameter(fake, requires_grad=False))
        cache = KVCache(config, config.context_length, torch.bfloat16, device, CacheKind(sys.argv[2]))
        json.dump({str(name): graph_of(method) for name, method in methods_of(model, cache).items()}, sys.stdout)


if __name__ == "__main__":
    main()
