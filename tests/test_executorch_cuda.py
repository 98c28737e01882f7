"""The `.pte` for ExecuTorch's CUDA backend: all but its compiler, for which something stands in; libraries are read."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget

from gemma4 import Gemma4
from gemma4.config import CacheKind
from gemma4.export.cuda_weights import CudaMethod
from gemma4.export.elf import SharedLibrary
from gemma4.export.executorch import _export_cuda
from gemma4.export.executorch_cuda import lower_cuda
from gemma4.export.executorch_files import DataFile, ProgramFile
from gemma4.export.host_tensors import HostTensors, host_tensors
from gemma4.export.peaks import Peaks
from gemma4.export.verify_pte import CUDA_BACKEND, ENTRY_POINTS, check_library, verify_pte
from gemma4.quant.errors import MalformedError, MissingTensorError, UnexpectedTensorError, UnsupportedFeatureError
from tests.tiny_gguf import gemma4


def library(
    folder: Path,
    *,
    names: tuple[str, ...] = ENTRY_POINTS,
    calls: str = "aoti_torch_get_data_ptr",
    at_once: bool = False,
) -> Path:
    """A shared library with these functions, which call another and one of the C library; the other `at_once`, too."""
    source = f"int {calls}(void); int puts(const char *);\n"
    source += "".join(f'int {name}(void) {{ return {calls}() + puts(""); }}\n' for name in names)
    if at_once:
        source += f"__attribute__((constructor)) static void load(void) {{ {calls}(); }}\n"
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


def test_a_library_may_call_a_shim_while_it_is_loaded(tmp_path: Path) -> None:
    path = library(tmp_path, calls="aoti_torch_dtype_float32", at_once=True)
    assert check_library(memoryview(path.read_bytes()), path) == {"aoti_torch_dtype_float32"}
    path = library(tmp_path, calls="aoti_torch_no_such", at_once=True)
    with pytest.raises(MalformedError, match=r"does not load: .*aoti_torch_no_such"):
        check_library(memoryview(path.read_bytes()), path)


def test_the_cuda_runtime_comes_with_the_backend(tmp_path: Path) -> None:
    path = library(tmp_path, calls="cudaEventRecord")
    assert check_library(memoryview(path.read_bytes()), path) == set()


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
    from torch._inductor import codecache, compile_fx, graph
    from torch.export.pt2_archive._package_weights import Weights

    given: list[torch.fx.GraphModule] = []
    get_original = "get_original_value_of_constant"

    def _unlift_graph(tensor: Tensor) -> Tensor:  # ExecuTorch knows the caller by this name
        return compile_fx.clone_preserve_strides(tensor)

    def compile_module(module: torch.fx.GraphModule, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> list[Any]:
        given.append(module)
        path = library(tmp_path, names=(*ENTRY_POINTS, f"method{len(given)}"))
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        clones = {f"_cloned_{name}": _unlift_graph(buffer) for name, buffer in module.named_buffers()}
        monkeypatch.setattr(graph, "get_cloned_parameter_buffer_name", lambda name: f"_cloned_{name}")
        lowering = SimpleNamespace(
            constants=tensors,
            allocated_constant_name={name: name for name in tensors},
            module=SimpleNamespace(meta=clones),
        )
        original = getattr(graph.GraphLowering, get_original)
        return [
            str(path),
            Weights({name: (original(lowering, name), codecache.TensorProperties(t)) for name, t in tensors.items()}),
        ]

    def free_all(program: torch.export.ExportedProgram, specs: object) -> None:
        for name, tensor in (*program.state_dict.items(), *program.constants.items()):
            if name.startswith(("model.", "cache.")):  # others are numbers, on the host
                tensor.untyped_storage().resize_(0)

    monkeypatch.setattr(torch._inductor, "aot_compile", compile_module)
    monkeypatch.setattr(CudaBackend, "move_program_to_device", lambda program, device, specs: program)
    monkeypatch.setattr(CudaBackend, "release_moved_tensors", free_all)  # as on a GPU
    monkeypatch.setitem(sys.modules, "torchtune", None)
    return given


@pytest.fixture
def exported(tmp_path: Path, stand_in: list[torch.fx.GraphModule]) -> Path:
    """A tied model, both methods compiled over freed tensors: `m.gguf` and `out`."""
    types = {"matrix": "Q8_0", "token_embd": "Q8_0"}
    sizes = {"layers": 1, "hidden": 64, "ffn": 64, "vocab": 128, "context": 64, "period": 1}
    model = gemma4(types=types, **sizes, heads=2, kv_heads=(1, 1), head_dim=(32, 32))
    gguf, out = model.write(tmp_path / "m.gguf"), tmp_path / "out"
    out.mkdir()
    peaks = Peaks(torch.device("cpu"))
    _export_cuda(gguf, out, torch.device("cpu"), 64, CacheKind.LOSSLESS, False, peaks)
    return tmp_path


def test_a_model_without_memory_is_written_as_its_file(exported: Path) -> None:
    program, data, gguf = exported / "out/model.pte", exported / "out/aoti_cuda_blob.ptd", exported / "m.gguf"
    with host_tensors(gguf, max_seq_len=64) as tensors:
        report = verify_pte(program, data, tensors)
        name = "model.layers.0.mlp.down_proj.weight.qs"
        changed = ChainMap({name: tensors[name] ^ 1}, cast("dict[str, Tensor]", tensors))
        with pytest.raises(MalformedError, match=rf"{re.escape(name)}: its bytes differ"):
            verify_pte(program, data, changed)
        without_norm = {name: tensors[name] for name in tensors if name != "model.norm.weight"}
        with pytest.raises(UnexpectedTensorError, match=r"model\.norm\.weight"):
            verify_pte(program, data, without_norm)
        with pytest.raises(MissingTensorError, match=r"model\.extra"):
            verify_pte(program, data, ChainMap({"model.extra": torch.zeros(3)}, cast("dict[str, Tensor]", tensors)))
    assert (report.backends, report.methods, report.libraries) == ((CUDA_BACKEND,), ("decode", "prefill"), 2)
    assert report.shims == ("aoti_torch_get_data_ptr",)
    assert report.constants["get_n_layers"] == (1,)
    state = json.loads(report.constants["get_mutable_buffer_metadata"][0])
    assert state["mutable_buffers"] == ["cache.0.kv"]

    delegates = ProgramFile.open(program).delegates
    decode, prefill = (CudaMethod.parse(delegates[name][0].payload) for name in ("decode", "prefill"))
    keys, others = ({w.name: w.key for w in method.weights if "." in w.name} for method in (decode, prefill))
    assert keys == others  # once for both
    blobs = DataFile.open(data).blobs
    model = Gemma4.from_gguf(gguf, device="cpu", max_seq_len=64).model
    expected = {f"model.{name}": parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    stored = {name: expected[name] for name in keys if name in expected}
    assert {id(parameter) for parameter in stored.values()} == {id(parameter) for parameter in expected.values()}
    for name, parameter in stored.items():
        assert bytes(blobs[keys[name]]) == parameter.view(-1).view(torch.uint8).numpy().tobytes()
    assert "model.inv_freq_full" in stored  # a constant, which the first method's compiler freed
    assert not any(blobs[keys["cache.0.kv"]])


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
    module = Accumulator()
    module.total.untyped_storage().resize_(0)
    with torch.no_grad():
        program = torch.export.export(module, (torch.zeros(64),), strict=False)
    lower_cuda({"decode": program}, {"get_n_layers": 1}, cast("HostTensors", {}))
    (given,) = stand_in
    targets = [str(node.target) for node in given.graph.nodes if node.op == "call_function"]
    assert any("triton_kernel_wrapper" in target for target in targets)
    assert not any("auto_functionalized" in target or "gemma4_test" in target for target in targets)


def test_executorch_s_own_names_are_put_back_or_missed() -> None:
    from executorch.backends.cuda import cuda_backend, cuda_weight_collector

    from gemma4.export.executorch_blobs import blobs_from

    def names() -> tuple[object, object]:
        collector = cuda_weight_collector.CudaWeightCollector
        return cuda_backend._full_zeros_preserving_strides, collector.materialize

    def fail() -> None:
        with blobs_from(cast("HostTensors", {})):
            assert all(a is not b for a, b in zip(names(), before, strict=True))
            raise RuntimeError("compiler")

    before = names()
    with pytest.raises(RuntimeError, match="compiler"):
        fail()
    assert names() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(cuda_weight_collector, "_storage_key")
        with pytest.raises(UnsupportedFeatureError, match="executorch: its CUDA backend lacks _storage_key"):
            fail()
    assert names() == before
