"""Compiling without memory: what is freed and what not, what is put back, and private names that may go."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import nn
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

from gemma4.export import low_memory
from gemma4.export.low_memory import PATCHED_NAMES, check_torch, is_without_storage, missing_names, without_storage
from gemma4.export.peaks import anonymous_bytes
from gemma4.kernels import gelu_mul
from gemma4.kernels.activations import empty_activations
from gemma4.quant.errors import UnsupportedFeatureError
from tests.kernels.triton_without_gpu import record_launches


class State(nn.Module):
    """Sixty caches of one shape, and what a quantizer keeps."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(60):
            self.register_buffer(f"cache_{i}", torch.zeros(1, 2, 8, 4))
        self.register_buffer("centroids", torch.linspace(-1, 1, 16))
        self.register_buffer("slice", torch.zeros(8)[2:4])

    def caches(self) -> list[torch.Tensor]:
        return [self.get_buffer(f"cache_{i}") for i in range(60)]


def patched() -> list[Any]:
    found = []
    for module, path in PATCHED_NAMES:
        value = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
        found.append(value)
    return found


def test_torch_has_every_private_name() -> None:
    assert missing_names() == []
    check_torch()


def test_a_renamed_symbol_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._inductor.graph.is_same_tensor")
    assert missing_names() == ["torch._inductor.graph.is_same_tensor"]
    with pytest.raises(UnsupportedFeatureError, match=r"lacks torch\._inductor\.graph\.is_same_tensor"):
        check_torch()


@pytest.mark.parametrize("version", ["2.10.1", "2.99.0", "3.0"])
def test_an_unknown_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UnsupportedFeatureError, match=rf"found torch {version}, export knows 2\.11, 2\.13"):
        check_torch()


def test_zeros_are_freed_and_put_back() -> None:
    state = State()
    centroids = state.get_buffer("centroids").clone()
    with low_memory.low_memory(state):
        assert all(is_without_storage(cache) for cache in state.caches())
        assert torch.equal(state.get_buffer("centroids"), centroids)
        assert torch.equal(state.get_buffer("slice"), torch.zeros(2))
    for cache in state.caches():
        assert cache.untyped_storage().nbytes() == 256
        assert not cache.any()


def test_an_exception_leaves_nothing_behind() -> None:
    state, before = State(), patched()

    def fail() -> None:
        with low_memory.low_memory(state):
            assert all(a is not b for a, b in zip(patched(), before, strict=True))
            raise RuntimeError("compiler")

    with pytest.raises(RuntimeError, match="compiler"):
        fail()
    assert patched() == before
    assert "get_attr" not in vars(importlib.import_module("torch.fx.passes.fake_tensor_prop").FakeTensorProp)
    assert not any(is_without_storage(cache) or cache.any() for cache in state.caches())


def test_a_buffer_with_one_value_stays() -> None:
    state = State()
    state.get_buffer("cache_7")[0, 1, 7, 3] = 1.0
    with low_memory.low_memory(state):
        assert [is_without_storage(cache) for cache in state.caches()].count(False) == 1
    assert state.get_buffer("cache_7").sum() == 1


def test_freed_tensors_are_told_apart_cloned_and_serialized_as_zeros() -> None:
    state = State()
    graph = importlib.import_module("torch._inductor.graph")
    compile_fx = importlib.import_module("torch._inductor.compile_fx")
    with low_memory.low_memory(state):
        first, second = state.caches()[:2]
        assert graph.is_same_tensor(first, first)
        assert not graph.is_same_tensor(first, second)
        centroids = state.get_buffer("centroids")
        assert graph.is_same_tensor(centroids, centroids.view(16))
        clone = compile_fx.clone_preserve_strides(first)
        assert is_without_storage(clone)
        assert (clone.shape, clone.stride(), clone.dtype) == (first.shape, first.stride(), first.dtype)
        original = graph.GraphLowering.get_original_value_of_constant
        constants = {"a": first, "b": centroids}
        names = {"a": "a", "b": "b"}
        lowering = SimpleNamespace(constants=constants, allocated_constant_name=names, module=SimpleNamespace(meta={}))
        assert torch.equal(original(lowering, "a"), torch.zeros(1, 2, 8, 4))
        assert original(lowering, "b") is centroids


def test_without_storage_keeps_everything_but_the_bytes() -> None:
    like = torch.empty(3, 5, dtype=torch.int8).T
    freed = without_storage(like, "cpu")
    assert is_without_storage(freed)
    assert (freed.shape, freed.stride(), freed.dtype) == (like.shape, like.stride(), like.dtype)


def written_by(kernel: Any, arguments: dict[str, Any]) -> set[str]:
    """The arguments that torch believes a kernel writes, compiling for an H100."""
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):  # since torch 2.12
            accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
            return {dep.name for dep in accesses.read_writes.writes}
        return set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))


