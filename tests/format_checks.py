"""One checklist for every packed weight format.

A test file states what is particular to a format (`FormatChecks`' attributes) and reads one weight out of the planes
the slow way, from their documentation (`weight_at`). The checks are the same for all formats. The oracles are gguf-py's
numpy decode, the ggml encoders and decoders of libgguf, and a real checkpoint.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, ClassVar

import gguf
import libgguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma4.quant import quant_tensor
from gemma4.quant.errors import ShapeError
from gemma4.quant.formats import QuantTensor, container_for
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile

Bytes = NDArray[np.uint8]
Planes = Mapping[str, NDArray[Any]]

ENCODED_BLOCKS = Path(__file__).parent / "data" / "encoded_blocks.npz"
EXTREME_SCALES = np.array(
    [0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14, 65504.0, -65504.0, 1.0, -1.0], np.float16
)


class FormatChecks:
    ggml_type: ClassVar[GGMLType]
    container: ClassVar[type[QuantTensor]]
    block: ClassVar[tuple[int, int]]
    """Weights and bytes of a block."""
    float16_at: ClassVar[tuple[int, ...]] = ()
    """Where in a block its float16 numbers stand."""
    bfloat16_at: ClassVar[tuple[int, ...]] = ()
    """Likewise bfloat16 numbers; the upper half of a float32 is one."""
    encoded_rows: ClassVar[int] = 96
    """How many rows of 1024 weights ggml's encoder gets."""
    encoding_error: ClassVar[float] = 0.1
    """What ggml's encoder may lose of normally distributed weights, relative."""
    has_native_decoder: ClassVar[bool] = True
    """Whether libgguf decodes the type."""
    real_tensors: ClassVar[int]
    """How many tensors of the type the real checkpoint holds."""

    def weight_at(self, planes: Planes, n: int, w: int) -> np.float32:
        """Weight w of row n, read from the documentation of the planes."""
        raise NotImplementedError

    # Values

    def test_registered(self) -> None:
        assert container_for(self.ggml_type) is self.container
        assert self.container.ggml_type is self.ggml_type
        assert [field.name for field in fields(self.container)] == list(self.container.planes)

    def test_planes_are_laid_out_as_documented(self) -> None:
        blocks = self._random_blocks(2, 2)
        planes = {name: _to_numpy(plane) for name, plane in self._from_blocks(blocks).planes_dict().items()}
        expected = self._oracle(blocks)
        found = [[self.weight_at(planes, n, w) for w in range(expected.shape[1])] for n in range(2)]
        assert_same_bits(torch.tensor(np.array(found, np.float32)), expected)

    def test_decodes_random_bits_exactly(self) -> None:
        blocks = self._random_blocks(499, -(-2048 // self.block[0]))
        expected = self._oracle(blocks)
        assert expected.size > 10**6
        packed = self._from_blocks(blocks)
        assert packed.shape == expected.shape
        decoded = packed.dequantize()
        assert decoded.isfinite().all()
        assert_same_bits(decoded, expected)
        assert_same_bytes(packed.to_blocks(), blocks)

    def test_decodes_extreme_scales_exactly(self) -> None:
        rows = len(EXTREME_SCALES) ** 2
        blocks = self._random_blocks(rows, 1)
        for order, at in enumerate(self.float16_at):
            scales = np.resize(np.repeat(EXTREME_SCALES, len(EXTREME_SCALES) ** order), rows)
            self._put_number(blocks, at, scales.view(np.uint8).reshape(rows, 2))
        assert_same_bits(self._from_blocks(blocks).dequantize(), self._oracle(blocks))

    def test_nan_and_infinite_scales_stay_visible(self) -> None:
        blocks = self._random_blocks(64, 8)
        by_block = blocks.reshape(64, 8, -1)
        for at in (*self.float16_at, *self.bfloat16_at):
            infinity = (0x00, 0x7C) if self.float16_at else (0x80, 0x7F)
            self._put_number(by_block[0::4], at, np.array((0x81, 0x7F), np.uint8))  # NaN in both types
            self._put_number(by_block[1::4], at, np.array(infinity, np.uint8))
        expected = self._oracle(blocks)
        decoded = self._from_blocks(blocks).dequantize()
        is_nan = np.isnan(expected)
        assert is_nan[0::4].all()
        assert not np.isfinite(expected[1::4]).any()
        assert np.array_equal(decoded.isnan().numpy(), is_nan)
        numbers = torch.where(decoded.isnan(), 0.0, decoded)
        assert_same_bits(numbers, np.where(is_nan, np.float32(0), expected))
        assert_same_bytes(self._from_blocks(blocks).to_blocks(), blocks)

    def test_decodes_what_ggml_encodes(self) -> None:
        weights = np.random.default_rng(1).normal(0, 0.04, (self.encoded_rows, 1024)).astype(np.float32)
        encoded = self._encode(weights)
        blocks = np.ascontiguousarray(encoded).view(np.uint8).reshape(len(weights), -1)
        packed = self._from_blocks(blocks)
        decoded = packed.dequantize()
        assert_same_bits(decoded, self._oracle(blocks))
        if self.block[0] > 1 and self.has_native_decoder:
            native = libgguf.dequantize_rows(encoded, libgguf.GGMLQuantizationType(int(self.ggml_type)), n_per_row=1024)
            assert_same_bits(decoded, native)
        assert np.linalg.norm(decoded.numpy() - weights) < self.encoding_error * np.linalg.norm(weights)
        assert_same_bytes(packed.to_blocks(), blocks)

    def test_decodes_every_tensor_of_a_real_file(self, real_gguf: Path) -> None:
        count = 0
        with GGUFFile.open(real_gguf) as file:
            for name, info in file.tensors.items():
                if info.type != self.ggml_type:
                    continue
                count += 1
                blocks = np.frombuffer(file.data(name), np.uint8).reshape(-1, self._row_bytes(info.shape[-1]))
                packed = self._from_blocks(blocks)
                for start in range(0, blocks.shape[0], 8192):
                    rows = slice(start, start + 8192)
                    assert_same_bits(packed.dequantize(rows), self._oracle(blocks[rows]))
                assert_same_bytes(packed.to_blocks(), blocks)
                del blocks, packed  # the map closes only when no view is left
        assert count == self.real_tensors

    # Rows

    @pytest.mark.parametrize("rows", [0, 1, 3, 7, 33])
    @pytest.mark.parametrize("blocks_in_row", [1, 3])
    def test_any_number_of_rows(self, rows: int, blocks_in_row: int) -> None:
        blocks = self._random_blocks(rows, blocks_in_row)
        packed = self._from_blocks(blocks)
        assert packed.shape == (rows, blocks_in_row * self.block[0])
        assert_same_bytes(packed.to_blocks(), blocks)
        if rows:
            assert_same_bits(packed.dequantize(), self._oracle(blocks))
        else:
            assert packed.dequantize().shape == packed.shape

    def test_rows_written_at_offsets_equal_the_whole(self) -> None:
        blocks = self._random_blocks(33, 3)
        whole = self._from_blocks(blocks)
        packed = self.container.empty(*whole.shape, "cpu")
        for start, stop in ((20, 33), (0, 1), (1, 1), (1, 20)):
            packed.write_rows(start, torch.from_numpy(blocks[start:stop]))
        assert_same_planes(packed, whole)

    def test_blocks_need_not_be_contiguous_nor_aligned(self) -> None:
        blocks = self._random_blocks(7, 3)
        whole = self._from_blocks(blocks)
        width = blocks.shape[1]
        strided = torch.zeros(14, width + 5, dtype=torch.uint8)[::2, 1 : width + 1]
        strided.copy_(torch.from_numpy(blocks))
        shifted = torch.zeros(7 * width + 1, dtype=torch.uint8)[1:].view(7, width)
        shifted.copy_(torch.from_numpy(blocks))
        for source in (strided, shifted):
            assert_same_planes(self.container.from_blocks(source, whole.shape[1]), whole)

    def test_slices_are_views(self) -> None:
        blocks = self._random_blocks(33, 2)
        packed = self._from_blocks(blocks)
        part = packed.slice_rows(5, 12)
        assert_same_bits(part.dequantize(), self._oracle(blocks)[5:12])
        assert_same_bytes(part.to_blocks(), blocks[5:12])
        part.write_rows(0, torch.from_numpy(blocks[:7]))
        assert_same_bytes(packed.slice_rows(5, 12).to_blocks(), blocks[:7])

    def test_concatenated_rows_are_exact(self) -> None:
        blocks = self._random_blocks(33, 2)
        packed = self._from_blocks(blocks)
        parts = [packed.slice_rows(a, b) for a, b in ((0, 7), (7, 8), (8, 8), (8, 33))]
        joined = self.container.concat_rows(parts)
        assert_same_planes(joined, packed)
        assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))

    def test_decodes_chosen_rows_only(self) -> None:
        blocks = self._random_blocks(1000, 2)
        packed, expected = self._from_blocks(blocks), self._oracle(blocks)
        assert_same_bits(packed.dequantize(slice(3, 9)), expected[3:9])
        assert_same_bits(packed.dequantize(slice(None, None, 7)), expected[::7])
        ids = np.array([[5, 999, 5], [0, 1, 2]])
        assert_same_bits(packed.dequantize(torch.from_numpy(ids)), expected[ids])
        assert_same_bits(packed.dequantize(torch.from_numpy(ids[0]).int()), expected[ids[0]])
        assert packed.dequantize(torch.zeros(0, dtype=torch.int64)).shape == (0, packed.shape[1])
        with Allocations(packed) as allocations:
            packed.dequantize(torch.tensor([1, 2]))
        assert allocations.largest <= 2 * packed.shape[1] * 4

    def test_decoding_never_returns_the_planes(self) -> None:
        blocks = self._random_blocks(4, 2)
        packed = self._from_blocks(blocks)
        for rows in (None, slice(0, 4), torch.arange(4)):
            packed.dequantize(rows).fill_(3.0)
        assert_same_bytes(packed.to_blocks(), blocks)

    def test_temporaries_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks = self._random_blocks(400, 4)
        whole = self._from_blocks(blocks)
        slice_bytes = 7 * blocks.shape[1]
        assert quant_tensor.SLICE_BYTES <= 16 << 20
        monkeypatch.setattr(quant_tensor, "SLICE_BYTES", slice_bytes)
        packed = self.container.empty(*whole.shape, "cpu")
        source = torch.from_numpy(blocks)
        with Allocations(packed, source) as allocations:
            packed.write_rows(0, source)
        assert allocations.largest <= slice_bytes
        assert_same_planes(packed, whole)
        with Allocations(packed) as allocations:
            unpacked = packed.to_blocks()
        assert max(sorted(allocations.sizes)[:-1], default=0) <= slice_bytes  # the largest is the result
        assert_same_bytes(unpacked, blocks)
        with Allocations(packed) as allocations:
            decoded = packed.dequantize()
        assert max(sorted(allocations.sizes)[:-1], default=0) <= 7 * packed.shape[1] * 4
        assert_same_bits(decoded, self._oracle(blocks))
        assert_same_bits(packed.dequantize(slice(3, 100)), self._oracle(blocks)[3:100])

    # Places

    def test_meta_and_fake_tensors(self) -> None:
        k = 3 * self.block[0]
        packed = self.container.empty(5, k, "meta")
        assert (packed.shape, packed.device.type) == ((5, k), "meta")
        assert packed.dequantize().shape == (5, k)
        assert packed.to_blocks().shape == (5, self._row_bytes(k))
        with FakeTensorMode():
            fake = self.container.empty(5, k, "cpu")
            fake.write_rows(0, torch.zeros(5, self._row_bytes(k), dtype=torch.uint8))
            assert fake.dequantize().shape == (5, k)

    def test_moves(self) -> None:
        packed = self._from_blocks(self._random_blocks(5, 3))
        same = packed.to("cpu")
        assert all(a is b for a, b in zip(packed.planes_dict().values(), same.planes_dict().values(), strict=True))
        gone = packed.to("meta")
        assert (type(gone), gone.shape, gone.nbytes, gone.device.type) == (
            self.container,
            packed.shape,
            packed.nbytes,
            "meta",
        )

    @pytest.mark.gpu
    def test_on_the_gpu(self) -> None:
        blocks = self._random_blocks(499, 8)
        packed = self._from_blocks(blocks)
        on_gpu = self.container.from_blocks(torch.from_numpy(blocks).cuda(), packed.shape[1])
        assert_same_planes(on_gpu.to("cpu"), packed)
        assert_same_bytes(on_gpu.to_blocks().cpu(), blocks)
        assert_same_bits(on_gpu.dequantize().cpu(), self._oracle(blocks))
        ids = torch.tensor([[498, 0], [7, 7]], device="cuda")
        assert_same_bits(on_gpu.dequantize(ids).cpu(), self._oracle(blocks)[ids.cpu().numpy()])

    def test_copies_and_pickles(self) -> None:
        blocks = self._random_blocks(5, 3)
        packed = self._from_blocks(blocks)
        for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert type(other) is self.container
            assert_same_planes(other, packed)
            other.write_rows(0, torch.from_numpy(blocks[::-1].copy()))
        assert_same_bytes(packed.to_blocks(), blocks)

    def test_exports(self) -> None:
        blocks = self._random_blocks(9, 2)
        packed = self._from_blocks(blocks)
        dynamic = {"ids": {0: torch.export.Dim("tokens", min=2)}}
        program = torch.export.export(_Embedding(packed), (torch.tensor([1, 2, 3]),), dynamic_shapes=dynamic)
        ids = torch.tensor([8, 0, 8, 1, 5])
        assert_same_bits(program.module()(ids), self._oracle(blocks)[ids.numpy()])

    # Refusals

    def test_is_frozen(self) -> None:
        packed = self._from_blocks(self._random_blocks(1, 1))
        name = next(iter(packed.planes_dict()))
        with pytest.raises(FrozenInstanceError):
            setattr(packed, name, getattr(packed, name))
        assert packed == packed
        assert packed != copy.copy(packed)
        assert packed.nbytes == sum(plane.numel() * plane.element_size() for plane in packed.planes_dict().values())

    def test_refuses_wrong_k(self) -> None:
        for k in {0, -self.block[0], *({self.block[0] - 1, self.block[0] + 16} if self.block[0] > 1 else ())}:
            with refuses(self.container.__name__, str(k)):
                self.container.empty(2, k, "cpu")
            with refuses(self.container.__name__, str(k)):
                self.container.from_blocks(torch.zeros(2, 64, dtype=torch.uint8), k)
        with refuses(self.container.__name__, "-1"):
            self.container.empty(-1, self.block[0], "cpu")

    def test_refuses_wrong_blocks(self) -> None:
        weights, width = self.block
        packed = self.container.empty(4, weights, "cpu")
        for blocks in (
            torch.zeros(4, width + 1, dtype=torch.uint8),
            torch.zeros(4, width - 1, dtype=torch.uint8),
            torch.zeros(4, width, dtype=torch.int8),
            torch.zeros(4 * width, dtype=torch.uint8),
            torch.zeros(2, 2, width, dtype=torch.uint8),
        ):
            with refuses(f"{self.container.__name__}.blocks", f"uint8 [rows, {width}]", str(list(blocks.shape))):
                packed.write_rows(0, blocks)
            with refuses(f"{self.container.__name__}.blocks", str(blocks.dtype)):
                self.container.from_blocks(blocks, weights)
        good = torch.zeros(2, width, dtype=torch.uint8)
        for start in (-1, 3, 4):
            with refuses(f"{self.container.__name__}.blocks", "[0, 4)", f"[{start}, {start + 2})"):
                packed.write_rows(start, good)
        with refuses(f"{self.container.__name__}.blocks", "cpu", "meta"):
            packed.write_rows(0, good.to("meta"))

    def test_refuses_wrong_planes(self) -> None:
        packed = self._from_blocks(self._random_blocks(4, 2))
        planes = packed.planes_dict()
        for name, plane in planes.items():
            field = f"{self.container.__name__}.{name}"
            other_dtype = torch.float64 if plane.is_floating_point() else torch.int64
            with refuses(self.container.__name__, name):
                self.container.from_planes({key: value for key, value in planes.items() if key != name})
            with refuses(field, str(plane.dtype), str(other_dtype)):
                self.container.from_planes(planes | {name: plane.to(other_dtype)})
            with refuses(field, "contiguous", "strides"):
                self.container.from_planes(planes | {name: plane.repeat_interleave(2, dim=-1)[..., ::2]})
            with refuses(field, "tensor", "list"):
                self.container.from_planes(planes | {name: plane.tolist()})  # type: ignore[dict-item]
            with refuses(field, "two dimensions" if plane is next(iter(planes.values())) else str(list(plane.shape))):
                self.container.from_planes(planes | {name: plane[None]})
            if len(planes) > 1:
                with refuses(f"{self.container.__name__}.", "[3, ", "[4, "):
                    self.container.from_planes(planes | {name: plane[:3].contiguous()})
                with refuses(f"{self.container.__name__}.", "meta", "cpu"):
                    self.container.from_planes(planes | {name: plane.to("meta")})
        with refuses(self.container.__name__, "extra"):
            self.container.from_planes(planes | {"extra": next(iter(planes.values()))})

    def test_refuses_wrong_rows(self) -> None:
        packed = self._from_blocks(self._random_blocks(4, 2))
        for start, stop in ((-1, 2), (0, 5), (3, 2)):
            with refuses(f"{self.container.__name__}.rows", "[0, 4)", f"[{start}, {stop})"):
                packed.slice_rows(start, stop)
        for ids in (torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.uint8), torch.ones(4)):
            with refuses(f"{self.container.__name__}.rows", "int32 or int64", str(ids.dtype)):
                packed.dequantize(ids)
        with refuses(self.container.__name__, "none"):
            self.container.concat_rows([])
        with refuses(self.container.__name__, f"K = {self.block[0]}"):
            self.container.concat_rows([packed, self._from_blocks(self._random_blocks(4, 1))])
        with refuses(self.container.__name__, "meta"):
            self.container.concat_rows([packed, packed.to("meta")])
        other = container_for(GGMLType.F16 if self.ggml_type == GGMLType.F32 else GGMLType.F32)
        with refuses(self.container.__name__, other.__name__):
            self.container.concat_rows([packed, other.empty(4, packed.shape[1], "cpu")])  # type: ignore[list-item]

    # Material

    def _random_blocks(self, rows: int, blocks_in_row: int) -> Bytes:
        """Random bits, with finite numbers where numbers stand: a third of them subnormal, half negative."""
        rng = np.random.default_rng(rows * 1000 + blocks_in_row)
        blocks = rng.integers(0, 256, (rows, blocks_in_row, self.block[1]), np.uint8)
        for at in (*self.float16_at, *self.bfloat16_at):
            number = rng.integers(0, 256, (rows, blocks_in_row, 2), np.uint8)
            low, high = number[..., 0], number[..., 1]
            exponent = 0x7C if at in self.float16_at else 0x7F
            high[(high & exponent) == exponent] &= 0xBF
            subnormal = rng.random(high.shape) < 1 / 3
            high[subnormal] &= ~np.uint8(exponent)
            if at in self.bfloat16_at:
                low[subnormal] &= 0x7F
            self._put_number(blocks, at, number)
        return blocks.reshape(rows, blocks_in_row * self.block[1])

    def _encode(self, weights: NDArray[np.float32]) -> Any:
        return libgguf.quantize_rows(weights, libgguf.GGMLQuantizationType(int(self.ggml_type)))

    def _put_number(self, blocks: Bytes, at: int, number: Bytes) -> None:
        """Puts the two bytes of a number [..., 2] where it stands in blocks [..., bytes]."""
        blocks[..., at : at + 2] = number

    def _from_blocks(self, blocks: Bytes) -> QuantTensor:
        k = blocks.shape[1] // self.block[1] * self.block[0]
        return self.container.from_blocks(torch.from_numpy(blocks.copy()), k)

    def _oracle(self, blocks: Bytes) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(self.ggml_type)))

    def _row_bytes(self, k: int) -> int:
        return k // self.block[0] * self.block[1]


