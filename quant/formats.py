"""The packed weight formats: every container, and the registry from GGML type to container.

A new format is a module with a registered class, imported here:

    @register_format(GGMLType.Q4_K)
    @dataclass(frozen=True, eq=False)
    class Q4KTensor(QuantTensor): ...
"""

from __future__ import annotations

from gemma4.quant.block_quants import (
    MXFP4Tensor,
    NVFP4Tensor,
    Q1_0Tensor,
    Q2KTensor,
    Q3KTensor,
    Q8KTensor,
    TQ1_0Tensor,
    TQ2_0Tensor,
)
from gemma4.quant.codebook_quants import (
    IQ1MTensor,
    IQ1STensor,
    IQ2STensor,
    IQ2XSTensor,
    IQ2XXSTensor,
    IQ3STensor,
    IQ3XXSTensor,
    IQ4NLTensor,
    IQ4XSTensor,
)
from gemma4.quant.dense import BF16Tensor, F16Tensor, F32Tensor
from gemma4.quant.errors import UnsupportedTypeError
from gemma4.quant.ggml_types import GGMLType, describe_type
from gemma4.quant.k_quants import CudaCoalescedInt4Tensor, Q5KTensor, Q6KTensor
from gemma4.quant.legacy_quants import Q4_0Tensor, Q4_1Tensor, Q5_0Tensor, Q5_1Tensor, Q8_0Tensor
from gemma4.quant.quant_tensor import Plane, QuantTensor, register_format, registered_formats

__all__ = [
    "BF16Tensor",
    "CudaCoalescedInt4Tensor",
    "F16Tensor",
    "F32Tensor",
    "IQ1MTensor",
    "IQ1STensor",
    "IQ2STensor",
    "IQ2XSTensor",
    "IQ2XXSTensor",
    "IQ3STensor",
    "IQ3XXSTensor",
    "IQ4NLTensor",
    "IQ4XSTensor",
    "MXFP4Tensor",
    "NVFP4Tensor",
    "Plane",
    "Q1_0Tensor",
    "Q2KTensor",
    "Q3KTensor",
    "Q4_0Tensor",
    "Q4_1Tensor",
    "Q5KTensor",
    "Q5_0Tensor",
    "Q5_1Tensor",
    "Q6KTensor",
    "Q8KTensor",
    "Q8_0Tensor",
    "QuantTensor",
    "TQ1_0Tensor",
    "TQ2_0Tensor",
    "container_for",
    "register_format",
]


def container_for(ggml_type: GGMLType) -> type[QuantTensor]:
    """The container class of a type. Raises UnsupportedTypeError naming the type where there is none."""
    formats = registered_formats()
    if ggml_type not in formats:
        known = ", ".join(known_type.name for known_type in formats)
        raise UnsupportedTypeError(f"no container for {describe_type(ggml_type)}; supported: {known}")
    return formats[ggml_type]
