"""TurboQuant of keys and values: rotate, give every coordinate a 4 or 6 bit code, keep one scale a vector.

    y = R x,   R = H diag(s) / sqrt(D)      H: Walsh-Hadamard matrix of order D; s: signs from a seeded hash
    code_i = the cell of y_i / rms(y),      x̂ = R^T (scale * level(code)),      scale = |y|^2 / (y . level(code))

Method: TurboQuant (Zandieh et al., 2025, arXiv 2504.19874), its quantizer for squared error. A coordinate of a randomly
rotated vector of rms 1 has the density (1 - x^2 / D)^((D - 3) / 2), whatever the vector, so one codebook serves all.
The randomized Hadamard transform stands in for a dense random rotation: its coordinates are sums with random signs, so
no heavier in the tails than a Gaussian; it costs D log D additions inside the kernels, and it is no stored matrix: all
constants here are numbers in the code, which an exported program cannot lose.

Codebook: Lloyd's algorithm on the exact density, its levels held to an odd polynomial of degree 5 in the code, which is
what a kernel can evaluate in a few packed instructions where a table of levels would be gathered. Distortion of a
Gaussian, in parts of its variance: 0.0095 with 4 bits, 0.00066 with 6 (Lloyd-Max without that rule: 0.0095, 0.00064).
The scale makes a reconstruction's product with its own vector exact (x̂ . x = x . x), so quantization shrinks no score.

Storage of a vector, D * bits / 8 bytes, in quarters 0 to 3 of its coordinates. Nibbles first, two codes a byte: byte b
of the first D / 4 has coordinate b of quarter 0 low and of quarter 2 high, the next D / 4 have quarters 1 and 3. With 6
bits they are the codes' upper four, and D / 4 bytes follow: byte b has the lower two of coordinate b of quarters 0, 2,
1 and 3, from bit 0 on.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (4, 6)
MIN_DIM = 64  # quarters of 16, the least that a tensor core multiplies
SEED = 0x9E3779B9
_GRID = 8192  # steps of the numeric integral of the density
_ROUNDS = 400

# ------------------------------------------------------------------------------------------------------- codebook


class Codebook(NamedTuple):
    """Levels gain * u * ((u^2 + p)^2 + q) at u = ±1 / n, ±3 / n, ... ±(n - 1) / n, n = 2^bits."""

    gain: float
    p: float
    q: float

    def level(self, u: float) -> float:
        return self.gain * u * ((u * u + self.p) ** 2 + self.q)

    def levels(self, bits: int) -> list[float]:
        """All levels by code, rising."""
        n = 2**bits
        return [self.level((2 * code + 1 - n) / n) for code in range(n)]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination of a small positive definite system."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            row[:] = [a - factor * b for a, b in zip(row, pivot, strict=True)]
    solution: list[float] = []
    for i in reversed(range(len(rows))):
        known = sum(a * b for a, b in zip(rows[i][i + 1 : -1], reversed(solution), strict=True))
        solution.append((rows[i][-1] - known) / rows[i][i])
    return solution[::-1]


@cache
def codebook(dim: int, bits: int) -> Codebook:
    """The levels of least squared error for a coordinate of a random vector [dim] of rms 1, deterministic.

    Lloyd's algorithm: cells end half-way between levels, levels move to the means of their cells, here to the closest
    odd quintic in the mass of the cells.
    """
    power: float = (dim - 3) / 2
    edge = min(8.0, math.sqrt(dim))
    step = edge / _GRID

    def tail(x: float) -> float:
        return max(0.0, 1.0 - x * x / dim)

    density: list[float] = [tail(i * step) ** power for i in range(_GRID + 1)]
    mass: list[float] = [0.0, *accumulate((a + b) / 2 * step for a, b in pairwise(density))]

    def mass_below(x: float) -> float:
        i = min(int(x / step), _GRID - 1)
        return mass[i] + (mass[i + 1] - mass[i]) * (x / step - i)

    def moment_below(x: float) -> float:
        missing: float = tail(x) ** (power + 1)
        return dim / (2 * (power + 1)) * (1 - missing)

    count = 2 ** (bits - 1)
    u = [(2 * i + 1) / (2 * count) for i in range(count)]
    powers = [[x, x**3, x**5] for x in u]
    levels = [3 * x for x in u]
    for _ in range(_ROUNDS):
        ends = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), edge]
        masses = [mass_below(b) - mass_below(a) for a, b in pairwise(ends)]
        moments = [moment_below(b) - moment_below(a) for a, b in pairwise(ends)]
        normal = [
            [sum(w * x[i] * x[j] for w, x in zip(masses, powers, strict=True)) for j in range(3)] for i in range(3)
        ]
        right = [sum(m * x[i] for m, x in zip(moments, powers, strict=True)) for i in range(3)]
        a, b, c = _solve(normal, right)
        levels = [a * x + b * y + c * z for x, y, z in powers]
    p = b / (2 * c)
    return Codebook(c, p, a / c - p * p)


# ------------------------------------------------------------------------------------------------------ reference


def signs(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [dim]: 1 or -1 by the lowest bit of MurmurHash3's finalizer of a seeded counter."""
    mask = 0xFFFFFFFF
    h = (torch.arange(1, dim + 1, device=device) * SEED) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return 1.0 - 2.0 * ((h ^ (h >> 16)) & 1)


