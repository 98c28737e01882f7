"""The mixture of experts of Gemma 4 26B-A4B: a router and packed experts, of which only the chosen rows are read.

Letters: T tokens, E experts, S experts chosen for a token, H hidden size, F the experts' intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma4.kernels.gelu_mul import gelu_mul_reference
from gemma4.kernels.packed_matvec import MAX_ROWS
from gemma4.quant.linear import Linear, packed_linear
from gemma4.quant.packed_weight import PackedWeight


class Router(nn.Module):
    """Chooses S experts for every token from its normalised residual, and their weights, which sum to 1 before
    each expert's own scale.
    """

    def __init__(self, proj: Linear, num_experts_per_tok: int, eps: float) -> None:
        super().__init__()
        num_experts, hidden = proj.weight.shape
        self.eps = eps
        self.num_experts_per_tok = num_experts_per_tok
        self.proj = proj
        self.scale = nn.Parameter(torch.empty(hidden, device="meta"), requires_grad=False)
        self.per_expert_scale = nn.Parameter(torch.empty(num_experts, device="meta"), requires_grad=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: float32 [T, H]. Returns weights float32 [T, S] and experts int64 [T, S]."""
        hidden = h.shape[-1]
        x = nn.functional.rms_norm(h, (hidden,), eps=self.eps) * hidden**-0.5 * self.scale
        weights, experts = self.proj((x,)).softmax(-1).topk(self.num_experts_per_tok, dim=-1)
        return weights / weights.sum(-1, keepdim=True) * self.per_expert_scale[experts], experts


class Experts(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)) of each chosen expert, weighted and summed.

    first: [E * 2F, H], gate rows before up rows in each expert, or two of [E * F, H]. down: [E * H, F].
    """

    def __init__(self, first: dict[str, Linear], down: Linear, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.first = tuple(first)
        for name, linear in first.items():
            self.add_module(name, linear)
        self.down_proj = down

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x: [T, H]; weights, experts: [T, S]. Returns float32 [T, H]."""
        tokens = x.shape[0]
        if isinstance(tokens, int) and tokens <= MAX_ROWS:  # each as if it were alone, to the bit
            return torch.cat([self._one_token(x[i].float(), weights[i], experts[i]) for i in range(tokens)])
        if torch.compiler.is_exporting():
            return self._every_expert(x, weights, experts)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(experts).tolist():
            token, slot = torch.where(experts == expert)
            y = self._expert(expert, x[token])
            out.index_add_(0, token, y.float() * weights[token, slot, None])
        return out

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self._halves([self._linear(name, expert, x) for name in self.first])
        return self._linear("down_proj", expert, gelu_mul_reference(gate, up))

    def _one_token(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As `forward`, for x [H], without the host knowing which experts were chosen."""
        gate, up = self._halves([self._gather(name, experts) @ x for name in self.first])
        y = torch.einsum("shf,sf->sh", self._gather("down_proj", experts), gelu_mul_reference(gate, up))
        return (weights[:, None] * y).sum(0, keepdim=True)

    def _every_expert(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As `forward` with all experts for all tokens, of which the chosen count: a graph cannot skip the others."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.num_experts):
            share = (weights * (experts == expert)).sum(-1, keepdim=True)
            out = out + self._expert(expert, x).float() * share
        return out

    def _halves(self, products: list[Tensor]) -> tuple[Tensor, Tensor]:
        gate, up = products if len(products) > 1 else products[0].chunk(2, dim=-1)
        return gate, up

    def _weight(self, name: str) -> PackedWeight:
        weight = self.get_submodule(name).weight
        assert isinstance(weight, PackedWeight)
        return weight

    def _scale(self, name: str) -> Tensor | None:
        """float32 [E], one of each expert, where the file has them."""
        linear = self.get_submodule(name)
        assert isinstance(linear, Linear)
        return linear.scale

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, scale = self._weight(name), self._scale(name)
        rows = weight.shape[0] // self.num_experts
        y = packed_linear(x, weight, slice(expert * rows, (expert + 1) * rows))
        return y if scale is None else (y.float() * scale[expert]).to(y.dtype)

    def _gather(self, name: str, experts: Tensor) -> Tensor:
        """float32 [S, rows of an expert, columns] of the chosen experts."""
        weight, scale = self._weight(name), self._scale(name)
        rows = weight.shape[0] // self.num_experts
        ids = experts[:, None] * rows + torch.arange(rows, device=experts.device)
        weights = weight.tensor.dequantize(ids)
        return weights if scale is None else weights * scale[experts, None, None]
