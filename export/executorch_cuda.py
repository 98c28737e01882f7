"""Methods as ExecuTorch programs for its CUDA backend: each one library made by AOTInductor, Triton kernels inside.

Compiling needs a GPU and a compiler for CUDA. ExecuTorch's own exporters register operators of its own and import its
language model modules, which need `torchtune`; nothing here does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch.export import ExportedProgram

from gemma4.export.executorch_method import ConstantMethods
from gemma4.export.host_tensors import HostTensors
from gemma4.export.low_memory import patched_compiler, tracing_operators

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

# Buffers are copied on the host while compiling; programs are copied without their tensors.
_LOW_MEMORY: Final = ("low_memory_mode", b"ON")


def lower_cuda(
    programs: Mapping[str, ExportedProgram], constants: ConstantMethods, tensors: HostTensors
) -> ExecutorchProgramManager:
    """Methods that share weights and mutable buffers by name, with weights in a data file of their own.

    tensors: what goes into that file, asked for when it is written. The programs' own may have their storage freed.
    Raises RuntimeError where the compiler needs a kernel that ExecuTorch's runtime does not have,
    UnsupportedFeatureError for a version of torch or ExecuTorch that is not known.
    """
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.propagate_device_pass import PropagateDeviceConfig

    from gemma4.export.executorch_blobs import blobs_from

    def partitioner(name: str) -> CudaPartitioner:
        return CudaPartitioner([CudaBackend.generate_method_name_compile_spec(name), CompileSpec(*_LOW_MEMORY)])

    # Kernels become visible before ExecuTorch makes mutation explicit: it cannot call an operator that mutates.
    with patched_compiler(torch.device("cuda")), blobs_from(tensors):
        with tracing_operators():
            launches = {
                name: program.run_decompositions({}, decompose_custom_triton_ops=True)
                for name, program in programs.items()
            }
        edge = to_edge_transform_and_lower(
            launches,
            partitioner={name: [partitioner(name)] for name in programs},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        )
        return edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                emit_mutable_buffer_names=True,
                # The runner keeps inputs and outputs on the device: the next token is the next step's input.
                propagate_device_config=PropagateDeviceConfig(
                    skip_h2d_for_method_inputs=True, skip_d2h_for_method_outputs=True
                ),
            )
        )
