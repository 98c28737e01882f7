"""TurboQuant caches with exact answers: what the codes stand for, attended in float64; unwritten slots are poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4.kernels.tq4_cache import TQ4Cache
from gemma4.kernels.tq4_rotation import turned_part
from gemma4.kernels.turboquant import decode, encode, rotate, rotate_back

SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens` new tokens after `first` old ones in `length` slots; turned < head_dim: values serve as keys."""

    first: int
    tokens: int
    length: int
    bits: int = 6
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    turned: int = 64

    def __str__(self) -> str:
        heads = f"H{self.q_heads}x{self.kv_heads}-D{self.head_dim}-C{self.turned}"
        return f"P{self.first}-T{self.tokens}-L{self.length}-B{self.bits}-{heads}"

    @property
    def is_tied(self) -> bool:
        return self.turned < self.head_dim


@dataclass(frozen=True, slots=True)
class Problem:
    """q [1, Hq, T, D]; k, v [1, Hkv, N, D] of all N tokens; the cache that holds them; the answer in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_weight: Tensor | None
    input_pos: Tensor
    cache: TQ4Cache
    answer: Tensor

    def arguments(self) -> tuple[object, ...]:
        return (self.q, *self.cache, self.k_weight, self.input_pos, SCALE)


def empty_cache(case: Case, device: str = "cpu") -> TQ4Cache:
    """A cache with nothing in it: arbitrary codes, NaN in the rest."""
    shape = (1, case.kv_heads, case.length)
    codes = (torch.full((*shape, d * case.bits // 8), 0xA5, dtype=torch.uint8) for d in (case.turned, case.head_dim))
    k_codes, v_codes = (x.to(device) for x in codes)
    k_scale, v_scale = (torch.full(shape, torch.nan, device=device) for _ in range(2))
    width = case.turned * case.is_tied + case.head_dim
    first_key = torch.full((1, case.kv_heads, width), torch.nan, device=device)
    return TQ4Cache(k_codes, k_scale, v_codes, v_scale, first_key)


def make_problem(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """A random problem."""
    torch.manual_seed(case.first + 1000 * case.tokens)
    total = case.first + case.tokens
    q = torch.randn(1, case.q_heads, case.tokens, case.head_dim, device=device).to(dtype)
    k, v = (torch.randn(1, case.kv_heads, total, case.head_dim, device=device).to(dtype) for _ in range(2))
    k_weight = None
    if case.is_tied:
        k_weight = torch.rand(case.head_dim, device=device) + 0.5
        joint = (v * k_weight).to(dtype).unflatten(-1, (2, -1))
        joint[..., : case.turned // 2] = k.unflatten(-1, (2, -1))[..., : case.turned // 2]
        k = joint.flatten(-2)
    cache = empty_cache(case, device)
    k_hat = store(cache[:2], turned_part(k, case.turned), case.bits)
    v_hat = store(cache[2:4], v, case.bits)
    first = rotate(turned_part(k, case.turned)[:, :, 0].float())
    if k_weight is not None:
        turned = k_hat.unflatten(-1, (2, -1))
        joint = (v_hat * k_weight).unflatten(-1, (2, -1)).clone()
        joint[..., : case.turned // 2] = turned
        k_hat = joint.flatten(-2)
        first = torch.cat((first, rotate(v[:, :, 0].float())), -1)
    cache.first_key.copy_(first)
    k_hat[:, :, 0] = k[:, :, 0]
    input_pos = torch.arange(case.first, total, device=device)
    return Problem(q, k, v, k_weight, input_pos, cache, exact_attention(q, k_hat, v_hat, input_pos))


def store(cache: tuple[Tensor, ...], x: Tensor, bits: int) -> Tensor:
    """Writes x [1, H, N, D] to codes and scales of the first N slots; returns what they stand for, in float64."""
    codes, scale = encode(rotate(x).float(), bits)
    cache[0][:, :, : x.shape[2]] = codes
    cache[1][:, :, : x.shape[2]] = scale
    return rotate_back(decode(codes, scale, x.shape[3]).double())


def exact_attention(q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
    """Causal attention of q at input_pos over keys 0, 1, ... in float64, by the formula."""
    grouped = q.double().view(1, k.shape[1], -1, *q.shape[2:])
    scores = torch.einsum("bhgtd,bhnd->bhgtn", grouped, k.double()) * SCALE
    hidden = input_pos[:, None] < torch.arange(k.shape[2], device=q.device)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("bhgtn,bhnd->bhgtd", weights, v.double()).reshape(q.shape)
