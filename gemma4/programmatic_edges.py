"""Dependent launches in a captured CUDA graph: kernels that wait for their inputs themselves may be placed early.

Compiled methods launch kernels plainly, so each node of their graph starts when the one before it has ended. A kernel
that waits by `griddepcontrol.wait` needs less: its edge is made a programmatic one, which lets it start as soon as the
node before it lets go. CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization", use in CUDA
graphs. The CUDA driver is called through ctypes; where it is older than 12.3 edges stay as they are.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection
from typing import Any, Final

_KERNEL_NODE: Final = 0  # CU_GRAPH_NODE_TYPE_KERNEL
_FUNCTIONS: Final = (
    "cuFuncGetName",
    "cuKernelGetName",
    "cuGraphAddDependencies_v2",
    "cuGraphGetEdges_v2",
    "cuGraphKernelNodeGetParams_v2",
    "cuGraphNodeGetType",
    "cuGraphRemoveDependencies_v2",
)


class EdgeData(ctypes.Structure):
    """CUgraphEdgeData: all zero where the later node waits for the end of the earlier."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )

    @classmethod
    def programmatic(cls) -> EdgeData:
        """CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC."""
        return cls(from_port=1, type=1)

    @property
    def is_full(self) -> bool:
        return not (self.from_port or self.to_port or self.type)


class _KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("launch", ctypes.c_uint * 7),
        ("kernel_params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def make_programmatic(graph: int, names: Collection[str], driver: Any = None) -> int:
    """Makes edges programmatic that lead from a kernel to one of `names`; returns how many.

    graph: the address of a CUgraph that has not been instantiated since. names: kernels of which every program waits
    before it reads what an earlier kernel wrote and before it writes; a compiler may have numbered them. driver: the
    CUDA driver's library. Raises RuntimeError where the driver refuses.
    """
    library = ctypes.CDLL("libcuda.so.1") if driver is None else driver
    if not all(hasattr(library, name) for name in _FUNCTIONS):
        return 0
    waits = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:_\d+)?")
    sources, targets, data = _edges(library, graph)
    kernels = {node: _kernel_name(library, node) for node in {*sources, *targets}}
    count = 0
    for source, target, edge in zip(sources, targets, data, strict=True):
        name = kernels[target]
        if edge.is_full and kernels[source] is not None and name is not None and waits.fullmatch(name):
            ends = ctypes.byref(ctypes.c_void_p(source)), ctypes.byref(ctypes.c_void_p(target))
            _check(library.cuGraphRemoveDependencies_v2(_handle(graph), *ends, ctypes.byref(edge), ctypes.c_size_t(1)))
            edge = EdgeData.programmatic()
            _check(library.cuGraphAddDependencies_v2(_handle(graph), *ends, ctypes.byref(edge), ctypes.c_size_t(1)))
            count += 1
    return count


def _edges(library: Any, graph: int) -> tuple[list[int], list[int], list[EdgeData]]:
    """The nodes each edge comes from and leads to, and its kind."""
    count = ctypes.c_size_t(0)
    _check(library.cuGraphGetEdges_v2(_handle(graph), None, None, None, ctypes.byref(count)))
    sources, targets = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    data = (EdgeData * count.value)()
    _check(library.cuGraphGetEdges_v2(_handle(graph), sources, targets, data, ctypes.byref(count)))
    return [node or 0 for node in sources], [node or 0 for node in targets], list(data)


def _kernel_name(library: Any, node: int) -> str | None:
    """None for a node that is no kernel."""
    kind = ctypes.c_int(-1)
    _check(library.cuGraphNodeGetType(_handle(node), ctypes.byref(kind)))
    if kind.value != _KERNEL_NODE:
        return None
    params, name = _KernelNodeParams(), ctypes.c_char_p()
    _check(library.cuGraphKernelNodeGetParams_v2(_handle(node), ctypes.byref(params)))
    if params.func:
        _check(library.cuFuncGetName(ctypes.byref(name), _handle(params.func)))
    else:
        _check(library.cuKernelGetName(ctypes.byref(name), _handle(params.kern)))
    return (name.value or b"").decode()


def _handle(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused to change a graph: error {status}")
