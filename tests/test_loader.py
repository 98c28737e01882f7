"""Loading on a CPU: which weights a model gets, how much memory that takes, and what happens to files that change."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma4 import Gemma4
from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.model import TextModel
from gemma4.quant.errors import MissingTensorError, ShapeError
from gemma4.quant.formats import container_for
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.loader import load_weights
from gemma4.quant.plan import LoadEntry, LoadPlan
from gemma4.quant.quant_tensor import QuantTensor
from tests.anonymous_memory import Meter
from tests.tiny_gguf import GEMMA4_31B, Model, gemma4, q4_k_m

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IDS = [3, 141, 59, 26, 53]
MIB = 1 << 20
TYPES = {
    "matrix": "Q4_K",
    "token_embd": "Q6_K",
    "attn_q": "Q5_K",
    "attn_k": "Q4_0",
    "attn_v": "Q8_0",
    "attn_output": "BF16",
    "ffn_down": "Q5_0",
    "blk.1.ffn_up": "Q5_1",
    "blk.2.ffn_gate": "Q4_1",
    "blk.3.ffn_gate": "F16",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma4(types=TYPES).write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the shapes of the 31B, Q4_K and Q6_K, 614 MB of random blocks."""
    sizes = replace(GEMMA4_31B, layers=2, period=2, vocab=2048)
    return write_random(gemma4(sizes, q4_k_m(sizes)), tmp_path_factory.mktemp("large") / "large.gguf")


def write_random(model: Model, path: Path) -> Path:
    """A file with blocks from one small pool of random bytes; `values` of the model are kept."""
    model.write_sparse(path)
    pool, size = np.random.default_rng(0).bytes(MIB), path.stat().st_size
    with GGUFFile.open(path) as gguf, path.open("r+b") as file:
        file.seek(min(tensor.offset for tensor in gguf.tensors.values()))
        while file.tell() < size:
            file.write(pool[: size - file.tell()])
        for name in model.values:
            file.seek(gguf.tensors[name].offset)
            file.write(model.encoded(name).tobytes())
    return path


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest of b."""
    return float((a - b).abs().max() / b.abs().max())


# Memory

LOAD = """
import ctypes, json, sys
import torch
from gemma4 import Gemma4
from tests.anonymous_memory import Meter
torch.set_num_threads(1)
cases, warm_up = json.loads(sys.argv[1]), sys.argv[2]
for path, options in cases:
    Gemma4.from_gguf(warm_up, device="cpu", **options)
    ctypes.CDLL(None).malloc_trim(0)  # so that memory of the load before counts for none
    with Meter() as meter:
        model = Gemma4.from_gguf(path, device="cpu", **options)
    sizes = [entry.file_bytes for entry in model.plan.entries]
    held = sum(parameter.nbytes for parameter in model.model.parameters())
    print(json.dumps({"peak": meter.peak_bytes, "held": held, "largest": max(sizes), "file": sum(sizes)}))
    del model
