"""Methods as ExecuTorch programs of portable kernels, which run on any CPU; nothing is compiled or delegated.

This library's operators are written out as their references. Of core ATen, what the portable kernels lack or compute
otherwise is replaced by what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions

from gemma4.export.executorch_method import ConstantMethods

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

WEIGHTS_FILE: Final = "model"
"""Stem of the data file."""

aten = torch.ops.aten

_Shift = Callable[[Tensor, Any], Tensor]
_SHIFTS: Final[Mapping[Any, _Shift]] = {
    aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
    aten.__rshift__.Tensor: aten.bitwise_right_shift.Tensor,
    aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
    aten.__lshift__.Tensor: aten.bitwise_left_shift.Tensor,
}
# What only debuggers read. Each pass copies all of it for each operator.
_PROVENANCE: Final = ("from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")


def remainder(x: Tensor, divisor: int) -> Tensor:
    """x % divisor of integers with the sign of the divisor; ExecuTorch's own remainder has the sign of x."""
    if x.is_floating_point():
        return NotImplemented  # type: ignore[no-any-return]
    return x - torch.div(x, divisor, rounding_mode="floor") * divisor


def write_out(program: ExportedProgram) -> ExportedProgram:
    """`program` in core ATen operators that the portable kernels compute as torch does, each value computed once."""
    table = default_decompositions()
    table.pop(aten.linear.default)  # type: ignore[no-untyped-call]
    table.update(_SHIFTS)  # type: ignore[no-untyped-call]
    table[aten.remainder.Scalar] = remainder
    program = program.run_decompositions(table, decompose_custom_triton_ops=True)
    _merge_equal(program.graph)
    for node in program.graph.nodes:
        for key in _PROVENANCE:
            node.meta.pop(key, None)
    return program


def lower_portable(programs: Mapping[str, ExportedProgram], constants: ConstantMethods) -> ExecutorchProgramManager:
    """Methods that share their mutable buffers, with weights in a data file of their own, by name."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    written_out = {name: write_out(program) for name, program in programs.items()}
    for program in written_out.values():
        # Nothing is left of what this decomposes; it would trace the program twice again.
        program.run_decompositions = lambda *_, program=program: program
    # Dimension orders and verification are for delegates, of which there are none.
    edge = to_edge(written_out, constants, EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
    return edge.to_executorch(
        ExecutorchBackendConfig(
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
            emit_mutable_buffer_names=True,
            external_constants=lambda node: WEIGHTS_FILE,
            remove_view_copy=False,  # a view of an external constant cannot be written
        )
    )


def _merge_equal(graph: fx.Graph) -> None:
    """Computes equal values once. All operators are pure but those that draw random numbers."""
    seen: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = _key((node.target, node.args, node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _key(value: Any) -> Hashable:
    """Equal for equal arguments of equal types."""
    if isinstance(value, tuple | list):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), value