def hadamard(x: Tensor) -> Tensor:
    """H x / sqrt(D) of vectors x [..., D], D a power of two: log2(D) rounds of sums and differences."""
    dim = int(x.shape[-1])
    for _ in range(dim.bit_length() - 1):
        a, b = x[..., 0::2], x[..., 1::2]
        x = torch.cat((a + b, a - b), -1)
    return x / math.sqrt(dim)


def rotate(x: Tensor) -> Tensor:
    """R x of vectors x [..., D], in float32 (float64 for float64)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return hadamard(x * signs(x.shape[-1], x.device))


def rotate_back(y: Tensor) -> Tensor:
    """R^T y of vectors y [..., D], in float32 (float64 for float64)."""
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return hadamard(y) * signs(y.shape[-1], y.device)


def encode(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., D * bits // 8] and scales float32 [...] of rotated vectors y float32 [..., D]."""
    dim = int(y.shape[-1])
    book = codebook(dim, bits)
    levels = torch.tensor(book.levels(bits), dtype=torch.float32, device=y.device)
    unit = y * torch.rsqrt(y.square().mean(-1, keepdim=True).clamp_min(1e-38))
    code = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    dot = (y * levels[code]).sum(-1)
    scale = torch.where(dot > 0, y.square().sum(-1) / dot, 0.0) * book.gain
    low, high = code.to(torch.uint8).unflatten(-1, (2, 2, dim // 4)).unbind(-3)  # [..., second, coordinate]
    planes = [((low >> (bits - 4)) | ((high >> (bits - 4)) << 4)).flatten(-2)]
    if bits == 6:
        first, second = ((low & 3) | ((high & 3) << 2)).unbind(-2)
        planes.append(first | (second << 4))
    return torch.cat(planes, -1), scale


def decode(codes: Tensor, scale: Tensor, dim: int) -> Tensor:
    """Rotated vectors float32 [..., dim] of codes uint8 [..., dim * bits // 8] and scales float32 [...]."""
    bits = int(codes.shape[-1]) * 8 // dim
    book = codebook(dim, bits)
    levels = torch.tensor([level / book.gain for level in book.levels(bits)], dtype=torch.float32, device=codes.device)
    nibbles = codes[..., : dim // 2]
    code = torch.stack((nibbles & 15, nibbles >> 4), -2)  # [..., half, 2 quarters]
    if bits == 6:
        fine = codes[..., dim // 2 :]
        low = torch.cat((fine & 3, fine >> 4 & 3), -1), torch.cat((fine >> 2 & 3, fine >> 6), -1)
        code = code * 4 + torch.stack(low, -2)
    return levels[code.flatten(-2).int()] * scale[..., None]