"""


def test_memory_stays_below_weights_and_largest_tensor(large: Path, real_gguf: Path, tiny: Path) -> None:
    cases = json.dumps([(str(real_gguf), {}), (str(large), {}), (str(real_gguf), {"dequantize": True})])
    done = subprocess.run([sys.executable, "-c", LOAD, cases, str(tiny)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packed_real, packed_large, dense = (json.loads(line) for line in done.stdout.splitlines())
    allowance = 32 * MIB  # the header with its vocabulary, slices, malloc
    for found in (packed_real, packed_large):
        assert found["peak"] < found["held"] + found["largest"] + allowance
        assert found["held"] < 1.03 * found["file"] + 4096  # planes spend 0.125 bits more on a Q4_K weight than blocks
    for found, more in ((packed_real, 2), (packed_large, 2), (dense, 4)):
        # What is unpacked goes through slices, not whole tensors.
        assert found["peak"] < found["held"] + more * allowance
        assert found["peak"] > 0.9 * found["held"], "the meter saw the weights"
    assert dense["held"] > 4 * dense["file"]


# Progress


@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"dequantize": True}])
def test_progress_adds_up_to_the_file(tiny: Path, options: dict[str, bool]) -> None:
    with GGUFFile.open(tiny) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config, fuse=options.get("fuse", True))
        if options.get("dequantize"):
            plan = plan.dense(GGMLType.F32)
        done: list[int] = []
        load_weights(TextModel(config, plan, torch.float32, CPU), plan, file, CPU, done.append)
        outside = sum(file.tensors[name].nbytes for name in plan.in_config)
        assert sum(done) == sum(entry.file_bytes for entry in plan.entries)
        assert sum(done) == sum(tensor.nbytes for tensor in file.tensors.values()) - outside
        assert min(done) > 0
        assert len(done) >= len(plan.entries)


def test_progress_is_steady_within_a_large_tensor(real_gguf: Path) -> None:
    with GGUFFile.open(real_gguf) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
        done: list[int] = []
        load_weights(TextModel(config, plan, torch.float32, CPU), plan, file, CPU, done.append)
    assert sum(done) == sum(entry.file_bytes for entry in plan.entries)
    assert max(done) <= 32 * MIB < max(entry.file_bytes for entry in plan.entries)


# Which weights


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_no_weight_stays_on_the_meta_device(tmp_path: Path, fuse: bool, tied: bool) -> None:
    path = gemma4(types=TYPES, tied=tied, layers=2).write(tmp_path / "model.gguf")
    model = Gemma4.from_gguf(path, device="cpu", fuse=fuse).model
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert len(tensors) > 20
    for name, tensor in tensors:
        assert tensor.device == CPU, name
        assert not tensor.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weights_are_the_exact_ones_rounded_once(tiny: Path, dtype: torch.dtype) -> None:
    dense = Gemma4.from_gguf(tiny, device="cpu", dtype=dtype, dequantize=True)
    with GGUFFile.open(tiny) as file:
        for tensor in file.tensors.values():
            if len(tensor.shape) < 2:
                continue
            blocks = torch.frombuffer(file.data(tensor.name), dtype=torch.uint8).view(tensor.shape[0], -1)
            exact = container_for(tensor.type).from_blocks(blocks, tensor.shape[1]).dequantize()
            (held,) = dense.weight(tensor.name).planes_dict().values()
            assert held.dtype == dtype
            assert torch.equal(held, exact.to(dtype)), tensor.name


def test_dense_and_packed_weights_give_the_same_logits(tiny: Path) -> None:
    packed = Gemma4.from_gguf(tiny, device="cpu")
    dense = Gemma4.from_gguf(tiny, device="cpu", dequantize=True)
    assert largest_difference(dense.logits(IDS), packed.logits(IDS)) < 1e-6


@pytest.mark.parametrize("types", [TYPES, {"matrix": "Q4_K"}])
def test_fusing_changes_nothing_but_the_shape_of_the_weights(tmp_path: Path, types: dict[str, str]) -> None:
    path = gemma4(types=types).write(tmp_path / "model.gguf")
    fused = Gemma4.from_gguf(path, device="cpu", fuse=True)
    plain = Gemma4.from_gguf(path, device="cpu", fuse=False)
    assert len(fused.plan.entries) < len(plain.plan.entries)
    assert all(len(entry.parts) == 1 for entry in plain.plan.entries)
    assert largest_difference(fused.logits(IDS), plain.logits(IDS)) < 1e-6
    for layer in range(4):
        for role in ("gate", "up"):
            name = f"blk.{layer}.ffn_{role}.weight"
            assert torch.equal(fused.weight(name).to_blocks(), plain.weight(name).to_blocks()), name


def test_bfloat16_on_a_cpu(tiny: Path) -> None:
    exact = Gemma4.from_gguf(tiny, device="cpu").logits(IDS)
    for dequantize in (False, True):
        half = Gemma4.from_gguf(tiny, device="cpu", dtype=torch.bfloat16, dequantize=dequantize)
        found = half.logits(IDS)
        assert found.dtype == torch.float32
        assert 1e-4 < largest_difference(found, exact) < 0.05
        assert len(half.generate_ids(IDS, 20)) == 20


def test_other_dtypes_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype: found torch.float16, expected torch.float32 or torch.bfloat16"):
        Gemma4.from_gguf(tiny, device="cpu", dtype=torch.float16)


def test_two_models_at_once(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        model = gemma4(types=TYPES, layers=2)
        model.seed = seed
        paths.append(model.write(tmp_path / f"{seed}.gguf"))
    alone = [Gemma4.from_gguf(path, device="cpu").logits(IDS) for path in paths]
    assert not torch.equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as pool:
        for path, model in zip(
            paths * 4, pool.map(lambda p: Gemma4.from_gguf(p, device="cpu"), paths * 4), strict=True
        ):
            assert torch.equal(model.logits(IDS), alone[paths.index(path)])


def test_the_file_may_be_deleted_after_loading(tmp_path: Path) -> None:
    path = gemma4(types=TYPES, layers=2).write(tmp_path / "model.gguf")
    model = Gemma4.from_gguf(path, device="cpu")
    logits = model.logits(IDS)
    path.write_bytes(b"")
    path.unlink()
    assert torch.equal(model.logits(IDS), logits)


# Files that change while they are read

CUT = """
import json, os, sys
import torch
from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.model import TextModel
from gemma4.quant.errors import TruncatedError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.loader import load_weights

