"""The rotation of TurboQuant in kernels, and queries in the basis of the codes.

    rotated query of one head [D]:               R_D q                             keys have codes of their own
    with values that serve as keys [C + D]:      (R_C q_turned, R_D (q_rest * w))  q_turned: the C turned dimensions

In the second form the codes of a head hold v and only the C dimensions of k that rotary embedding may turn, i and
D / 2 + i for i < C / 2; k = v * w in the rest, so that part of q . k is (q * w) . v. R is that of
`gemma4.kernels.turboquant`; H is applied by the fast transform, log2(D) rounds of sums and differences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from gemma4.kernels.turboquant import rotate

# ---------------------------------------------------------------------------------------------------- reference


def rotate_queries_reference(q: Tensor, k_weight: Tensor | None, turned: int) -> Tensor:
    """Rotated queries of q [..., D]: [..., D], or [..., turned + D] where k_weight [D] is given."""
    if k_weight is None:
        return rotate(q)
    half, part = q.shape[-1] // 2, turned // 2
    rest = (q * k_weight).unflatten(-1, (2, half)).clone()
    rest[..., :part] = 0
    return torch.cat((rotate(turned_part(q, turned)), rotate(rest.flatten(-2))), -1)


def turned_part(x: Tensor, turned: int) -> Tensor:
    """Dimensions i and D / 2 + i for i < turned / 2 of x [..., D]: [..., turned]."""
    half = x.shape[-1] // 2
    return torch.cat((x[..., : turned // 2], x[..., half : half + turned // 2]), -1)


# ------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def signs(D: tl.constexpr):
    """float32 [D]: the signs of the rotation."""
    h = (tl.arange(0, D) + 1).to(tl.uint32) * 0x9E3779B9
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return 1.0 - 2.0 * ((h ^ (h >> 16)) & 1).to(tl.float32)


@triton.jit
def hadamard(x, D: tl.constexpr):
    """H x / sqrt(D) of a float32 vector [D]."""
    for i in tl.static_range(16):
        if (D >> i) > 1:
            a, b = tl.split(tl.reshape(x, (D // 2, 2)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (1, 0)), (D,))
    return x * (D**-0.5)


@triton.jit
def turned_offsets(D: tl.constexpr, TURNED: tl.constexpr):
    """int32 [TURNED]: the dimensions that rotary embedding may turn."""
    i = tl.arange(0, TURNED)
    return tl.where(i < TURNED // 2, i, i - TURNED // 2 + D // 2)


@triton.jit
def _rotate_queries_kernel(
    q_ptr,  # [Hq, T, D], strided over heads and tokens
    k_weight_ptr,  # [D] float32, read only where TURNED < D
    out_ptr,  # [Hq, T, D], or [Hq, T, TURNED + D] where TURNED < D
    stride_qh,
    stride_qt,
    tokens,
    D: tl.constexpr,
    TURNED: tl.constexpr,
):
    WIDTH: tl.constexpr = TURNED + D if TURNED < D else D
    row = tl.program_id(0).to(tl.int64)
    src = q_ptr + row // tokens * stride_qh + row % tokens * stride_qt
    dst = out_ptr + row * WIDTH
    offs = tl.arange(0, D)
    x = tl.load(src + offs).to(tl.float32)
    if TURNED < D:
        turned = tl.load(src + turned_offsets(D, TURNED)).to(tl.float32)
        y = hadamard(turned * signs(TURNED), TURNED)
        tl.store(dst + tl.arange(0, TURNED), y.to(out_ptr.dtype.element_ty))
        dst += TURNED
        x = tl.where(offs % (D // 2) < TURNED // 2, 0.0, x * tl.load(k_weight_ptr + offs))
    y = hadamard(x * signs(D), D)
    tl.store(dst + offs, y.to(out_ptr.dtype.element_ty))


def launch_rotate_queries(q: Tensor, k_weight: Tensor | None, turned: int) -> Tensor:
    """Rotated queries of q [1, Hq, T, D] in float16; `turned` is D where keys have codes of their own."""
    _, heads, tokens, head_dim = q.shape
    out = q.new_empty((1, heads, tokens, head_dim if k_weight is None else turned + head_dim), dtype=torch.float16)
    wrap_triton(_rotate_queries_kernel)[(heads * tokens,)](
        q_ptr=q,
        k_weight_ptr=q if k_weight is None else k_weight,
        out_ptr=out,
        stride_qh=q.stride(1),
        stride_qt=q.stride(2),
        tokens=tokens,
        D=head_dim,
        TURNED=turned,
        num_warps=1,
    )
    return out