class BlockChecks(FormatChecks):
    """The checklist of a type without a kernel: its one plane is the blocks of the file."""

    real_tensors = 0

    def test_planes_are_laid_out_as_documented(self) -> None:
        source = torch.from_numpy(self._random_blocks(5, 3))
        packed = self.container.from_blocks(source, 3 * self.block[0])
        (plane,) = packed.planes_dict().values()
        assert_same_bytes(plane, source.numpy())
        assert plane.data_ptr() != source.data_ptr()

    def test_refuses_partial_blocks(self) -> None:
        for width in (0, self.block[1] - 1, self.block[1] + 1):
            with refuses(self.container.__name__):
                self.container.from_planes({"blocks": torch.zeros(2, width, dtype=torch.uint8)})


class RecordedChecks(BlockChecks):
    """The same for a type whose encoder in ggml takes many seconds to start: its blocks are in tests/data."""

    encoded_rows = 4

    def _encode(self, weights: NDArray[np.float32]) -> Any:
        with np.load(ENCODED_BLOCKS) as recorded:
            assert np.array_equal(recorded["weights"], weights)
            return recorded[self.ggml_type.name]


class Allocations(TorchDispatchMode):
    """Records the bytes of every storage that torch operations make, those of the given tensors aside."""

    def __init__(self, *known: QuantTensor | Tensor) -> None:
        super().__init__()
        tensors = [t for k in known for t in (k.planes_dict().values() if isinstance(k, QuantTensor) else [k])]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._alive: list[Tensor] = []
        self.sizes: list[int] = []

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._seen:
                self._seen.add(tensor.untyped_storage().data_ptr())
                self._alive.append(tensor)
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


