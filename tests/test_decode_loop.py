"""The decode step as a CUDA graph: what replays compute is what the same step computes eagerly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.decode_loop import DecodeLoop
from gemma4.generate import prefill
from gemma4.sampling import SamplingParams
from tests.tiny_gguf import gemma4

STEPS = 60


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replays_are_the_eager_steps(tmp_path: Path, temperature: float) -> None:
    path = gemma4(types={"matrix": "Q4_K"}, layers=4, hidden=512, ffn=1536).write(tmp_path / "model.gguf")
    model = Gemma4.from_gguf(path, device="cuda")
    ids = list(range(2, 40))
    assert len(ids) + STEPS > 2 * model.config.sliding_window  # the rings wrap around

    @torch.inference_mode()
    def run(step: Callable[[DecodeLoop], None]) -> tuple[list[int], KVCache]:
        cache = KVCache(model.config, 256, model.model.dtype, model.device)
        loop = DecodeLoop(model.model, cache, SamplingParams(temperature=temperature))
        loop.start(prefill(model.model, cache, ids), len(ids), seed=5)
        tokens = [int(loop.token)]
        for _ in range(STEPS):
            step(loop)
            tokens.append(int(loop.token))
        return tokens, cache

    replayed, replayed_cache = run(DecodeLoop.advance)
    eager, eager_cache = run(DecodeLoop._step)
    assert replayed == eager
    assert temperature == 0 or len(set(eager)) > 10
    for ours, theirs in zip(replayed_cache.own.values(), eager_cache.own.values(), strict=True):
        for name, tensor in ours.tensors().items():
            assert torch.equal(tensor, theirs.tensors()[name])
