"""Launches every kernel at least once on small, odd shapes, for a memory checker to watch.

usage: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python -m tests.kernels.launch_every_kernel

Without the caching allocator every tensor is an allocation of its own, so that an access past its end is seen.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import gemma4.kernels
from gemma4.kernels import linear
from gemma4.kernels.activations import quantize_activations
from gemma4.kernels.decode_attention import decode_attention, decode_attention_quantize
from gemma4.kernels.dequantize_planes import dequantize_planes
from gemma4.kernels.fused_norm import residual_norm, residual_norm_quantize, rms_norm, rms_norm_quantize
from gemma4.kernels.gelu_mul import gelu_mul, gelu_mul_quantize
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache
from tests.kernels.attention_cases import SCALE, Case, make_problem
from tests.kernels.packed_cases import NAMES, make_rows, make_weight
from tests.kernels.rope_cases import EPS, RopeCase, make_inputs

CASES = [
    Case(first=40, tokens=3, window=0, length=53, q_heads=4, kv_heads=2, head_dim=64),
    Case(first=29, tokens=5, window=4, length=8, batch=2, q_heads=6, head_dim=128),
]


def packed() -> None:
    for name in NAMES:
        weight = make_weight(name, 33, 768, "cuda")
        for m in (1, 3, 8):
            x = make_rows(m, 768, torch.bfloat16, "cuda")
            getattr(torch.ops.gemma4, f"{name}_matvec")(*quantize_activations(x), *weight.planes)
            getattr(linear, f"{name}_linear")(x, *weight.planes)
        dequantize_planes(name, weight.planes, torch.bfloat16)
    long = make_weight("q8_0", 33, 8192, "cuda")
    torch.ops.gemma4.q8_0_matvec(*quantize_activations(make_rows(8, 8192, torch.bfloat16, "cuda")), *long.planes)


def rows() -> None:
    for m, k in ((1, 5376), (9, 96)):
        h, y = torch.randn(2, m, k, device="cuda")
        weight, scale = torch.rand(k, device="cuda"), torch.rand(1, device="cuda")
        rms_norm(h, weight, EPS, torch.bfloat16)
        rms_norm_quantize(h, weight, EPS)
        residual_norm(h, y, weight, scale, weight, EPS, torch.bfloat16)
        residual_norm_quantize(h, y, weight, None, weight, EPS)
        gelu_mul(h, y)
        gelu_mul_quantize(h, y)


def attention() -> None:
    for case in CASES:
        problem = make_problem(case, torch.bfloat16, "cuda")
        settings = (problem.input_pos, SCALE, case.window)
        decode_attention(problem.q, *problem.new_caches, *settings)
        decode_attention_quantize(problem.q, *problem.new_caches, *settings)
        prefill_attention(problem.q, problem.k, problem.v, *problem.old_caches, *settings)


def rope() -> None:
    for tokens, values in ((1, True), (5, False)):
        case = RopeCase(tokens, 13, q_heads=3, kv_heads=1, head_dim=64, rotated=8, v_norm=True, values=values)
        x = make_inputs(case, torch.bfloat16, "cuda")
        inputs = (x.q, x.k, x.v, x.q_weight, x.k_weight)
        caches = torch.zeros(2, 1, 1, 7, 64, dtype=torch.bfloat16, device="cuda")
        qk_norm_rope(*inputs, x.inv_freq, x.input_pos, EPS, True)
        qk_norm_rope_cache(*inputs, *caches, x.inv_freq, x.input_pos, EPS, True)


def main() -> None:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(gemma4.kernels.__path__, "gemma4.kernels.")
    ]
    launched: set[str] = set()
    kernels: set[str] = set()
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=noting(launched, JITFunction.run)):
        for run in (packed, rows, attention, rope):
            run()
    torch.cuda.synchronize()
    for module in modules:
        functions = (f for f in vars(module).values() if isinstance(f, JITFunction))
        kernels |= {f.fn.__name__ for f in functions if f.fn.__name__.endswith("_kernel")}
    missed = sorted(kernels - launched)
    sys.stdout.write(f"{len(launched)} kernels launched\n")
    if missed:
        raise SystemExit(f"not launched: {', '.join(missed)}")


def noting(launched: set[str], run: Any) -> Any:
    """`run` of a kernel, with its name added to `launched`."""

    def noted(kernel: Any, *args: Any, **options: Any) -> Any:
        launched.add(kernel.fn.__name__)
        return run(kernel, *args, **options)

    return noted


if __name__ == "__main__":
    main()
