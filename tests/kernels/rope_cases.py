"""Inputs of the q/k norm + RoPE ops, and their answer in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class RopeCase:
    """`rotated` of the head_dim / 2 pairs turn. `values`: a v projection; without, v is the raw k."""

    tokens: int
    first: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    v_norm: bool
    values: bool

    def __str__(self) -> str:
        kind = f"{'norm' if self.v_norm else 'raw'}-{'v' if self.values else 'kv'}"
        heads = f"H{self.q_heads}x{self.kv_heads}-D{self.head_dim}-R{self.rotated}"
        return f"T{self.tokens}-P{self.first}-{heads}-{kind}"


@dataclass(frozen=True, slots=True)
class RopeInputs:
    """Arguments of qk_norm_rope, by its names."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_weight: Tensor
    k_weight: Tensor
    inv_freq: Tensor
    input_pos: Tensor


def make_inputs(case: RopeCase, dtype: torch.dtype, device: str = "cpu") -> RopeInputs:
    """Random slices of one fused projection."""
    torch.manual_seed(case.first + case.tokens)
    dim, pairs = case.head_dim, torch.arange(case.head_dim // 2, device=device)
    sizes = [case.q_heads * dim, case.kv_heads * dim, case.kv_heads * dim]
    q, k, v = (3 * torch.randn(case.tokens, sum(sizes), device=device)).to(dtype).split(sizes, 1)
    inv_freq = torch.where(pairs < case.rotated, 10000.0 ** (-pairs / len(pairs)), 0.0)
    weights = torch.rand(2, dim, device=device) + 0.5
    input_pos = case.first + torch.arange(case.tokens, device=device)
    return RopeInputs(q, k, v if case.values else None, weights[0], weights[1], inv_freq, input_pos)


def exact(inputs: RopeInputs, v_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [1, H, T, D] in float64, by complex multiplication."""
    dim = inputs.q_weight.shape[0]
    one = torch.ones_like(inputs.q_weight)
    turn = torch.polar(torch.ones((), dtype=torch.float64, device=one.device), _angles(inputs))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        heads = x.double().view(x.shape[0], -1, dim).permute(1, 0, 2)
        return heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), -1)[None]

    v = inputs.k if inputs.v is None else inputs.v
    v_heads = norm(v, one)[None] if v_norm else v.double().view(v.shape[0], -1, dim).permute(1, 0, 2)[None]
    return rotate(norm(inputs.q, inputs.q_weight)), rotate(norm(inputs.k, inputs.k_weight)), v_heads


def _angles(inputs: RopeInputs) -> Tensor:
    return inputs.input_pos.double()[:, None] * inputs.inv_freq.double()