def load(path, cut, after):
    file = GGUFFile.open(path)
    config = Gemma4Config.from_gguf(file)
    plan = plan_load(file, config)
    calls = 0
    def progress(_):
        nonlocal calls
        calls += 1
        if calls == after:
            os.truncate(cut, 4096)
    cpu = torch.device("cpu")
    try:
        load_weights(TextModel(config, plan, torch.float32, cpu), plan, file, cpu, progress)
    except TruncatedError as error:
        print(error)

for case in json.loads(sys.argv[1]):
    load(*case)
"""


def test_a_file_cut_while_loading_is_an_error_and_no_signal(tmp_path: Path) -> None:
    model = gemma4(types=TYPES)
    cases = []
    for after in (1, 20, 45):
        path = model.write(tmp_path / f"{after}.gguf")
        cases.append((path, path, after))
    first = model.write(tmp_path / "split.gguf", split_tensors=20)
    cases.append((first, first.with_name(first.name.replace("00001", "00003")), 45))
    arguments = json.dumps([(str(path), str(cut), after) for path, cut, after in cases])
    done = subprocess.run([sys.executable, "-c", CUT, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, (_, cut, _) in zip(done.stdout.splitlines(), cases, strict=True):
        assert line.startswith(f"{cut}: ")
        assert "was cut to 4096 bytes while open" in line


# Plans that do not fit the model


def load_with(path: Path, plan_of_model: LoadPlan | None = None, **changes: Any) -> None:
    """Loads a model built by the file's plan with that plan changed: `changes` of its first packed q_proj."""
    with GGUFFile.open(path) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
        model = TextModel(config, plan_of_model or plan, torch.float32, CPU)
        load_weights(model, changed(plan, **changes), file, CPU)


def changed(plan: LoadPlan, target: str = "layers.0.self_attn.q_proj.weight", **changes: Any) -> LoadPlan:
    def change(entry: LoadEntry) -> LoadEntry:
        return replace(entry, **changes) if entry.target == target else entry

    return replace(plan, entries=tuple(map(change, plan.entries)))


def test_a_plan_of_another_type_or_shape(tiny: Path) -> None:
    name = "layers.0.self_attn.q_proj.weight"
    for changes in ({"type": GGMLType.F32}, {"shape": (256, 256)}, {"shape": (1024, 256)}):
        with pytest.raises(ShapeError) as caught:
            load_with(tiny, **changes)
        assert caught.value.field == name
        assert caught.value.path == tiny
    with pytest.raises(ShapeError) as caught:
        load_with(tiny, target="norm.weight", shape=(128,))
    assert caught.value.field == "norm.weight"


def test_a_dense_plan_for_a_packed_model(tiny: Path) -> None:
    with GGUFFile.open(tiny) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
        model = TextModel(config, plan, torch.float32, CPU)
        with pytest.raises(ShapeError, match=r"layers\.0\.mlp\.gate_up_proj\.weight"):
            load_weights(model, plan.dense(GGMLType.BF16), file, CPU)


def test_a_plan_of_another_file(tiny: Path, tmp_path: Path) -> None:
    other = gemma4(types=TYPES, layers=2)
    other.rename("blk.1.ffn_down.weight", "blk.1.ffn_other.weight")
    with GGUFFile.open(other.write(tmp_path / "other.gguf")) as file, GGUFFile.open(tiny) as planned:
        config = Gemma4Config.from_gguf(planned)
        plan = plan_load(planned, config)
        with pytest.raises(MissingTensorError) as caught:
            load_weights(TextModel(config, plan, torch.float32, CPU), plan, file, CPU)
        assert caught.value.path == file.path


def test_weights_are_named_by_the_file(tiny: Path) -> None:
    model = Gemma4.from_gguf(tiny, device="cpu")
    weight = model.weight("blk.0.ffn_up.weight")
    assert isinstance(weight, QuantTensor)
    assert weight.shape == (768, 256)
    assert next(iter(weight.planes_dict().values())).untyped_storage().data_ptr() == (
        next(iter(model.weight("blk.0.ffn_gate.weight").planes_dict().values())).untyped_storage().data_ptr()
    )
    with pytest.raises(KeyError):
        model.weight("blk.9.ffn_up.weight")


@pytest.mark.gpu
def test_host_memory_of_loading_to_a_gpu(large: Path) -> None:
    with Meter() as meter:
        model = Gemma4.from_gguf(large, device="cuda")
    assert model.device.type == "cuda"
    assert meter.peak_bytes < 3 << 29  # 1.5 GiB, what CUDA itself takes included


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_loading_inside_inference_mode(tiny: Path, device: str) -> None:
    with torch.inference_mode():
        model = Gemma4.from_gguf(tiny, device=device)
    assert not any(plane.is_inference() for plane in model.model.embed_tokens.weight.planes)
    assert len(model.generate_ids([1, 2, 3], 4)) == 4
