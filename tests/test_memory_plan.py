"""Memory plans against the objects they foresee: planes, caches, the tensors of a pass, and a measured run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4, memory_plan, workspace
from gemma4.cache import KVCache
from gemma4.config import CacheKind, Gemma4Config
from gemma4.kernels import turboquant
from gemma4.mapping import plan_load
from gemma4.memory_plan import CONTEXT_BYTES, MemoryModel, kv_tensors, weight_planes
from gemma4.model import TextModel
from gemma4.quant import linear, loader
from gemma4.quant.errors import ContextError, DoesNotFitError
from gemma4.quant.formats import container_for
from gemma4.quant.ggml_types import GGMLType, row_bytes
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LOADABLE_TYPES, LoadEntry, LoadPlan
from gemma4.workspace import Workspace
from tests.caching_allocator import CachingAllocator
from tests.family_gguf import FULL_SIZE, SHRUNKEN, quantize
from tests.live_memory import allocations, opened_ops, peak_live_bytes
from tests.tiny_gguf import GEMMA4_31B, Model, gemma4, q4_k_m

Header = tuple[Gemma4Config, LoadPlan]
META = torch.device("meta")
MEASURED = Path(__file__).parent.parent / "docs" / "data"
GIB = 1 << 30


def read(model: Model, path: Path) -> Header:
    with GGUFFile.open(model.write_sparse(path)) as file:
        config = Gemma4Config.from_gguf(file)
        return config, plan_load(file, config)


@pytest.fixture(scope="module", params=FULL_SIZE)
def header(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Header:
    """Each size of the family in the Q4_K_M mix."""
    return read(quantize(FULL_SIZE[request.param](), "Q4_K_M"), tmp_path_factory.mktemp("header") / "model.gguf")


@pytest.fixture(scope="module")
def model_31b(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read(gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B)), tmp_path_factory.mktemp("31b") / "model.gguf")


# Parts


@pytest.mark.parametrize("kind", sorted(LOADABLE_TYPES), ids=lambda kind: kind.name)
def test_planes_of_every_type(kind: GGMLType) -> None:
    planes = container_for(kind).empty(24, 512, META).planes_dict().values()
    found = list(weight_planes(LoadEntry("w.weight", kind, kind, (24, 512), ())))
    assert sum(found) == sum(plane.nbytes for plane in planes)
    if kind in workspace.MATVEC_TYPES:
        assert found == [plane.nbytes for plane in planes]


@pytest.mark.parametrize("kind", sorted(LOADABLE_TYPES), ids=lambda kind: kind.name)
def test_memory_to_decode_every_type(kind: GGMLType) -> None:
    weight = container_for(kind).empty(4096, 512, META)
    ids = torch.zeros(4096, dtype=torch.int64, device=META)
    decoded = 4 * 4096 * 512
    for rows in (None, ids):
        peak = peak_live_bytes(lambda rows=rows: weight.dequantize(rows), weight.planes_dict().values())
        assert 0.3 * workspace.decode_factor(kind) < peak / decoded <= workspace.decode_factor(kind)


@pytest.mark.parametrize("kind", sorted(LOADABLE_TYPES), ids=lambda kind: kind.name)
def test_memory_to_unpack_every_type(kind: GGMLType) -> None:
    columns = 16384
    blocks = torch.empty((loader.SLICE_BYTES // row_bytes(kind, columns), row_bytes(kind, columns)), dtype=torch.uint8)
    blocks = blocks.to(META)
    weight = container_for(kind).empty(blocks.shape[0], columns, META)
    peak = peak_live_bytes(lambda: weight.write_rows(0, blocks), [*weight.planes_dict().values(), blocks])
    assert peak <= workspace.UNPACKING_BYTES


def test_limits_are_those_of_the_products() -> None:
    assert workspace.CHUNK_BYTES == linear._CHUNK_BYTES
    assert frozenset(linear.LINEAR_OPS) == workspace.MATVEC_TYPES
    assert turboquant.MIN_DIM == memory_plan._LEAST_TURBOQUANT_DIMS
    assert (loader.SLICE_BYTES, loader.GPU_WORKERS) == (workspace.LOADER_SLICE_BYTES, workspace.LOADER_WORKERS)


@pytest.mark.parametrize("context", [1, 700, 2048, 2049, 8192])
def test_caches(header: Header, context: int) -> None:
    config, plan = header
    for kv_cache in CacheKind:
        cache = KVCache(config, context, torch.bfloat16, META, kv_cache)
        planned = MemoryModel(config, plan, kv_cache).at(context)
        assert planned.kv_bytes == cache.nbytes
        assert planned.chunk == cache.chunk_size
        for i, layer in cache.own.items():
            kind = config.layers[i].kind
            (group,) = [group for group in planned.kv if group.kind is kind]
            sizes = kv_tensors(config, config.layers[i], group.positions, kv_cache)
            assert sorted(sizes) == sorted(tensor.nbytes for tensor in layer.tensors().values())


# A pass


def on_meta(config: Gemma4Config, plan: LoadPlan) -> TextModel:
    model = TextModel(config, plan, torch.bfloat16, META)
    model.max_packed_rows = 8
    return model


def visible_peak(
    model: TextModel, tokens: int, context: int, device: torch.device, kv_cache: CacheKind = CacheKind.LOSSLESS
) -> int:
    """Most bytes alive in a pass of a model, without what ops take inside themselves."""
    cache = KVCache(model.config, context, model.dtype, device, kv_cache)
    ids = torch.arange(tokens, device=device)
    known = [ids, *model.parameters(), *(t for layer in cache.own.values() for t in layer.tensors().values())]
    return peak_live_bytes(lambda: model(ids, ids, cache), known)


@pytest.fixture
def without_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out of a plan what ops hold inside themselves: decoded weights, pieces of products, slices of keys."""
    for name in ("_scratch", "_gated", "_sliced"):
        monkeypatch.setattr(Workspace, name, lambda *_: 0.0)


