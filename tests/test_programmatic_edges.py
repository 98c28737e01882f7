"""Edges of captured graphs that are made programmatic."""

from __future__ import annotations

import ctypes
from typing import Any
from unittest import mock

import pytest
import torch

from gemma4.kernels.activations import quantize_activations
from gemma4.kernels.dependent_launch import dependent_kernels, recorded_as_dependent
from gemma4.kernels.q4_k_matvec import q4_k_matvec
from gemma4.programmatic_edges import EdgeData, make_programmatic
from tests.kernels.packed_cases import make_rows, make_weight

PROGRAMMATIC = bytes(EdgeData.programmatic())
FULL = bytes(8)


class Driver:
    """A CUDA driver that keeps one graph: node addresses with the names of their kernels, None for other nodes."""

    def __init__(self, nodes: dict[int, str | None], edges: dict[tuple[int, int], bytes]) -> None:
        self.nodes = nodes
        self.edges = edges
        self.status = 0

    def cuGraphGetEdges_v2(self, graph: Any, sources: Any, targets: Any, data: Any, count: Any) -> int:
        count._obj.value = len(self.edges)
        for i, ((source, target), edge) in enumerate(self.edges.items() if sources is not None else ()):
            sources[i], targets[i], data[i] = source, target, EdgeData.from_buffer_copy(edge)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = 1 if self.nodes[node.value] is None else 0
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:
        setattr(params._obj, "func" if node.value % 2 else "kern", node.value)
        return 0

    def cuFuncGetName(self, name: Any, function: Any) -> int:
        name._obj.value = str(self.nodes[function.value]).encode()
        return 0

    cuKernelGetName = cuFuncGetName

    def cuGraphRemoveDependencies_v2(self, graph: Any, source: Any, target: Any, edge: Any, count: Any) -> int:
        assert self.edges.pop((source._obj.value, target._obj.value)) == bytes(edge._obj)
        assert count.value == 1
        return self.status

    def cuGraphAddDependencies_v2(self, graph: Any, source: Any, target: Any, edge: Any, count: Any) -> int:
        self.edges[source._obj.value, target._obj.value] = bytes(edge._obj)
        return 0


def test_edges_into_waiting_kernels_change_and_no_others() -> None:
    nodes = {1: "pointwise", 2: "norm", 3: "matvec_12", 4: "matvec_12_other", 5: None, 6: "norm"}
    edges = {(1, 2): FULL, (2, 3): FULL, (3, 4): FULL, (4, 5): FULL, (5, 6): FULL, (4, 6): PROGRAMMATIC}
    driver = Driver(nodes, edges)
    assert make_programmatic(7, ["norm", "matvec"], driver) == 2
    changed = {ends for ends, edge in driver.edges.items() if edge == PROGRAMMATIC}
    assert changed == {(1, 2), (2, 3), (4, 6)}
    assert driver.edges.keys() == edges.keys()
    assert make_programmatic(7, ["norm", "matvec"], driver) == 0


def test_a_refusal_is_an_error_and_an_old_driver_is_none() -> None:
    driver = Driver({1: "a", 2: "b"}, {(1, 2): FULL})
    driver.status = 1
    with pytest.raises(RuntimeError, match="error 1"):
        make_programmatic(7, ["b"], driver)
    assert make_programmatic(7, ["b"], object()) == 0


def test_layouts_are_those_of_the_driver() -> None:
    assert ctypes.sizeof(EdgeData) == 8
    assert bytes([1, 0, 1, 0, 0, 0, 0, 0]) == PROGRAMMATIC


def test_kernels_that_wait_are_found_by_their_switch() -> None:
    names = dependent_kernels()
    assert {"q4_k_matvec_kernel", "quantize_activations_kernel", "fused_norm_kernel"} <= set(names)
    assert not any("split_kernel" in name for name in names)  # attention starts when its keys are there


@pytest.mark.gpu
def test_a_changed_graph_computes_the_same_on_a_gpu() -> None:
    weight = make_weight("q4_k", 4096, 5376, "cuda")
    x = make_rows(1, 5376, torch.bfloat16, "cuda")

    def step() -> torch.Tensor:
        y = q4_k_matvec(*quantize_activations(x), *weight.planes)
        return q4_k_matvec(*quantize_activations(torch.cat((y, y), -1)[:, :5376].contiguous()), *weight.planes)

    with mock.patch("torch.compiler.is_compiling", return_value=True), recorded_as_dependent():
        expected = step()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            found = step()
    assert make_programmatic(graph.raw_cuda_graph(), dependent_kernels()) >= 3
    graph.instantiate()
    for _ in range(20):
        x.copy_(x.roll(1, -1))
        graph.replay()
        torch.cuda.synchronize()
    x.copy_(x.roll(-20, -1))
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
