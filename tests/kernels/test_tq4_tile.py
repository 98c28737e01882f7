"""The PTX that turns codes into levels, run instruction by instruction on the host."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from gemma4.kernels import tq4_tile
from gemma4.kernels.tq4_tile import curve_bits
from gemma4.kernels.turboquant import codebook, decode


def halves(word: int) -> np.ndarray:
    return np.array([word & 0xFFFF, word >> 16], np.uint16).view(np.float16).astype(np.float64)


def word_of(values: np.ndarray) -> int:
    low, high = values.astype(np.float16).view(np.uint16).tolist()
    return int(low | high << 16)


def run(ptx: str, registers: dict[str, int]) -> dict[str, int]:
    """The registers after a straight-line program; float16 results are rounded once, as the hardware does."""
    for line in filter(None, (part.strip() for part in ptx.strip("{} ").split(";"))):
        if line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        target, *names = (x.strip() for x in rest.split(","))
        values = [registers[x] if x in registers else int(x, 0) for x in names]
        match name:
            case "mov.b32":
                result = values[0]
            case "shl.b32":
                result = values[0] << values[1]
            case "shr.b32":
                result = values[0] >> values[1]
            case "lop3.b32":
                assert values[3] == 0xEA
                result = values[0] & values[1] | values[2]
            case "prmt.b32":
                source = values[0] | values[1] << 32
                result = sum((source >> 8 * (values[2] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
            case "fma.rn.f16x2":
                result = word_of(halves(values[0]) * halves(values[1]) + halves(values[2]))
            case "mul.rn.f16x2":
                result = word_of(halves(values[0]) * halves(values[1]))
            case _:
                pytest.fail(f"no rule for {line}")
        registers[target] = result & 0xFFFFFFFF
    return registers


@pytest.mark.parametrize("bits", [4, 6])
def test_levels_of_random_bytes(bits: int) -> None:
    dim = 512
    p, q = curve_bits(dim, bits)
    body = (tq4_tile._BODY_4 if bits == 4 else tq4_tile._BODY_6).value
    program = f"{tq4_tile._HEAD.value}mov.b32 p, {p}; mov.b32 q, {q}; {body}"
    assert set(re.findall(r"\$\d+", program)) == {f"${i}" for i in range(11 if bits == 6 else 10)}
    codes = torch.randint(256, (64 * bits // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    # Quarters of 16 coordinates, in the layout of heads of 64; the codebook is that of 512.
    expected = decode(codes, torch.tensor(1.0), 64) * codebook(64, bits).gain
    order = torch.tensor(codebook(64, bits).levels(bits))
    index = (expected[:, None] - order).abs().argmin(-1)
    levels = torch.tensor(codebook(dim, bits).levels(bits))[index] / codebook(dim, bits).gain
    words = codes.numpy().view(np.uint32).tolist()
    for group in range(4):
        inputs = {f"${8 + i}": words[4 * i + group] for i in range(bits // 2)}
        after = run(program, inputs)
        for quarter in range(4):
            found = np.concatenate([halves(after[f"${2 * quarter + pair}"]) for pair in range(2)])
            start = 16 * quarter + 4 * group
            np.testing.assert_allclose(found, levels[start : start + 4].numpy(), rtol=3e-3)