@pytest.mark.usefixtures("without_scratch")
def test_tensors_of_a_chunk(header: Header) -> None:
    config, plan = header
    if config.num_experts:
        return  # which experts are chosen depends on values: see the next test
    for kv_cache in (CacheKind.LOSSLESS, CacheKind.TURBOQUANT):
        planned = MemoryModel(config, plan, kv_cache).at(8192)
        passes = Workspace(config, plan, 2)
        peak = visible_peak(on_meta(config, plan), planned.chunk, 8192, META, kv_cache)
        assert peak <= passes.prefill_bytes(planned.chunk) <= 1.05 * peak
        assert sum(passes.prefill_blocks(planned.chunk)) == planned.prefill_bytes


@pytest.mark.usefixtures("without_scratch")
def test_tensors_of_a_chunk_with_experts(tmp_path: Path) -> None:
    loaded = Gemma4.from_gguf(quantize(SHRUNKEN["26B-A4B"](), "Q8_0").write(tmp_path / "model.gguf"), device="cpu")
    planned = MemoryModel(loaded.config, loaded.plan, itemsize=4).at(256)
    peak = visible_peak(loaded.model, planned.chunk, 256, loaded.device)
    # Every token may choose one expert; here each takes some.
    assert peak <= loaded.model.workspace.prefill_bytes(planned.chunk) <= 1.6 * peak
    assert peak <= planned.prefill_bytes


@pytest.mark.parametrize("kv_cache", [CacheKind.LOSSLESS, CacheKind.TURBOQUANT])
def test_tensors_of_a_prompt_fit_the_blocks_reserved_for_them(kv_cache: CacheKind, tmp_path: Path) -> None:
    """In chunks through twelve layers of 31B, with what its ops allocate inside themselves."""
    sizes = replace(GEMMA4_31B, layers=12)
    config, plan = read(quantize(gemma4(sizes), "Q4_K_M"), tmp_path / "model.gguf")
    model = on_meta(config, plan)
    cache = KVCache(config, 8192, torch.bfloat16, META, kv_cache)
    known = [*model.parameters(), *cache.tensors()]
    chunks = [torch.empty(tokens, dtype=torch.int64, device=META) for tokens in (2048, 2048, 1000)]
    with opened_ops():
        events, peak = allocations(lambda: [model(ids, ids, cache, 0) for ids in chunks], [*known, *chunks])
    assert peak == model.workspace.prefill_bytes(2048)
    allocator = CachingAllocator()
    allocator.reserve(model.workspace.prefill_blocks(2048))
    allocator.run(events)
    assert max(allocator.segments[2:]) <= 2 << 20, "small ones"
    assert sum(allocator.segments) < peak + (100 << 20)
    unprepared = CachingAllocator()
    unprepared.run(events)
    assert sum(unprepared.segments) > sum(allocator.segments) + (50 << 20)


def test_tensors_of_a_step(header: Header) -> None:
    config, plan = header
    planned = MemoryModel(config, plan).at(8192)
    peak = visible_peak(on_meta(config, plan), 1, 8192, META)
    # 3 % of everything is what a plan may be wrong by.
    assert peak - 1e5 <= planned.decode_bytes <= peak + 0.01 * planned.total_bytes


# Whole plans


