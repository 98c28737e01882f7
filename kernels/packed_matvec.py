"""What the packed matvec ops share outside their kernels: checks, reference, tile choice and launch.

An op `gemma4::<format>_matvec(xq, xs, xsum, *planes, out_dtype) -> [M, N]` multiplies activations from
`gemma4::quantize_activations` with a packed weight. Products and sums inside 16 weights are exact integers;
scaling and the sum over K are float32 in a fixed order.

The format's own kernel takes M below MMA_ROWS, the tensor-core kernel of `gemma4.kernels.packed_mma` larger M. Their
sums differ in the last bits; either computes a row of W or x alike alone and among others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.activations import FRAGMENT_ROWS, activation_shape, dequantize_activations
from gemma4.kernels.dependent_launch import dependent_launch_options
from gemma4.kernels.packed_mma import launch_packed_mma
from gemma4.kernels.packed_planes import PACKED_FORMATS, check_planes

MAX_ROWS = 8
"""Most rows M of x that a matvec op takes."""
MMA_ROWS = FRAGMENT_ROWS.value
"""From this many rows of x on, tensor cores take less time than repeating a matvec's arithmetic."""
SHORT_ROWS = 4096
"""A weight of up to this many rows is read by programs that all run at once."""
SHORT_BYTES = 256
"""Bytes of it that a thread has in flight before it waits for x."""


def matvec_tile(name: str, n: int, k: int, m: int) -> dict[str, int]:
    """Tile of a matvec for M = m rows of x: KL lanes and KW warps along K, RL warps along N, R rows of W a thread.

    A warp reads neighbouring units of one row, so that its loads are whole lines. KL, KW and the order of steps fix the
    order of the sum over K: they depend on the format and K alone, so that a row does not depend on its neighbours.
    The weights of EARLY steps are in flight before the activations are awaited: all those of a row of few steps, save
    where so many registers would keep the programs of a short W from running all at once.
    """
    fmt = PACKED_FORMATS[name]
    along_k = 4 if k >= 8192 else 1
    steps = triton.cdiv(k // fmt.unit, 32 * along_k)
    # Rows of W share the loads of x, which weigh more the more rows x has.
    rows = 4 if m > 1 else 2
    early = steps if steps <= 3 and m == 1 else 1
    if n <= SHORT_ROWS:
        early = max(1, min(early, SHORT_BYTES // (rows * fmt.unit_bytes)))
    return {"KL": 32, "RL": 4 // along_k, "KW": along_k, "R": rows, "EARLY": early}


def check_activations(name: str, xq: Tensor, xs: Tensor, xsum: Tensor, k: int) -> tuple[int, int]:
    """Return (planes, M). Raises ValueError naming the tensor that does not fit a weight with K = k."""
    planes, m = xq.shape[0], xs.shape[0]
    shape = activation_shape(planes, m, k)
    if planes not in (1, 2) or tuple(xq.shape) != shape or xq.dtype != torch.int8:
        expected = f"int8 [1 or 2, {', '.join(map(str, shape[1:]))}] for M = {m}, K = {k}"
        raise ValueError(f"{name}: xq must be {expected}, got {xq.dtype} {list(xq.shape)}")
    if not 1 <= m <= MAX_ROWS:
        raise ValueError(f"{name}: M must be 1 to {MAX_ROWS}, got {m}")
    for label, tensor, group in (("xs", xs, 32), ("xsum", xsum, 16)):
        if tuple(tensor.shape) != (m, k // group) or tensor.dtype != torch.float32:
            expected = f"float32 {[m, k // group]}"
            raise ValueError(f"{name}: {label} must be {expected}, got {tensor.dtype} {list(tensor.shape)}")
    for label, tensor in (("xq", xq), ("xs", xs), ("xsum", xsum)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {label} must be contiguous, got strides {tensor.stride()}")
        if tensor.device != xq.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, xq on {xq.device}")
    return planes, m


def packed_matvec(
    kernel: Any,
    name: str,
    activations: tuple[Tensor, Tensor, Tensor],
    planes: tuple[Tensor, ...],
    out_dtype: torch.dtype,
) -> Tensor:
    """Body of every matvec op: the torch reference on the CPU, `launch_packed_matvec` on a GPU."""
    if planes[0].device.type == "cpu":
        return packed_matvec_reference(name, activations, planes, out_dtype)
    return launch_packed_matvec(kernel, name, activations, planes, out_dtype)


def packed_matvec_reference(
    name: str, activations: tuple[Tensor, Tensor, Tensor], planes: tuple[Tensor, ...], out_dtype: torch.dtype
) -> Tensor:
    """[M, N]: the quantized activations times the exactly decoded weights, in float32.

    Products are summed row by row, not by a BLAS, so that here too a row does not depend on its neighbours.
    """
    _check(name, activations, planes, out_dtype)
    weights = PACKED_FORMATS[name].dequantize(*planes)
    rows = [(weights * x).sum(-1) for x in dequantize_activations(*activations[:2]).unbind()]
    return torch.stack(rows).to(out_dtype)


def launch_packed_matvec(
    kernel: Any,
    name: str,
    activations: tuple[Tensor, Tensor, Tensor],
    planes: tuple[Tensor, ...],
    out_dtype: torch.dtype,
    **options: int,
) -> Tensor:
    """Run `kernel`, or from MMA_ROWS on that on tensor cores; on CPU tensors only where Triton interprets.

    `options` override the chosen tile.
    """
    m, n, k = _check(name, activations, planes, out_dtype)
    if m >= MMA_ROWS:
        return launch_packed_mma(name, activations, planes, out_dtype, **options)
    xq, xs, xsum = activations
    y = xs.new_empty((m, n), dtype=out_dtype)
    tile = matvec_tile(name, n, k, m) | options
    pointers = {f"{p.name}_ptr": t for p, t in zip(PACKED_FORMATS[name].planes, planes, strict=True)}
    grid = (triton.cdiv(n, tile["R"] * tile["RL"]),)
    warps = tile["KL"] * tile["RL"] * tile["KW"] // 32
    even = n % (tile["R"] * tile["RL"]) == 0
    wrap_triton(kernel)[grid](
        y_ptr=y,
        xq_ptr=xq,
        xs_ptr=xs,
        xsum_ptr=xsum,
        **pointers,
        N=n,
        K=k,
        M=m,
        PLANES=xq.shape[0],
        EVEN_N=even,
        **tile,
        num_warps=warps,
        **dependent_launch_options(y.device),
    )
    return y


def packed_matvec_fake(
    name: str, activations: tuple[Tensor, Tensor, Tensor], planes: tuple[Tensor, ...], out_dtype: torch.dtype
) -> Tensor:
    """Shape and dtype of the result."""
    m, n, _ = _check(name, activations, planes, out_dtype)
    return activations[1].new_empty((m, n), dtype=out_dtype)


def _check(
    name: str, activations: tuple[Tensor, Tensor, Tensor], planes: tuple[Tensor, ...], out_dtype: torch.dtype
) -> tuple[int, int, int]:
    n, k = check_planes(PACKED_FORMATS[name], planes)
    _, m = check_activations(f"{name}_matvec", *activations, k)
    if activations[0].device != planes[0].device:
        raise ValueError(f"{name}_matvec: xq is on {activations[0].device}, qs on {planes[0].device}")
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}_matvec: out_dtype must be bfloat16 or float32, got {out_dtype}")
    return m, n, k
