"""The per-layer embeddings of E2B and E4B in host memory: off the GPU's books, with equal results."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4
from gemma4.config import Gemma4Config
from gemma4.mapping import PER_LAYER_TABLE, plan_load
from gemma4.memory_plan import MemoryModel, weight_planes
from gemma4.model import TextModel
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.packed_weight import PackedWeight
from tests.family_gguf import with_per_layer_inputs
from tests.tiny_gguf import Sizes

SIZES = Sizes(4, 256, 256, 8, (2, 2), (32, 64), vocab=320, window=16, context=512, period=2, k_eq_v=False)
IDS = [3, 1, 2, 319, 0, 17]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = with_per_layer_inputs(SIZES, 2, 256, keeps_unused=True)
    return model.write(tmp_path_factory.mktemp("host") / "e4b.gguf")


def test_the_table_is_not_on_the_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[int] = []

    def empty_in_host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        requested.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr("gemma4.quant.packed_weight.empty_in_host_memory", empty_in_host_memory)
    with GGUFFile.open(path) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
    on_host = plan.with_host_memory(PER_LAYER_TABLE)
    (table,) = [entry for entry in on_host.entries if entry.in_host_memory]
    assert table.target == PER_LAYER_TABLE
    model = TextModel(config, on_host, torch.bfloat16, torch.device("cpu"))
    weights = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    assert [name for name, weight in weights.items() if weight.in_host_memory] == [PER_LAYER_TABLE]
    weights[PER_LAYER_TABLE].allocate("cuda")
    assert sum(requested) == table.file_bytes == sum(weight_planes(table))
    with_table, without = (MemoryModel(config, p).at(64).weight_bytes for p in (plan, on_host))
    assert with_table - without == table.file_bytes


def test_on_a_cpu_nothing_changes(path: Path, tmp_path: Path) -> None:
    on_host = Gemma4.from_gguf(path, device="cpu", per_layer_table="host")
    logits = on_host.logits(IDS)
    assert torch.equal(logits, Gemma4.from_gguf(path, device="cpu").logits(IDS))
    on_host.save_packed(tmp_path / "saved.safetensors")
    assert torch.equal(Gemma4.from_packed(tmp_path / "saved.safetensors", device="cpu").logits(IDS), logits)


@pytest.mark.gpu
def test_on_a_gpu(path: Path, tmp_path: Path) -> None:
    def load(where: str) -> tuple[Gemma4, int]:
        gc.collect()  # models of earlier tests
        before = torch.cuda.memory_allocated()
        model = Gemma4.from_gguf(path, device="cuda", per_layer_table=where)  # type: ignore[arg-type]
        gc.collect()  # what loading left, so that weights alone are counted
        return model, torch.cuda.memory_allocated() - before

    (on_device, more), (on_host, less) = load("device"), load("host")
    table = on_host.plan.by_target()[PER_LAYER_TABLE].file_bytes
    assert abs(more - less - table) < 4096
    assert torch.equal(on_host.logits(IDS), on_device.logits(IDS))
    # Decoding replays a CUDA graph, which holds the address of the table.
    assert on_host.generate_ids(IDS, 12) == on_device.generate_ids(IDS, 12)
    on_host.save_packed(tmp_path / "saved.safetensors")
    again = Gemma4.from_packed(tmp_path / "saved.safetensors", device="cuda")
    assert torch.equal(again.logits(IDS), on_device.logits(IDS))
