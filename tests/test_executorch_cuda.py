"""The `.pte` for ExecuTorch's CUDA backend: all but its compiler, for which something stands in; libraries are read."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget

from gemma4.export.cuda_weights import CudaMethod
from gemma4.export.elf import SharedLibrary
from gemma4.export.executorch_cuda import lower_cuda
from gemma4.export.executorch_files import ProgramFile
from gemma4.export.verify_pte import CUDA_BACKEND, ENTRY_POINTS, check_library, verify_pte
from gemma4.quant.errors import MalformedError
from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.linear import Linear
from gemma4.quant.packed_weight import PackedWeight


def library(folder: Path, *, names: tuple[str, ...] = ENTRY_POINTS, calls: str = "aoti_torch_get_data_ptr") -> Path:
    """A shared library with these functions, the first of which calls another and one of the C library."""
    source = f"int {calls}(void); int puts(const char *);\n"
    source += "".join(f'int {name}(void) {{ return {calls}() + puts(""); }}\n' for name in names)
    path = folder / f"{calls}{len(names)}.wrapper.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(path), "-"]
    subprocess.run(command, input=source.encode(), check=True, capture_output=True)
    return path


def test_a_library_is_read_as_the_loader_reads_it(tmp_path: Path) -> None:
    parsed = SharedLibrary.parse(memoryview(library(tmp_path).read_bytes()))
    assert set(ENTRY_POINTS) <= parsed.defined
    assert {"puts", "aoti_torch_get_data_ptr"} <= {name.partition("@")[0] for name in parsed.undefined}
    assert "libc.so.6" in parsed.needed


def test_shims_are_told_from_the_c_library(tmp_path: Path) -> None:
    path = library(tmp_path)
    assert check_library(memoryview(path.read_bytes()), path) == {"aoti_torch_get_data_ptr"}


def test_what_executorch_lacks_is_named(tmp_path: Path) -> None:
    path = library(tmp_path, calls="aoti_torch_cuda_mm_out")
    with pytest.raises(MalformedError, match="lacks: aoti_torch_cuda_mm_out"):
        check_library(memoryview(path.read_bytes()), path)


def test_a_missing_entry_point_is_named(tmp_path: Path) -> None:
    path = library(tmp_path, names=ENTRY_POINTS[1:])
    with pytest.raises(MalformedError, match=ENTRY_POINTS[0]):
        check_library(memoryview(path.read_bytes()), path)


@pytest.mark.parametrize("size", [0, 5, 64, 1000])
def test_cut_libraries_are_refused(tmp_path: Path, size: int) -> None:
    content = library(tmp_path).read_bytes()[:size]
    with pytest.raises(MalformedError):
        SharedLibrary.parse(memoryview(content), tmp_path)


def test_own_libraries_resolve() -> None:
    """Against the dynamic linker: what torch's library does not define, this process can find."""
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    parsed = SharedLibrary.parse(memoryview(path.read_bytes()))
    loaded = ctypes.CDLL(str(path))
    for name in sorted(parsed.undefined)[::20]:
        assert loaded[name]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """AOTInductor replaced: its library is a C file's, its weights are the program's own. Records what it is given."""
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from torch.export.pt2_archive._package_weights import TensorProperties, Weights

    given: list[torch.fx.GraphModule] = []

    def compile_module(module: torch.fx.GraphModule, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> list[Any]:
        given.append(module)
        path = library(tmp_path, names=(*ENTRY_POINTS, f"method{len(given)}"))
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        return [str(path), Weights({name: (tensor, TensorProperties(tensor)) for name, tensor in tensors.items()})]

    monkeypatch.setattr(torch._inductor, "aot_compile", compile_module)
    monkeypatch.setattr(CudaBackend, "move_program_to_device", lambda program, device, specs: program)
    monkeypatch.setitem(sys.modules, "torchtune", None)
    return given


class Step(torch.nn.Module):
    """A packed product and a cache: all that a method is made of, small."""

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        packed = PackedWeight(weight.ggml_type, weight.shape)
        packed.assign(weight)
        self.model = Linear(packed, torch.float32)
        self.cache = torch.nn.Module()
        self.cache.register_buffer("k", torch.zeros(16, weight.shape[1]))

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        keys = self.cache.get_buffer("k")
        keys.index_copy_(0, input_pos, x)
        return self.model((x + keys.sum(0),))


def test_weights_methods_and_libraries_of_a_cuda_program(tmp_path: Path, stand_in: list[torch.fx.GraphModule]) -> None:
    values = np.random.default_rng(0).standard_normal((8, 256), dtype=np.float32)
    blocks = torch.from_numpy(libgguf.quantize_rows(values, GGMLType.Q4_K).view(np.uint8))
    weight = container_for(GGMLType.Q4_K).from_blocks(blocks, 256)
    step = Step(weight)
    with torch.no_grad():
        decode = torch.export.export(step, (torch.zeros(1, 256), torch.zeros(1, dtype=torch.int64)), strict=False)
        shapes = {0: torch.export.Dim("tokens", min=1, max=16)}
        inputs = (torch.zeros(12, 256), torch.arange(12))
        prefill = torch.export.export(step, inputs, dynamic_shapes=(shapes, shapes), strict=False)
    manager = lower_cuda({"decode": decode, "prefill": prefill}, {"get_min_prefill_chunk": 1, "get_eos_ids": [3, 5]})
    out = tmp_path / "out"
    out.mkdir()
    with open(out / "model.pte", "wb") as file:
        manager.write_to_file(file)
    manager.write_tensor_data_to_file(out)

    weights = {f"model.weight.{name}": plane for name, plane in weight.planes_dict().items()}
    weights["cache.k"] = torch.zeros(16, 256)
    report = verify_pte(out / "model.pte", out / "aoti_cuda_blob.ptd", weights)
    assert report.backends == (CUDA_BACKEND,)
    assert report.methods == ("decode", "prefill")
    assert report.libraries == 2
    assert report.shims == ("aoti_torch_get_data_ptr",)
    assert report.constants == {"get_eos_ids": (3, 5), "get_min_prefill_chunk": (1,)}
    assert report.weights == 4
    delegates = ProgramFile.open(out / "model.pte").delegates
    assert [len(delegates[name]) for name in ("decode", "prefill")] == [1, 1]
    by_method = [CudaMethod.parse(delegates[name][0].payload) for name in ("decode", "prefill")]
    stored = [{w.key for w in method.weights if "." in w.name} for method in by_method]
    assert stored[0] == stored[1]  # once for both
    weights["model.weight.qs"] = weights["model.weight.qs"] ^ 1
    with pytest.raises(MalformedError, match=r"model\.weight\.qs: its bytes differ"):
        verify_pte(out / "model.pte", out / "aoti_cuda_blob.ptd", weights)


@triton.jit
def add_kernel(out_ptr, x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    tl.store(out_ptr + offs, tl.load(out_ptr + offs, mask=mask) + tl.load(x_ptr + offs, mask=mask), mask=mask)


@triton_op("gemma4_test::add_to", mutates_args={"out"})
def add_to(out: Tensor, x: Tensor) -> None:
    wrap_triton(add_kernel)[(1,)](out_ptr=out, x_ptr=x, N=x.shape[0], BLOCK=64)


class Accumulator(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        add_to(self.total, x)
        return self.total * 2


class Driver:
    """Tells Triton of a GPU, so that it can see what a kernel writes to."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_kernels_that_mutate_reach_the_compiler(
    stand_in: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    with torch.no_grad():
        program = torch.export.export(Accumulator(), (torch.zeros(64),), strict=False)
    lower_cuda({"decode": program}, {"get_n_layers": 1})
    (module,) = stand_in
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert any("triton_kernel_wrapper" in target for target in targets)
    assert not any("auto_functionalized" in target or "gemma4_test" in target for target in targets)
