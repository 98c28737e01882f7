"""The quantizer of `gemma4.kernels.turboquant` against what theory says of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gemma4.kernels.turboquant import BITS, codebook, decode, encode, hadamard, rotate, rotate_back, signs

DIMS = (64, 128, 256, 512)
# Distortion of Lloyd and Max's quantizer of a Gaussian with 2^bits levels (Max, 1960), in parts of its variance.
LLOYD_MAX = {4: 0.009497, 6: 0.000644}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_orthogonal_and_signs_are_balanced(dim: int) -> None:
    matrix = rotate(torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
    x = gaussian(3, dim).double()
    torch.testing.assert_close(rotate_back(rotate(x)), x)
    torch.testing.assert_close(x @ matrix, rotate(x))
    assert abs(float(signs(dim).sum())) <= 3 * math.sqrt(dim)


def test_hadamard_is_sylvester_s_matrix() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    expected = torch.kron(two, torch.kron(two, two)) / math.sqrt(8)
    torch.testing.assert_close(hadamard(torch.eye(8)), expected)


def test_rotation_spreads_a_spike() -> None:
    spike = torch.zeros(512)
    spike[77] = 1.0
    torch.testing.assert_close(rotate(spike).abs(), torch.full((512,), 512**-0.5))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_codebook_is_close_to_lloyd_max(dim: int, bits: int) -> None:
    levels = torch.tensor(codebook(dim, bits).levels(bits), dtype=torch.float64)
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(levels, -levels.flip(0))
    # The exact density, integrated on a grid.
    x = torch.linspace(-min(8.0, dim**0.5), min(8.0, dim**0.5), 200001, dtype=torch.float64)
    density = (1 - x * x / dim).clamp_min(0) ** ((dim - 3) / 2)
    density /= density.sum()
    code = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    distortion = float((density * (x - levels[code]) ** 2).sum())
    assert distortion < LLOYD_MAX[bits] * {4: 1.0, 6: 1.06}[bits]
    # Each level is the mean of its cell, within a small part of the cell's width: Lloyd's condition.
    mass = torch.zeros_like(levels).index_add_(0, code, density)
    mean = torch.zeros_like(levels).index_add_(0, code, density * x) / mass
    width = torch.cat((levels.diff(), levels.diff()[-1:]))
    assert float((mass * ((mean - levels) / width).abs()).sum()) < {4: 0.02, 6: 0.06}[bits]


def test_codebook_of_16_levels_is_lloyd_s() -> None:
    known = [0.1284, 0.3881, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326]  # of a Gaussian (Max, 1960)
    levels = codebook(512, 4).levels(4)[8:]
    assert levels == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 512])
def test_codes(dim: int, bits: int) -> None:
    y = rotate(gaussian(50, dim) * torch.logspace(-3, 3, 50)[:, None])
    codes, scale = encode(y, bits)
    assert codes.shape == (50, dim * bits // 8)
    found = decode(codes, scale, dim)
    error = (found - y).square().sum(-1) / y.square().sum(-1)
    assert error.mean() < LLOYD_MAX[bits] * 1.07
    torch.testing.assert_close((found * y).sum(-1), y.square().sum(-1))  # x̂ . x = x . x
    again, same_scale = encode(found, bits)
    assert (again != codes).float().mean() < 0.02
    torch.testing.assert_close(same_scale, scale, rtol=1e-2, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_layout(bits: int) -> None:
    """Each coordinate alone, its code in the place that the module's text gives it."""
    dim, n = 64, 2**bits
    levels = torch.tensor(codebook(dim, bits).levels(bits))
    code = torch.randint(n, (dim,), generator=torch.Generator().manual_seed(2))
    y = levels[code]
    y = y / y.square().mean().sqrt()
    packed, _ = encode(y, bits)
    actual = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2).tolist()
    for i, value in enumerate(actual):
        quarter, byte = divmod(i, dim // 4)
        nibble = int(packed[byte + dim // 4 * (quarter % 2)]) >> 4 * (quarter // 2) & 15
        assert nibble == value >> (bits - 4)
        if bits == 6:
            assert int(packed[dim // 2 + byte]) >> 2 * (0, 2, 1, 3)[quarter] & 3 == value & 3


def test_zero_stays_zero() -> None:
    codes, scale = encode(torch.zeros(2, 64), 4)
    assert (scale == 0).all()
    assert (decode(codes, scale, 64) == 0).all()


@pytest.mark.parametrize(
    ("keys", "dim", "bits", "least"),
    [(1024, 512, 6, 0.999), (1024, 512, 4, 0.99), (32768, 256, 6, 0.999), (131072, 128, 6, 0.999)],
)
def test_attention_of_gaussian_data(keys: int, dim: int, bits: int, least: float) -> None:
    """Attention over codes against attention over the vectors themselves: q, k, v ~ N(0, 1), scores q . k / sqrt(D).

    Independent keys and values leave nothing to average out: 1 / cos^2 - 1 is the distortion of k plus that of v. So
    a cosine of 0.999 needs a distortion of 0.001 for each, out of reach of any code of 4 bits (2^-8 by rate-distortion
    theory), and 6 is the least whole number of bits with which a code for single coordinates gives it.
    """
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(16, dim, generator=generator)
    exact, found = torch.zeros(2, 16, dim).unbind()
    for _ in range(keys // 1024):
        k, v = (torch.randn(1024, dim, generator=generator) for _ in range(2))
        exact += torch.exp(q @ k.T / math.sqrt(dim)) @ v
        found += torch.exp(q @ decoded(k, bits).T / math.sqrt(dim)) @ decoded(v, bits)
    cosine = float(torch.cosine_similarity(found, exact, dim=-1).mean())
    assert least <= cosine
    assert 1 / cosine**2 - 1 == pytest.approx(2 * LLOYD_MAX[bits], rel=0.25)


def decoded(x: Tensor, bits: int) -> Tensor:
    codes, scale = encode(rotate(x), bits)
    return rotate_back(decode(codes, scale, x.shape[-1]))
