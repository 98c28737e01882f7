"""What is exported: both methods of every kind of model as graphs, against eager; the sampler; fusion in the graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.config import CacheKind
from gemma4.export.methods import Method, MethodName, gumbel_max, methods_of
from tests.family_gguf import with_experts, with_per_layer_inputs
from tests.tiny_gguf import TINY, TINY_GEMMA3, Model, Sizes, gemma3, gemma4, q4_k_m

LENGTH = 64
SMALL = Sizes(2, 256, 512, 8, (2, 2), (32, 64), vocab=320, window=16, context=512, period=2, k_eq_v=False)
MODELS = {
    "dense": gemma4(layers=2, types=q4_k_m(TINY)),
    "float32": gemma4(layers=2),
    "gemma3": gemma3(TINY_GEMMA3, {"matrix": "Q4_K", "token_embd": "Q6_K"}, layers=2, period=2),
    "per-layer inputs": with_per_layer_inputs(replace(SMALL, layers=4), 2, 256, keeps_unused=False),
    "experts": with_experts(SMALL, 4, 2, 256, joined=True),
}


def inputs(ids: list[int], start: int, temperature: float = 0.0, seed: int = 0) -> tuple[Tensor, ...]:
    positions = torch.arange(start, start + len(ids))
    return torch.tensor(ids), positions, torch.tensor([temperature]), torch.tensor([seed])


def prompt(count: int) -> list[int]:
    ids: list[int] = torch.randint(0, TINY.vocab, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


def load(model: Model, folder: Path) -> Gemma4:
    return Gemma4.from_gguf(model.write(folder / "model.gguf"), device="cpu", max_seq_len=LENGTH)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_graphs_share_one_state_and_equal_eager(model: Model, tmp_path: Path) -> None:
    eager = load(model, tmp_path)
    cache = KVCache(eager.config, LENGTH, eager.model.dtype)
    methods = methods_of(eager.model, cache, with_logits=True)
    programs = {name: method.export() for name, method in methods.items()}
    (tokens,) = programs[MethodName.PREFILL].range_constraints.values()
    assert (tokens.lower, tokens.upper) == (1, cache.chunk_size)
    graphs = {name: program.module() for name, program in programs.items()}
    for graph in graphs.values():
        for name, buffer in methods[MethodName.DECODE].named_buffers():
            assert graph.get_buffer(name).data_ptr() == buffer.data_ptr()
    ids = prompt(40)
    expected = eager.logits(ids)
    done = 0
    for count in (2, 3, 31, 1):  # few, a long chunk, one past the window
        name = MethodName.PREFILL if done != 36 else MethodName.DECODE
        token, logits = graphs[name](*inputs(ids[done : done + count], done))
        done += count
        torch.testing.assert_close(logits, expected[done - 1 : done], rtol=1e-4, atol=1e-4)
        assert token.item() == expected[done - 1].argmax().item()


@pytest.mark.parametrize("kind", CacheKind)
def test_every_cache_is_written_in_place(kind: CacheKind, tmp_path: Path) -> None:
    eager = load(gemma4(layers=2, types={"matrix": "Q4_K"}), tmp_path)
    cache = KVCache(eager.config, LENGTH, eager.model.dtype, kind=kind)
    for method in methods_of(eager.model, cache).values():
        signature = method.export().run_decompositions({}).graph_signature
        buffers = {name for name, _ in method.named_buffers()}
        assert set(signature.buffers_to_mutate.values()) == buffers
        assert len(buffers) == sum(len(layer.tensors()) for layer in cache.own.values())


def test_tracing_leaves_the_cache_its_own_tensors(tmp_path: Path) -> None:
    eager = load(MODELS["float32"], tmp_path)
    cache = KVCache(eager.config, LENGTH, eager.model.dtype)
    before = [tensor for layer in cache.own.values() for tensor in layer.tensors().values()]
    Method(MethodName.DECODE, eager.model, cache).export()
    after = [tensor for layer in cache.own.values() for tensor in layer.tensors().values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_fusion_survives(tmp_path: Path) -> None:
    """One product for gate and up where they are one matrix, two where their type keeps them apart."""
    model = gemma4(types={"matrix": "Q4_K", "blk.1.ffn_gate": "Q6_K", "blk.1.ffn_up": "Q6_K"})
    eager = load(model, tmp_path)
    for name, method in methods_of(eager.model, KVCache(eager.config, LENGTH, eager.model.dtype)).items():
        fused = "q4_k_linear" if name is MethodName.DECODE else "gated_linear"
        program = method.export()
        weights = program.graph_signature.inputs_to_parameters
        mlp: Counter[str] = Counter()
        for node in program.graph.nodes:
            if node.op == "call_function" and "_linear" in str(node.target):
                planes = node.args[1]
                plane = planes[0] if isinstance(planes, list) else planes
                weight = weights[plane.name].split(".")  # model.layers.0.mlp.gate_up_proj.weight.qs
                if "mlp" in weight and weight[4] != "down_proj":
                    mlp[f"{node.target.name().removeprefix('gemma4::')} {weight[2]}.{weight[4]}"] += 1
        assert mlp == {
            f"{fused} 0.gate_up_proj": 1,
            "q6_k_linear 1.gate_proj": 1,
            "q6_k_linear 1.up_proj": 1,
            f"{fused} 2.gate_up_proj": 1,
            f"{fused} 3.gate_up_proj": 1,
        }


def test_suppressed_ids_are_never_sampled(tmp_path: Path) -> None:
    eager = load(MODELS["float32"], tmp_path)
    ids = prompt(5)
    order = eager.logits(ids)[-1].argsort(descending=True).tolist()
    cache = KVCache(eager.config, LENGTH, eager.model.dtype)
    (token,) = Method(MethodName.PREFILL, eager.model, cache, suppress_ids=order[:3])(*inputs(ids, 0))
    assert token.item() == order[3]


def test_sampling_follows_the_softmax() -> None:
    logits, temperature = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2, torch.tensor([1.3])
    seeds = [torch.tensor([seed]) for seed in (0, 1, 2**40 + 3)]
    draws = [gumbel_max(logits, temperature, seed, torch.tensor([at])).item() for seed in seeds for at in range(1000)]
    expected = (logits[0] / temperature).softmax(-1) * len(draws)
    counts = torch.bincount(torch.tensor(draws), minlength=20)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 45  # 19 degrees of freedom: passed by chance but once in a thousand
    assert draws[:50] != draws[1000:1050] != draws[2000:2050]


def test_temperature_zero_is_greedy_and_a_seed_repeats_itself() -> None:
    logits = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    seed, position = torch.tensor([5]), torch.tensor([7])
    assert gumbel_max(logits, torch.zeros(1), seed, position).item() == logits.argmax().item()
    first, second = (gumbel_max(logits, torch.ones(1), seed, position) for _ in range(2))
    assert torch.equal(first, second)
