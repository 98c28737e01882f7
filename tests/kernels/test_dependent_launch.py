"""Kernels that start before their inputs are ready: what their code does before it waits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gemma4.kernels import (
    activations,
    fused_norm,
    gelu_mul,
    linear,
    packed_matvec,
    rope_cache,
    split_merge,
    tied_rope_cache,
)
from gemma4.kernels.activations import empty_activations
from gemma4.kernels.dependent_launch import dependent_launch_options
from gemma4.kernels.packed_planes import PACKED_FORMATS
from tests.kernels.packed_cases import NAMES, make_weight, meta
from tests.kernels.triton_without_gpu import compile_launches


def rows(m: int, k: int) -> Tensor:
    return torch.empty(m, k, dtype=torch.bfloat16, device="meta")


def ptx(module: ModuleType, function: str, *args: Any) -> tuple[str, str]:
    """The code of the kernel that function(*args) launches as a dependent one: before and after its wait."""
    with mock.patch.object(module, "dependent_launch_options", return_value={"PDL": True, "launch_pdl": True}):
        (compiled,) = compile_launches(module, 90, function, *args)
    parts = compiled.asm["ptx"].split("griddepcontrol.wait")
    assert len(parts) == 2
    assert "griddepcontrol.launch_dependents" in parts[0]
    return parts[0], parts[1]


def norm() -> tuple[str, str]:
    h, weight = torch.empty(1, 5376, device="meta"), torch.empty(5376, device="meta")
    arguments = (h, h, weight, weight[:1], weight, 1e-6, empty_activations(h, 2))
    return ptx(fused_norm, "launch_fused_norm", *arguments)


def gelu() -> tuple[str, str]:
    gate, up = rows(1, 43008).chunk(2, -1)
    return ptx(gelu_mul, "launch_gelu_mul", gate, up, empty_activations(gate, 2))


def quantize() -> tuple[str, str]:
    with mock.patch.object(activations, "_check"):
        return ptx(activations, "launch_quantize_activations", rows(1, 8192), 2)


def rope() -> tuple[str, str]:
    q, k, weight = rows(1, 32 * 256), rows(1, 16 * 256), torch.empty(256, device="meta")
    cache, position = rows(64, 256).expand(1, 16, 64, 256), torch.empty(1, dtype=torch.int64, device="meta")
    arguments = (q, k, k, weight, weight, cache, cache, weight[:128], position, 1e-6, True, True)
    return ptx(rope_cache, "qk_norm_rope_launch", *arguments)


def tied_rope() -> tuple[str, str]:
    q, k, weight = rows(1, 32 * 512), rows(1, 4 * 512), torch.empty(512, device="meta")
    cache, position = rows(64, 640).expand(1, 4, 64, 640), torch.empty(1, dtype=torch.int64, device="meta")
    arguments = (q, k, weight, weight, cache, weight[:256], position, 1e-6, True)
    return ptx(tied_rope_cache, "tied_norm_rope_launch", *arguments)


def merge() -> tuple[str, str]:
    q = torch.empty(1, 32, 1, 256, dtype=torch.bfloat16, device="meta")
    partials = split_merge.empty_partials(q, 16, 8)
    return ptx(split_merge, "launch_merge", partials, 1, split_merge.empty_quantized(q, 2))


@pytest.mark.parametrize("kernel", [norm, gelu, quantize, rope, tied_rope, merge])
def test_nothing_is_stored_before_the_wait(kernel: Callable[[], tuple[str, str]]) -> None:
    before, after = kernel()
    assert "st.global" not in before
    assert "st.global" in after


@pytest.mark.parametrize("name", NAMES)
def test_a_matvec_fetches_its_weights_and_nothing_else_before_the_wait(name: str) -> None:
    k = 5376
    weight = make_weight(name, 2, k)
    acts = empty_activations(rows(1, k), 2)
    kernel = getattr(linear, f"{name}_matvec_kernel")
    arguments = (kernel, name, acts, meta(weight.planes), torch.bfloat16)
    before, after = ptx(packed_matvec, "launch_packed_matvec", *arguments)
    assert "st.global" not in before
    tile = packed_matvec.matvec_tile(name, 2, k, 1)
    assert before.count("ld.global") >= tile["EARLY"] * tile["R"] * len(PACKED_FORMATS[name].planes)
    # Weights are read once and marked so, activations are not.
    assert before.count("ld.global") == before.count("L1::evict_first")
    assert after.count("ld.global") > after.count("L1::evict_first")


def test_only_capable_devices_launch_so() -> None:
    assert dependent_launch_options(torch.device("cpu")) == {"PDL": False}
    with mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)):
        assert dependent_launch_options(torch.device("cuda:6")) == {"PDL": False}
    with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        assert dependent_launch_options(torch.device("cuda:7")) == {"PDL": True, "launch_pdl": True}
