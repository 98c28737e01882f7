"""Memory that is taken as a whole before many tensors are allocated, and how much PyTorch takes for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4
from gemma4.config import Gemma4Config
from gemma4.mapping import PER_LAYER_TABLE, plan_load
from gemma4.memory_plan import weight_planes
from gemma4.model import TextModel
from gemma4.quant import reserve as reserve_module
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.reserve import reserve, reserve_blocks, reserve_weights
from gemma4.quant.segments import block_bytes, large_block_bytes, segment_bytes
from tests.family_gguf import SHRUNKEN

MIB = 1 << 20


def test_what_tensors_take() -> None:
    assert (block_bytes([]), segment_bytes([])) == (0, 0)
    assert block_bytes([1, 512, 513]) == 4 * 512
    assert large_block_bytes([MIB, MIB + 1, 3 * MIB]) == 4 * MIB + 512
    assert segment_bytes([1]) == 2 * MIB
    assert segment_bytes([MIB] * 3) == 4 * MIB
    assert segment_bytes([MIB + 1]) == 20 * MIB
    assert segment_bytes([9 * MIB] * 100) == 900 * MIB
    assert segment_bytes([9 * MIB] * 100 + [7]) == 902 * MIB
    assert segment_bytes([11 * MIB - 1] * 100) == 1100 * MIB


def test_the_weights_reserved_are_those_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GGUFFile.open(SHRUNKEN["E2B"]().write_sparse(tmp_path / "model.gguf")) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
    reserved: list[int] = []
    monkeypatch.setattr(reserve_module, "reserve", lambda tensors, _: reserved.extend(t.nbytes for t in tensors))
    for load_plan in (plan, plan.with_host_memory(PER_LAYER_TABLE)):
        reserved.clear()
        reserve_weights(TextModel(config, load_plan, torch.bfloat16, torch.device("cpu")), torch.device("cuda"))
        on_gpu = [entry for entry in load_plan.entries if not entry.in_host_memory]
        assert sorted(reserved) == sorted(size for entry in on_gpu for size in weight_planes(entry))


def test_a_cpu_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.empty(1 << 40, dtype=torch.uint8, device="meta")]
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    reserve(tensors, torch.device("cpu"))
    reserve_blocks([1 << 40], torch.device("cpu"))


@pytest.mark.gpu
def test_tensors_are_cut_from_what_was_reserved() -> None:
    device = torch.device("cuda")
    sizes = [9 * MIB, 9 * MIB, 9 * MIB + 3, 11 * MIB + 512, 300_000, 2 * MIB, 40 * MIB + 1] * 4
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    reserve((torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes), device)
    tensors = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    assert torch.cuda.memory_reserved() - before <= segment_bytes(sizes)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(sizes)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@pytest.mark.gpu
def test_a_loaded_model_and_its_cache_take_what_is_planned(real_gguf: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = Gemma4.from_gguf(real_gguf, device="cuda", max_seq_len=4096)
    weights = [parameter.nbytes for parameter in model.model.parameters()]
    # A segment more for what is no weight, and what small tensors leave of segments that they share.
    assert torch.cuda.memory_reserved() - before <= segment_bytes(weights) + 4 * MIB


@pytest.mark.gpu
def test_blocks_are_not_the_same_memory() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    reserve_blocks([32 * MIB, 64 * MIB], device)
    assert torch.cuda.memory_reserved() - before == 96 * MIB
    small = torch.empty(30 * MIB, dtype=torch.uint8, device=device)
    large = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved() - before == 96 * MIB
    assert small.device == large.device


@pytest.mark.gpu
def test_a_prompt_takes_its_cache_and_its_blocks(real_gguf: Path) -> None:
    """And the workspace of cuBLAS, at most 32 MiB, and two segments of small tensors."""
    model = Gemma4.from_gguf(real_gguf, device="cuda", max_seq_len=4096)
    torch.cuda.empty_cache()
    loaded, weights = torch.cuda.memory_reserved(), model.held_bytes
    model.generate_ids([1000 + i for i in range(3000)], 1, eog_ids=frozenset())
    cache = segment_bytes([model.held_bytes - weights])
    blocks = [segment_bytes([size]) for size in model.model.workspace.prefill_blocks(2 * model.config.sliding_window)]
    assert sum(blocks) < torch.cuda.memory_reserved() - loaded <= cache + sum(blocks) + 36 * MIB