class _Embedding(torch.nn.Module):
    def __init__(self, packed: QuantTensor) -> None:
        super().__init__()
        self.container = type(packed)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(plane, requires_grad=False) for plane in packed.planes_dict().values()
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.container.decode(*[plane[ids] for plane in self.weights])


# Readers of one weight, from the documentation of the planes


def k_quant_place(w: int) -> tuple[int, int, int]:
    """(chunk, byte in the chunk, 1 for the high nibble) of weight w in the K-quant nibble order."""
    unit, rest = divmod(w, 64)
    is_high, b = divmod(rest, 32)
    return 2 * unit + b // 16, b % 16, is_high


def legacy_place(w: int) -> tuple[int, int, int]:
    """(chunk, byte in the chunk, 1 for the high nibble) of weight w in the legacy nibble order."""
    chunk, rest = divmod(w, 32)
    is_high, b = divmod(rest, 16)
    return chunk, b, is_high


def nibble(planes: Planes, n: int, place: tuple[int, int, int]) -> int:
    chunk, byte, is_high = place
    return int(planes["qs"][n, 16 * chunk + byte]) >> 4 * is_high & 15


def fifth_bit(planes: Planes, n: int, place: tuple[int, int, int]) -> int:
    chunk, byte, is_high = place
    r, i = divmod(byte, 4)
    return int(planes["qh"][n, chunk]) >> 8 * i + 4 * is_high + r & 1


