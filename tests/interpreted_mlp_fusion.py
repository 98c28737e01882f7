"""Fused and unfused gate and up projections in the Q4_K matvec kernel, interpreted; run by test_mlp_fusion.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma4.kernels.activations import quantize_activations_reference
from gemma4.kernels.packed_matvec import launch_packed_matvec
from gemma4.kernels.q4_k_matvec import q4_k_matvec_kernel
from gemma4.quant.k_quants import CudaCoalescedInt4Tensor
from tests.kernels.packed_cases import make_rows, make_weight
from tests.kernels.triton_without_gpu import allow_loops_over_tensors

allow_loops_over_tensors()

Packed = CudaCoalescedInt4Tensor


def weight(n: int, k: int, seed: int) -> Packed:
    made = make_weight("q4_k", n, k, seed=seed)
    return Packed.from_planes(dict(zip(Packed.planes, made.planes, strict=True)))


def product(x: Tensor, packed: Packed) -> Tensor:
    activations = quantize_activations_reference(x)
    planes = tuple(packed.planes_dict().values())
    return launch_packed_matvec(q4_k_matvec_kernel, "q4_k", activations, planes, torch.float32)


# The odd size puts gate and up at other places in their tiles than they have alone.
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("n", [3])
def test_rows_do_not_depend_on_their_neighbours(n: int, tokens: int) -> None:
    gate, up = weight(n, 256, 1), weight(n, 256, 2)
    x = make_rows(tokens, 256, torch.bfloat16)
    joined = product(x, Packed.concat_rows([gate, up]))
    assert torch.equal(joined[:, :n], product(x, gate))
    assert torch.equal(joined[:, n:], product(x, up))
