"""Compiling a model whose weights and caches take no memory, and opening what was compiled.

The only place that touches private names of torch. Ahead-of-time compilation reads nothing of a weight but its shape,
dtype and device, so a tensor may stand there with its storage freed. Eight places take this amiss, and five more
do not suit us:

    clone_preserve_strides          copies every buffer; a freed one has nothing to copy, its copy is another freed one
    is_same_tensor                  tells constants apart by address; all freed ones have address 0 and would be merged
    FakeTensorMode._dispatch_impl   computes where no tensor is a fake one; a freed one becomes a fake one
    FakeTensorProp.get_attr         gives tensors to operators that compute with them; a freed one becomes a fake one
    _deduce_value                   computes with constants of one number; that of a freed one is not known
    get_original_value_of_constant  a constant's size, and what is serialized of a buffer: of a freed one zeros, unread
    Tensor.__deepcopy__             gives a copy memory of its own: a freed tensor is its own copy
    Parameter.__deepcopy__          reads what it copies
    generate_ttir                   a kernel's code, to see which arguments it writes: made again for every launch
    ttir_to_functions               what that code does: anything, where assembly is not known to write nothing
    convert_cubin_to_obj            names an object by the kernel's code, which two kernels, or processes, may share
    generate_example_value          what a kernel is tried with, as large as the real thing: here all of one piece
    codegen_int_array_var           tells what it writes to apart by addresses, which come again: here all are kept

Names are checked against the torch that is installed, and versions other than those tried are refused.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gemma4.quant.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TORCH_VERSIONS: Final = ("2.11", "2.13")
"""Versions whose names were checked."""

# Module, attribute: what is replaced while compiling.
PATCHED_NAMES: Final = (
    ("torch._inductor.compile_fx", "clone_preserve_strides"),
    ("torch._inductor.graph", "is_same_tensor"),
    ("torch._inductor.graph", "GraphLowering.get_original_value_of_constant"),
    ("torch", "Tensor.__deepcopy__"),
    ("torch.nn", "Parameter.__deepcopy__"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode._dispatch_impl"),
    ("torch.fx.passes.fake_tensor_prop", "FakeTensorProp.get_attr"),
    ("torch._inductor.fx_passes.joint_graph", "UniformValueConstantFolder._deduce_value"),
    ("torch._higher_order_ops.triton_kernel_wrap", "generate_ttir"),
    ("torch._higher_order_ops.triton_kernel_wrap", "ttir_to_functions"),
    ("torch._inductor.codecache", "convert_cubin_to_obj"),
    ("torch._inductor.select_algorithm", "AlgorithmSelectorCache.generate_example_value"),
    ("torch._inductor.codegen.cpp_wrapper_cpu", "CppWrapperCpu.codegen_int_array_var"),
)
# Module, attribute: what is called.
CALLED_NAMES: Final = (
    ("torch._C._aoti", "AOTIModelPackageLoader"),
    ("torch.compiler", "_is_compiling_flag"),
    ("torch._inductor", "aot_compile"),
    ("torch._inductor.package", "package_aoti"),
)


def check_torch() -> None:
    """Raises UnsupportedFeatureError for a version of torch, or a name in it, that this module does not know."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in TORCH_VERSIONS:
        known = ", ".join(TORCH_VERSIONS)
        raise UnsupportedFeatureError(f"found torch {torch.__version__}, export knows {known}", field="torch")
    missing = missing_names()
    if missing:
        raise UnsupportedFeatureError(f"torch {torch.__version__} lacks {', '.join(missing)}", field="torch")


def missing_names() -> list[str]:
    """Which of the private names torch does not have."""
    missing: list[str] = []
    for module_name, path in (*PATCHED_NAMES, *CALLED_NAMES):
        try:
            found: Any = importlib.import_module(module_name)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            missing.append(f"{module_name}.{path}")
    return missing