def top_bits(planes: Planes, n: int, place: tuple[int, int, int]) -> int:
    chunk, byte, is_high = place
    r, i = divmod(byte, 4)
    return int(planes["qh"][n, chunk, is_high]) >> 8 * i + 2 * r & 3


def scale_and_min(planes: Planes, n: int, w: int, q: int) -> np.float32:
    unit, rest = divmod(w, 64)
    d, dmin = planes["dm"][n, w // 256].astype(np.float32)
    sc, m = planes["codes"][n, unit, [rest // 32, 2 + rest // 32]].astype(np.float32)
    return np.float32(np.float32(np.float32(d * sc) * np.float32(q)) - np.float32(dmin * m))


def _to_numpy(plane: Tensor) -> NDArray[Any]:
    """The plane; bfloat16, which numpy lacks, as the uint16 of its bits."""
    return (plane.view(torch.uint16) if plane.dtype == torch.bfloat16 else plane).numpy()


# Comparisons


def refuses(field: str, *parts: str) -> Any:
    """A ShapeError that names `field` and says all of `parts`, as a context manager."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(ShapeError, match=f"(?s)^{re.escape(field)}{pattern}")


def assert_same_bits(found: Tensor, expected: NDArray[np.float32]) -> None:
    """Bitwise equal float32, signs of zeros included."""
    assert found.dtype == torch.float32
    assert tuple(found.shape) == expected.shape
    differing = np.flatnonzero(
        found.contiguous().numpy().view(np.int32) != np.ascontiguousarray(expected).view(np.int32)
    )
    if differing.size:
        first = differing[0]
        raise AssertionError(
            f"{differing.size} of {expected.size} differ, first at {first}: "
            f"found {found.flatten()[first].item()!r}, expected {expected.ravel()[first]!r}"
        )


def assert_same_bytes(found: Tensor, expected: Bytes) -> None:
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), expected)


def assert_same_planes(found: QuantTensor, expected: QuantTensor) -> None:
    assert type(found) is type(expected)
    for name, plane in expected.planes_dict().items():
        # As bytes, so that NaN equals itself.
        assert torch.equal(getattr(found, name).view(torch.uint8), plane.view(torch.uint8)), name
