"""Speed of the packed kernels on one GPU: python benchmarks/kernels.py

Weights come from sets that together exceed any L2 cache, in turn, inside one CUDA graph, each kernel launched as in a
decode step: where the card can, before the one in front of it has ended. Every result is first compared with float64; a
kernel that is wrong prints no speed. TB/s counts the bytes of the weight alone and is set against a device-to-device
copy measured in the same run. The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma4.kernels import linear  # noqa: F401  registers gemma4::*_linear and the matvecs
from gemma4.kernels.activations import quantize_activations
from gemma4.kernels.packed_planes import PACKED_FORMATS, Plane

ROTATED_BYTES = 300 << 20
CHECKED_ROWS = 2048
# Gemma 4 31B Q4_K_M as it runs: gate|up, down, q|k|v, q|k beside a Q6_K v, q|k of full layers, o, v, down, head.
GATE_UP, DOWN = ("q4_k", 43008, 5376), ("q4_k", 5376, 21504)
SHAPES = [
    GATE_UP,
    DOWN,
    ("q4_k", 16384, 5376),
    ("q4_k", 12288, 5376),
    ("q4_k", 18432, 5376),
    ("q4_k", 5376, 8192),
    ("q4_k", 5376, 16384),
    ("q6_k", 4096, 5376),
    ("q6_k", 5376, 21504),
    ("q6_k", 262144, 5376),
]
# What the same projections are where a file's types do not let them join.
APART = [("q4_k", n, 5376) for n in (8192, 4096, 2048)]
OTHER_FORMATS = ("q5_k", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1")


@dataclass(frozen=True)
class Row:
    """One line of the table. error: relative, against float64 with the weights and activations as stored."""

    op: str
    m: int
    n: int
    k: int
    error: float
    is_right: bool
    microseconds: float | None = None
    terabytes_per_second: float | None = None
    share_of_copy: float | None = None
    teraflops: float | None = None

    def __str__(self) -> str:
        name = f"{self.op:<12} M={self.m:<5} {self.n:>6} x {self.k:<6} error {self.error:.1e}"
        if not self.is_right:
            return f"{name}  WRONG"
        rate = f"{self.terabytes_per_second:.2f} TB/s  {self.share_of_copy:.1%} of copy"
        if self.teraflops is not None:
            rate = f"{self.teraflops:.0f} TFLOP/s"
        return f"{name}  {self.microseconds:8.2f} us  {rate}"


def graph_microseconds(calls: list[Callable[[], Any]], repeats: int = 9) -> float:
    """Median time of one call, over replays of a CUDA graph of all calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_terabytes_per_second() -> float:
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times) * 1e-12


def random_planes(name: str, n: int, k: int) -> tuple[Tensor, ...]:
    def plane(spec: Plane) -> Tensor:
        shape = (n, k // spec.weights, *spec.trailing)
        if spec.dtype == torch.float16:
            return torch.randn(shape, device="cuda").mul_(1e-3).half()
        if spec.dtype == torch.int32:
            return torch.randint(-(2**31), 2**31 - 1, shape, dtype=spec.dtype, device="cuda")
        low, high = {"codes": (0, 64), "scales": (-128, 128)}.get(spec.name, (0, 256))
        if spec.name == "qs" and spec.dtype == torch.int8:
            low, high = -128, 128
        return torch.randint(low, high, shape, dtype=spec.dtype, device="cuda")

    return tuple(plane(spec) for spec in PACKED_FORMATS[name].planes)


def relative_error(y: Tensor, x: Tensor, name: str, planes: tuple[Tensor, ...]) -> float:
    """Of the first rows of W, against the exact decode in float64."""
    rows = tuple(plane[:CHECKED_ROWS] for plane in planes)
    exact = x.double() @ PACKED_FORMATS[name].dequantize(*rows).double().T
    return float((y[:, :CHECKED_ROWS].double() - exact).norm() / exact.norm())


def weight_sets(name: str, n: int, k: int) -> tuple[list[tuple[Tensor, ...]], int]:
    first = random_planes(name, n, k)
    size = sum(plane.nbytes for plane in first)
    return [first] + [random_planes(name, n, k) for _ in range(max(1, -(-ROTATED_BYTES // size)))], size


def matvec_row(name: str, m: int, n: int, k: int, copy: float) -> Row:
    sets, size = weight_sets(name, n, k)
    x = torch.randn(m, k, device="cuda").bfloat16()
    activations = quantize_activations(x)
    op = getattr(torch.ops.gemma4, f"{name}_matvec")
    error = relative_error(op(*activations, *sets[0], out_dtype=torch.float32), x, name, sets[0])
    if not error < 1e-4:
        return Row(f"{name}_matvec", m, n, k, error, is_right=False)
    time = graph_microseconds([partial(op, *activations, *planes) for planes in sets])
    speed = size / time * 1e-6
    return Row(f"{name}_matvec", m, n, k, error, True, time, speed, speed / copy)


def linear_row(name: str, m: int, n: int, k: int) -> Row:
    sets, _ = weight_sets(name, n, k)
    x = torch.randn(m, k, device="cuda").bfloat16()
    op = getattr(torch.ops.gemma4, f"{name}_linear")
    error = relative_error(op(x, *sets[0]), x, name, sets[0])
    if not error < 1e-2:
        return Row(f"{name}_linear", m, n, k, error, is_right=False)
    time = graph_microseconds([partial(op, x, *planes) for planes in sets[:3]])
    return Row(f"{name}_linear", m, n, k, error, True, time, teraflops=2 * m * n * k / time * 1e-6)


def main() -> int:
    torch.manual_seed(0)
    copy = copy_terabytes_per_second()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.2f} TB/s")
    decode = [(name, 1, n, k) for name, n, k in SHAPES + APART] + [(name, 1, 8192, 5376) for name in OTHER_FORMATS]
    decode += [(name, m, n, k) for m in range(2, 9) for name, n, k in (GATE_UP, DOWN)]
    measures = [partial(matvec_row, *case, copy) for case in decode]
    measures += [partial(linear_row, name, m, n, k) for m in (512, 2048) for name, n, k in (GATE_UP, DOWN)]
    rows = []
    for measure in measures:
        rows.append(measure())
        print(rows[-1], flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy": copy, "rows": [asdict(row) for row in rows]}))
    return 0 if all(row.is_right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
