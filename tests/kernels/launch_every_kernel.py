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
from gemma4.kernels.decode_attention import MAX_TOKENS, decode_attention, decode_attention_quantize
from gemma4.kernels.dequantize_planes import dequantize_planes, packed_embedding
from gemma4.kernels.fused_norm import residual_norm, residual_norm_, residual_norm_quantize, rms_norm, rms_norm_quantize
from gemma4.kernels.gated_linear import gated_linear
from gemma4.kernels.gelu_mul import gelu_mul, gelu_mul_quantize
from gemma4.kernels.prefill_attention import prefill_attention
from gemma4.kernels.rope_cache import qk_norm_rope, qk_norm_rope_cache
from gemma4.kernels.tied_decode_attention import tied_decode_attention, tied_decode_attention_quantize
from gemma4.kernels.tied_prefill_attention import tied_prefill_attention
from gemma4.kernels.tied_rope_cache import tied_norm_rope, tied_norm_rope_cache
from gemma4.kernels.tq4_sdpa import tq4_sdpa
from gemma4.kernels.tq4_write import tq4_write
from tests.kernels import tq4_cases
from tests.kernels.attention_cases import SCALE, Case, make_problem
from tests.kernels.packed_cases import NAMES, make_rows, make_weight
from tests.kernels.rope_cases import EPS, RopeCase, make_inputs
from tests.kernels.tied_cases import make_tied

CASES = [
    Case(first=40, tokens=3, window=0, length=53, q_heads=4, kv_heads=2, head_dim=64),
    Case(first=29, tokens=5, window=4, length=8, batch=2, q_heads=6, head_dim=128),
]


def packed(device: str) -> None:
    for name in NAMES:
        weight = make_weight(name, 65, 768, device)
        for m in (1, 3, 8):
            x = make_rows(m, 768, torch.bfloat16, device)
            getattr(torch.ops.gemma4, f"{name}_matvec")(*quantize_activations(x), *weight.planes)
            getattr(linear, f"{name}_linear")(x, *weight.planes)
        dequantize_planes(name, weight.planes, torch.bfloat16)
        packed_embedding(torch.tensor([64, 0], device=device), weight.planes, name)
        gated_linear(x, [plane[:64] for plane in weight.planes], name)
    long = make_weight("q8_0", 33, 8192, device)
    torch.ops.gemma4.q8_0_matvec(*quantize_activations(make_rows(8, 8192, torch.bfloat16, device)), *long.planes)


def rows(device: str) -> None:
    for m, k in ((1, 5376), (9, 96)):
        h, y = torch.randn(2, m, k, device=device)
        weight, scale = torch.rand(k, device=device), torch.rand(1, device=device)
        rms_norm(h, weight, EPS, torch.bfloat16)
        rms_norm_quantize(h, weight, EPS)
        residual_norm(h, y, weight, scale, weight, EPS, torch.bfloat16)
        residual_norm_(h.clone(), y, weight, scale, weight, EPS, torch.bfloat16)
        residual_norm_quantize(h, y, weight, None, weight, EPS)
        gelu_mul(h, y)
        gelu_mul_quantize(h, y)


def attention(device: str) -> None:
    for case in CASES:
        problem = make_problem(case, torch.bfloat16, device)
        settings = (problem.input_pos, SCALE, case.window)
        decode_attention(problem.q, *problem.new_caches, *settings)
        decode_attention_quantize(problem.q, *problem.new_caches, *settings)
        prefill_attention(problem.q, problem.k, problem.v, *problem.old_caches, *settings)


def rope(device: str) -> None:
    for tokens, values in ((1, True), (5, False)):
        case = RopeCase(tokens, 13, q_heads=3, kv_heads=1, head_dim=64, rotated=8, v_norm=True, values=values)
        x = make_inputs(case, torch.bfloat16, device)
        inputs = (x.q, x.k, x.v, x.q_weight, x.k_weight)
        caches = torch.zeros(2, 1, 1, 7, 64, dtype=torch.bfloat16, device=device)
        qk_norm_rope(*inputs, x.inv_freq, x.input_pos, EPS, True)
        qk_norm_rope_cache(*inputs, *caches, x.inv_freq, x.input_pos, EPS, True)


def tied(device: str) -> None:
    for tokens in (3, 9):
        problem = make_tied(Case(37, tokens, 0, 50, q_heads=4, kv_heads=2, head_dim=64), torch.bfloat16, device)
        x, chunk = problem.inputs, slice(37, None)
        inputs = (x.q[chunk], x.k[chunk], x.q_weight, x.k_weight)
        cache = problem.old_cache.nan_to_num()
        tied_norm_rope(*inputs, x.inv_freq, problem.input_pos, EPS, 16)
        tied_norm_rope_cache(*inputs, cache, x.inv_freq, problem.input_pos, EPS)
        tied_prefill_attention(problem.q, problem.rows, problem.old_cache, problem.input_pos, SCALE)
        if tokens <= MAX_TOKENS:
            tied_decode_attention(problem.q, problem.new_cache, problem.input_pos, SCALE)
            tied_decode_attention_quantize(problem.q, problem.new_cache, problem.input_pos, SCALE)


def turboquant(device: str) -> None:
    for bits, turned in ((6, 64), (4, 128)):
        for tokens in (3, 30):
            case = tq4_cases.Case(11, tokens, 47, bits, head_dim=128, turned=turned)
            problem = tq4_cases.make_problem(case, torch.bfloat16, device)
            cache = tq4_cases.empty_cache(case, device)
            tq4_write(problem.k[:, :, 11:], problem.v[:, :, 11:], *cache, problem.input_pos)
            tq4_sdpa(problem.q, *problem.cache, problem.k_weight, problem.input_pos, tq4_cases.SCALE)


ALL = (packed, rows, attention, rope, tied, turboquant)


def main() -> None:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(gemma4.kernels.__path__, "gemma4.kernels.")
    ]
    launched: set[str] = set()
    kernels: set[str] = set()
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=noting(launched, JITFunction.run)):
        for run in ALL:
            run("cuda")
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
