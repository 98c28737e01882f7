"""What stands between two matrix products: norms, residual sums, GELU and attention, in one of two forms.

`DenseRows` makes plain tensors, for prefill and the CPU. `PackedRows` makes int8 activations with one fused kernel a
step, for the packed matvecs that decode a few tokens. A model's forward is written once against both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from gemma4.kernels.activations import quantize_activations
from gemma4.kernels.decode_attention import decode_attention, decode_attention_quantize
from gemma4.kernels.fused_norm import (
    SHARED_ROWS,
    residual_norm,
    residual_norm_,
    residual_norm_quantize,
    rms_norm,
    rms_norm_quantize,
)
from gemma4.kernels.gelu_mul import gelu_mul, gelu_mul_quantize
from gemma4.kernels.split_merge import head_rows
from gemma4.kernels.tied_decode_attention import tied_decode_attention, tied_decode_attention_quantize
from gemma4.quant.linear import Linear, Rows, gated_linear


class RMSNorm(nn.Module):
    """The weight float32 [size] and epsilon of an RMS norm (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device="meta"), requires_grad=False)


class RowMaker(Protocol):
    """Makes the input of the next matrix product. h: float32 [M, H], the residual stream; y: [M, H], a branch.

    is_open: M is open, as in an exported prefill: nothing may be chosen by it, and attention takes the rows as a chunk.
    """

    is_open: bool

    def plain(self, x: Tensor) -> Rows:
        """x [M, K] as it is."""

    def heads(self, x: Tensor) -> Rows:
        """Heads [1, H, M, D] side by side, K = H * D."""

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Rows:
        """The heads of `gemma4.kernels.decode_attention` side by side."""

    def tied_decode_attention(self, q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Rows:
        """The heads of `gemma4.kernels.tied_decode_attention` side by side."""

    def normed(self, h: Tensor, norm: RMSNorm) -> Rows:
        """norm(h)."""

    def residual_normed(
        self, h: Tensor, y: Tensor, post_norm: RMSNorm, scale: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Rows]:
        """h' = (h + post_norm(y)) * scale, and norm(h'). h is not to be used again: h' may be in its place."""

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Rows:
        """gelu_tanh(gate) * up."""

    def gated(self, x: Rows, gate_up: Linear) -> Rows:
        """gelu_tanh(gate) * up for both products of x in one matrix."""


class DenseRows:
    """Rows as one tensor of `dtype`."""

    def __init__(self, dtype: torch.dtype, *, is_open: bool = False) -> None:
        self.dtype = dtype
        self.is_open = is_open

    def plain(self, x: Tensor) -> Rows:
        return (x.to(self.dtype),)

    def heads(self, x: Tensor) -> Rows:
        return self.plain(head_rows(x))

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Rows:
        return self.heads(decode_attention(q, k, v, input_pos, scale, window))

    def tied_decode_attention(self, q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Rows:
        return self.heads(tied_decode_attention(q, kv, input_pos, scale))

    def normed(self, h: Tensor, norm: RMSNorm) -> Rows:
        return (rms_norm(h, norm.weight, norm.eps, self.dtype),)

    def residual_normed(
        self, h: Tensor, y: Tensor, post_norm: RMSNorm, scale: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Rows]:
        arguments = h, y, post_norm.weight, scale, norm.weight, norm.eps, self.dtype
        # A compiler chooses places by itself; few rows are faster where programs share them.
        if torch.compiler.is_compiling() or h.shape[0] <= SHARED_ROWS:
            h, x = residual_norm(*arguments)
            return h, (x,)
        return h, (residual_norm_(*arguments),)

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Rows:
        return (gelu_mul(gate, up),)

    def gated(self, x: Rows, gate_up: Linear) -> Rows:
        return (gated_linear(x[0], gate_up),)


class PackedRows:
    """Rows as int8 planes with scales and sums (`gemma4.kernels.activations`)."""

    is_open = False

    def plain(self, x: Tensor) -> Rows:
        rows: Rows = quantize_activations(x)
        return rows

    def heads(self, x: Tensor) -> Rows:
        return self.plain(head_rows(x))

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, scale: float, window: int) -> Rows:
        rows: Rows = decode_attention_quantize(q, k, v, input_pos, scale, window)
        return rows

    def tied_decode_attention(self, q: Tensor, kv: Tensor, input_pos: Tensor, scale: float) -> Rows:
        rows: Rows = tied_decode_attention_quantize(q, kv, input_pos, scale)
        return rows

    def normed(self, h: Tensor, norm: RMSNorm) -> Rows:
        rows: Rows = rms_norm_quantize(h, norm.weight, norm.eps)
        return rows

    def residual_normed(
        self, h: Tensor, y: Tensor, post_norm: RMSNorm, scale: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Rows]:
        h, *rows = residual_norm_quantize(h, y, post_norm.weight, scale, norm.weight, norm.eps)
        return h, tuple(rows)

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Rows:
        rows: Rows = gelu_mul_quantize(gate, up)
        return rows

    def gated(self, x: Rows, gate_up: Linear) -> Rows:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return self.gelu_mul(gate, up)


def closed(h: Tensor, y: Tensor, post_norm: RMSNorm) -> Tensor:
    """h + post_norm(y), float32 [M, H]: the end of a branch that no matrix product follows."""
    out: Tensor = h + rms_norm(y, post_norm.weight, post_norm.eps, torch.float32)
    return out