def without_storage(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor like `tensor` on `device` whose storage is freed. Takes the memory of one tensor for a moment."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    empty.untyped_storage().resize_(0)
    return empty


def is_without_storage(tensor: Tensor) -> bool:
    """Whether the tensor's storage is freed."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def untouched_zeros(like: Tensor) -> Tensor:
    """Zeros on the host, strided as `like`, that take no memory unless they are written to."""
    ends = (int(n - 1) * int(step) for n, step in zip(like.shape, like.stride(), strict=True))
    items = 1 + int(like.storage_offset()) + sum(ends)
    # Of private pages that are only read the kernel has one, of zeros.
    pages = mmap.mmap(-1, items * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(pages, dtype=like.dtype, count=items)
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())


_HOST: Final = torch.device("cpu")


@contextmanager
def low_memory(module: nn.Module, device: torch.device = _HOST) -> Iterator[None]:
    """While the block runs, buffers of `module` that are all zero take no memory, and freed tensors can be compiled.

    Buffers that hold anything else stay as they are. Freed buffers are zeros again afterwards, also after an exception;
    tensors that came without storage leave without. Raises UnsupportedFeatureError, see `check_torch`.
    """
    freed: dict[Tensor, int] = {}
    with patched_compiler(device), ExitStack() as stack:
        stack.callback(_restore, freed)
        for buffer in module.buffers():
            storage = buffer.untyped_storage()
            is_whole = storage.nbytes() == buffer.nbytes
            if is_whole and not is_without_storage(buffer) and not bool(buffer.any()):
                freed[buffer] = storage.nbytes()
                storage.resize_(0)
        yield


@contextmanager
def patched_compiler(device: torch.device = _HOST) -> Iterator[None]:
    """While the block runs, the compiler does as said above, for `device`.

    Raises UnsupportedFeatureError, see `check_torch`.
    """
    check_torch()
    with ExitStack() as stack:
        stack.enter_context(importlib.import_module("torch._inductor.config").patch(_settings(device)))
        for (module_name, path), replacement in zip(PATCHED_NAMES, _REPLACEMENTS, strict=True):
            owner_path, _, name = path.rpartition(".")
            owner = importlib.import_module(module_name)
            owner = getattr(owner, owner_path) if owner_path else owner
            original = getattr(owner, name)
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, replacement(original))
        yield


def _settings(device: torch.device) -> dict[str, Any]:
    settings: dict[str, Any] = {
        # Else the values of short weights, which nobody has read, would become part of the code.
        "always_keep_tensor_constants": True,
        # Its order makes what all layers' kernels will write at the very beginning; ours makes it where it is written.
        "reorder_for_peak_memory": False,
        # Its order decodes all pieces of a weight before the first is multiplied.
        "reorder_for_locality": False,
        # The code between kernels: optimizing it takes minutes and saves microseconds.
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    if device.type == "cuda":
        # Trying out which vector instructions the host has takes a minute; nothing here computes on the host.
        settings["cpp.vec_isa_ok"] = False
    return settings


def _restore(freed: Mapping[Tensor, int]) -> None:
    for buffer, nbytes in freed.items():
        buffer.untyped_storage().resize_(nbytes)
        buffer.zero_()


def _clone_preserve_strides(original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def clone(x: Tensor) -> Tensor:
        return without_storage(x, x.device) if is_without_storage(x) else original(x)

    return clone


def _is_same_tensor(original: Callable[[Tensor, Tensor], bool]) -> Callable[[Tensor, Tensor], bool]:
    def is_same(data: Tensor, value: Tensor) -> bool:
        if is_without_storage(data) or is_without_storage(value):
            return data is value
        return original(data, value)

    return is_same


def _get_original_value(original: Callable[[Any, str], Tensor]) -> Callable[[Any, str], Tensor]:
    def get_original_value(graph: Any, name: str) -> Tensor:
        value = original(graph, name)
        return untouched_zeros(value) if is_without_storage(value) else value

    return get_original_value


def _is_freed(x: object) -> bool:
    """Whether x is a tensor whose storage is freed, and not a stand-in for one."""
    return type(x) in (Tensor, nn.Parameter) and is_without_storage(cast("Tensor", x))


def _deepcopy(original: Callable[[Any, dict[int, Any]], Any]) -> Callable[[Any, dict[int, Any]], Any]:
    def deepcopy(x: Any, memo: dict[int, Any]) -> Any:
        if _is_freed(x):
            memo[id(x)] = x
            return x
        return original(x, memo)

    return deepcopy


def _dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        def fake(x: Tensor) -> Tensor:
            return mode.fake_tensor_converter.from_real_tensor(mode, x) if _is_freed(x) else x

        return original(mode, func, types, *tree_map_only(Tensor, fake, (args, kwargs)))

    return dispatch


def _get_attr(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_attr(interpreter: Any, *args: Any) -> Any:
        value = original(interpreter, *args)
        return interpreter._mode.from_tensor(value) if _is_freed(value) else value

    return get_attr


def _deduce_value(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def deduce_value(folder: Any, node: Any) -> Any:
        value = original(folder, node)
        return folder.unknown_value if _is_freed(value) else value

    return deduce_value


def _generate_ttir(original: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def generate(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        function = kernel if hasattr(kernel, "params") else kernel.fn  # launch options make it an Autotuner
        # What a kernel writes depends on its compile-time arguments and on which of the others are tensors.
        key = (
            function,
            tuple(
                (p.name, arguments[p.name] if p.is_constexpr else getattr(arguments[p.name], "dtype", None))
                for p in function.params
            ),
        )
        if key not in made:
            made[key] = original(kernel, arguments, descriptors)
        return made[key]

    return generate


def _ttir_to_functions(original: Callable[..., Any]) -> Callable[..., Any]:
    read: dict[int, tuple[Any, Any]] = {}

    def to_functions(module: Any) -> Any:
        if id(module) not in read:
            # Assembly of ours that is called impure keeps its place and number in a program; none of it writes memory.
            functions = {
                name: {
                    value: [replace(op, is_pure=True) if op.name == "tt.elementwise_inline_asm" else op for op in ops]
                    for value, ops in operations.items()
                }
                for name, operations in original(module).items()
            }
            read[id(module)] = module, functions
        return read[id(module)][1]

    return to_functions


def _convert_cubin_to_obj(original: Callable[..., str]) -> Callable[..., str]:
    def convert(cubin_file: str, kernel_name: str, *tools: str) -> str:
        # Of this process alone: another may compile the same kernel.
        return original(shutil.copyfile(cubin_file, f"{cubin_file}.{os.getpid()}.{kernel_name}"), kernel_name, *tools)

    return convert


def _generate_example_value(original: Callable[..., Tensor]) -> staticmethod[..., Tensor]:
    piece = torch.empty(0, dtype=torch.uint8)

    def generate(
        size: Sequence[int],
        stride: Sequence[int],
        device: torch.device | str,
        dtype: torch.dtype,
        extra_size: int,
        allocation_size: Sequence[int] | None = None,
    ) -> Tensor:
        nonlocal piece
        last = sum((n - 1) * step for n, step in zip(allocation_size or size, stride, strict=True))
        nbytes = max(0, last + 1 + extra_size) * dtype.itemsize
        if nbytes <= _SHORT_BYTES:  # may be indices, which what a kernel writes must not turn into others
            return torch.zeros(nbytes, dtype=torch.uint8, device=device).view(dtype).as_strided(size, stride)
        if piece.nbytes < nbytes or piece.device != torch.device(device):
            piece = torch.empty(0, dtype=torch.uint8)
            piece = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return piece[:nbytes].view(dtype).as_strided(size, stride)

    return staticmethod(generate)


_SHORT_BYTES: Final = 1 << 20


def _codegen_int_array_var(original: Callable[..., str]) -> Callable[..., str]:
    kept: dict[Callable[[str], None], Callable[[str], None]] = {}  # equal bound methods are one

    def codegen(wrapper: Any, int_array: str, writeline: Callable[[str], None], *args: Any, **kwargs: Any) -> str:
        # Taken for another, an array would be used where it is not declared.
        return original(wrapper, int_array, kept.setdefault(writeline, writeline), *args, **kwargs)

    return codegen


_REPLACEMENTS: Final[Sequence[Callable[[Any], Any]]] = (
    _clone_preserve_strides,
    _is_same_tensor,
    _get_original_value,
    _deepcopy,
    _deepcopy,
    _dispatch,
    _get_attr,
    _deduce_value,
    _generate_ttir,
    _ttir_to_functions,
    _convert_cubin_to_obj,
    _generate_example_value,
    _codegen_int_array_var,
)


def compile_method(program: ExportedProgram) -> list[Any]:
    """Compiles a method, its weights left out, where `low_memory` holds. Returns the files for `write_package`."""
    inductor = importlib.import_module("torch._inductor")
    options = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False}
    args, kwargs = program.example_inputs or ((), {})
    with tracing_operators():
        files: list[Any] = inductor.aot_compile(program.module(), args, kwargs, options=options)
    return files


@contextmanager
def tracing_operators() -> Iterator[None]:
    """While the block runs, bodies of operators that are traced record no launch options of eager runs."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def write_package(path: Path, methods: Mapping[str, list[Any]]) -> None:
    """One `.pt2` file that holds every method. Raises OSError."""
    package = importlib.import_module("torch._inductor.package")
    content = io.BytesIO()  # torch's own writer ends the process where a disk is full
    package.package_aoti(content, dict(methods))
    path.write_bytes(content.getbuffer())


class CompiledMethod:
    """One method of a `.pt2` package, run without the compiler that made it."""

    def __init__(self, package: Path, name: str, device: torch.device) -> None:
        """Raises RuntimeError where the package cannot be opened."""
        index = -1 if device.type == "cpu" else device.index or 0
        module = importlib.import_module("torch._C._aoti")
        is_single_threaded = True  # a graph cannot hold the events that several threads need
        self._loader: Any = module.AOTIModelPackageLoader(str(package), name, is_single_threaded, 1, index)

    def constant_names(self) -> list[str]:
        """The weights and buffers it reads, by their names in the exported module."""
        names: list[str] = self._loader.get_constant_fqns()
        return names

    def bind(self, constants: Mapping[str, Tensor]) -> None:
        """Gives it its weights and buffers, which are used where they lie and written to; keep them alive."""
        self._constants = dict(constants)
        self._loader.load_constants(self._constants, False, True, True)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = self._loader.boxed_run(list(inputs))
        return outputs