def test_a_kernel_that_waits_writes_its_outputs_only() -> None:
    gate, up = torch.empty(1, 1024, dtype=torch.bfloat16).chunk(2, -1)
    with mock.patch.object(gelu_mul, "dependent_launch_options", return_value={"PDL": True}):
        ((kernel, arguments),) = record_launches(gelu_mul, "launch_gelu_mul", gate, up, empty_activations(gate, 2))
    arguments = {name: arguments[name] for name in kernel.arg_names}
    inputs = {"gate_ptr", "up_ptr"}
    code = mock.Mock(wraps=triton_kernel_wrap.generate_ttir)
    with mock.patch.object(triton_kernel_wrap, "generate_ttir", code), low_memory.patched_compiler():
        outputs = written_by(kernel, arguments)
        longer = {name: x.repeat(2, 1) if name in inputs else x for name, x in arguments.items()}
        assert written_by(kernel, longer) == outputs
        assert code.call_count == 1  # its code is made once
        assert written_by(kernel, arguments | {"PDL": False}) == outputs
        assert code.call_count == 2
    assert outputs
    assert not outputs & inputs


def test_kernels_of_the_same_code_have_objects_of_their_own(tmp_path: Path) -> None:
    binary = tmp_path / "code.fatbin"
    binary.write_bytes(b"sass")
    with low_memory.patched_compiler():
        convert = importlib.import_module("torch._inductor.codecache").convert_cubin_to_obj
        objects = [convert(str(binary), name, "ld", "objcopy") for name in ("norm_3", "norm_7")]
    assert all(f".{os.getpid()}." in obj for obj in objects), "two processes would write one file"
    symbols = [subprocess.check_output(["nm", obj], text=True) for obj in objects]
    assert ["norm_3" in text for text in symbols] == [True, False]
    assert ["norm_7" in text for text in symbols] == [False, True]


def test_arrays_are_declared_once_in_each_text_they_are_used_in() -> None:
    with low_memory.patched_compiler():
        wrappers = importlib.import_module("torch._inductor.codegen.cpp_wrapper_cpu")
        wrapper = object.__new__(wrappers.CppWrapperCpu)
        wrapper.codegen_int_array_var_cache, wrapper.declared_int_array_vars = {}, set()
        wrapper.int_array_id = itertools.count()
        for _ in range(1000):
            text = wrappers.IndentedBuffer()  # likely where the one before it was
            names = {wrapper.codegen_int_array_var("{5376L, 1L}", text.writeline, True) for _ in range(3)}
            assert len(names) == 1
            assert text.getvalue().count(f"{names.pop()}[] = {{5376L, 1L}};") == 1


def test_zeros_take_no_memory_where_they_are_read() -> None:
    like = without_storage(torch.empty(4096, 64, 256, dtype=torch.bfloat16).transpose(0, 1), "cpu")
    before = anonymous_bytes()
    zeros = low_memory.untouched_zeros(like)
    assert (zeros.shape, zeros.stride(), zeros.dtype) == (like.shape, like.stride(), like.dtype)
    assert zeros.untyped_storage().nbytes() == like.nbytes == 128 << 20
    assert not any(bool(part.any()) for part in zeros.split(1))
    after = anonymous_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 16 << 20


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_freed_tensors_are_their_own_copies(kind: type[torch.Tensor]) -> None:
    freed: torch.Tensor = without_storage(torch.empty(3), "cpu")
    if kind is nn.Parameter:
        freed = nn.Parameter(freed, requires_grad=False)
    real = torch.ones(3)
    with low_memory.patched_compiler():
        first, second, copied = copy.deepcopy((freed, freed, real))
    assert first is second is freed
    assert copied is not real
    assert torch.equal(copied, real)


def test_operators_on_freed_tensors_alone_are_not_computed() -> None:
    freed = without_storage(torch.empty(1), "cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with low_memory.patched_compiler(), mode:
        result = freed * 2.0
        joined = torch.cat([freed, result])
    assert isinstance(result, FakeTensor)
    assert isinstance(joined, FakeTensor)
    assert joined.shape == (2,)


def test_a_freed_number_is_not_known_to_the_compiler() -> None:
    joint_graph = importlib.import_module("torch._inductor.fx_passes.joint_graph")
    graph = torch.fx.Graph()
    numbers = {"freed": without_storage(torch.empty(1), "cpu"), "known": torch.full((1,), 3.0)}
    products = [graph.call_function(torch.ops.aten.mul.Tensor, (graph.get_attr(name), 2.0)) for name in numbers]
    graph.output(tuple(products))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(1, device="meta")
    module = torch.fx.GraphModule({name: nn.Parameter(x, requires_grad=False) for name, x in numbers.items()}, graph)
    with low_memory.patched_compiler():
        folder = joint_graph.UniformValueConstantFolder(module)
        folder.run()
    assert products[0] not in folder.node_replacements
    assert folder.node_replacements[products[1]] == 6.0


def test_settings_hold_while_the_block_runs() -> None:
    """Also for who else compiles in it, as ExecuTorch does with options of its own."""
    from torch._inductor import config

    def found() -> tuple[object, ...]:
        opt_level = config.aot_inductor.compile_wrapper_opt_level
        return config.always_keep_tensor_constants, config.reorder_for_peak_memory, opt_level, config.cpp.vec_isa_ok

    before = found()
    with low_memory.patched_compiler(torch.device("cuda")):
        assert found() == (True, False, "O0", False)
    assert found() == before != (True, False, "O0", False)
    with low_memory.patched_compiler():
        assert found()[:3] == (True, False, "O0")
        assert config.cpp.vec_isa_ok == before[3]