@pytest.mark.parametrize("kind", [CacheKind.LOSSLESS, CacheKind.TURBOQUANT])
def test_measured_runs(model_31b: Header, kind: CacheKind) -> None:
    """The run generated after a prompt of a few chunks, with the caches of the whole context allocated."""
    name = "end_to_end_h100.json" if kind is CacheKind.LOSSLESS else f"end_to_end_h100_{kind}.json"
    measured = json.loads((MEASURED / name).read_text())
    memory = measured["memory"]
    planned = MemoryModel(*model_31b, kind).at(memory["context"])
    assert measured["kv_cache"] == kind
    assert planned.weight_bytes == pytest.approx(measured["weight_bytes"], rel=1e-3)
    assert planned.allocated_bytes == pytest.approx(memory["peak_allocated_bytes"], rel=0.01)
    assert planned.total_bytes == pytest.approx(memory["gpu_used_bytes"], rel=0.03)


def test_totals(header: Header) -> None:
    model = MemoryModel(*header)
    plans = [model.at(context) for context in (1, 100, 5000, model.config.context_length)]
    for plan in plans:
        assert 0 < plan.kv_bytes < plan.total_bytes - plan.weight_bytes
        kept = plan.weight_bytes + plan.kv_bytes
        assert (plan.loading_bytes > 0) == ("loader" in plan.describe())
        assert kept + 0.7 * plan.prefill_bytes < plan.allocated_bytes
        assert plan.allocated_bytes <= kept + max(plan.prefill_bytes, plan.decode_bytes) + plan.rounding_bytes
        assert 0 <= plan.rounding_bytes < 6 << 20
        assert f"{plan.total_bytes:,}" in plan.describe().splitlines()[-1]
        assert json.loads(json.dumps(plan.to_json()))["total_bytes"] == plan.total_bytes
    assert [plan.total_bytes for plan in plans] == sorted(plan.total_bytes for plan in plans)
    for context in (0, -1, model.config.context_length + 1):
        with pytest.raises(ContextError, match=str(context)):
            model.at(context)


def test_longest_context(header: Header) -> None:
    model = MemoryModel(*header)
    most = model.config.context_length
    for context in (1, 3000, 50_000):
        total = model.at(context).total_bytes
        longest = model.longest_context(total)
        assert longest >= context
        assert model.at(longest).total_bytes <= total < model.at(longest + 1).total_bytes
    assert model.longest_context(model.at(1).total_bytes - 1) == 0
    assert model.longest_context(1000 * GIB) == most


# Refusal before loading


def from_gguf_with(free_bytes: int, path: Path, monkeypatch: pytest.MonkeyPatch, **options: int) -> None:
    """Gemma4.from_gguf as on a GPU with so much free memory; returns where it would begin to load."""

    class Loading(Exception):
        pass

    def begin(*_: object) -> None:
        raise Loading

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_bytes, 80 * GIB))
    monkeypatch.setattr("gemma4.opening.TextModel", begin)
    with pytest.raises(Loading):
        Gemma4.from_gguf(path, device="cuda", **options)


def test_from_packed_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Gemma4.from_gguf(quantize(SHRUNKEN["31B"](), "Q8_0").write(tmp_path / "model.gguf"), device="cpu")
    loaded.save_packed(tmp_path / "saved.safetensors")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 20, GIB))
    with pytest.raises(DoesNotFitError) as caught:
        Gemma4.from_packed(tmp_path / "saved.safetensors", device="cuda")
    assert caught.value.path == tmp_path / "saved.safetensors"


def test_from_gguf_refuses_what_does_not_fit(
    model_31b: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B)).write_sparse(tmp_path / "31b.gguf")
    model = MemoryModel(*model_31b)
    needed = model.at(32_768).total_bytes - CONTEXT_BYTES  # which CUDA has taken when free memory is asked for
    from_gguf_with(needed, path, monkeypatch, max_seq_len=32_768)
    with pytest.raises(DoesNotFitError) as caught:
        from_gguf_with(needed - 1, path, monkeypatch, max_seq_len=32_768)
    assert (caught.value.path, caught.value.field, caught.value.code) == (path, "max_seq_len", "does_not_fit")
    assert model.at(32_768).describe() in str(caught.value)
    longest = model.longest_context(needed - 1 + CONTEXT_BYTES)
    assert f"{longest:,} positions would fit" in caught.value.summary
    from_gguf_with(needed - 1, path, monkeypatch, max_seq_len=longest)
    with pytest.raises(DoesNotFitError, match="not even one"):
        from_gguf_with(10 * GIB, path, monkeypatch)
    with pytest.raises(DoesNotFitError, match="262,144 positions"):
        from_gguf_with(10 * GIB, path, monkeypatch, max_seq_len=10**9)
    with pytest.raises(DoesNotFitError):
        from_gguf_with(needed, path, monkeypatch, max_seq_len=4096, dequantize=True)
