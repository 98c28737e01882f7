"""One token after another with nothing but replays: the decode step as a CUDA graph.

Token and position live on the device and every step updates them there, so a step needs no host value: forward pass,
sampling and bookkeeping are one graph, captured once and replayed for every position. On a CPU the same step runs
eagerly. The host reads tokens one step behind the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4.programmatic_edges import make_programmatic
from gemma4.quant.reserve import reserve_blocks
from gemma4.sampling import SamplingParams, sample

if TYPE_CHECKING:
    from gemma4.cache import KVCache
    from gemma4.model import TextModel

_WARM_UP_STEPS = 2
_STEP_BYTES = 10 << 20
"""Memory of a captured step: asked for less at first, PyTorch takes 20 MiB."""


class DecodeLoop:
    """Samples tokens from `model`, keeping keys and values in `cache`. Serves one generation at a time.

    dependent_kernels: those that a model launches plainly though they wait for their inputs themselves.
    """

    def __init__(
        self,
        model: TextModel,
        cache: KVCache,
        params: SamplingParams,
        suppress_ids: Sequence[int] = (),
        *,
        dependent_kernels: Collection[str] = (),
    ) -> None:
        device = model.norm.weight.device
        self.model = model
        self.cache = cache
        self.params = params
        self.dependent_kernels = dependent_kernels
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.generator = torch.Generator(device)
        self.suppressed = torch.tensor(suppress_ids, dtype=torch.int64, device=device)
        self.runs_ahead = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host = torch.zeros(1, dtype=torch.int64, pin_memory=self.runs_ahead)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What a step changes, besides the cache."""
        return self.token, self.position

    def start(self, logits: Tensor, position: int, seed: int) -> None:
        """Picks the first token from logits [1, vocab_size]; it stands at `position`."""
        self.generator.manual_seed(seed)
        self.position.fill_(position)
        self.token.copy_(self._pick(logits))

    def advance(self) -> None:
        """Runs the current token through the model and replaces it by its successor, without waiting."""
        if not self.runs_ahead:
            self._step()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def read(self) -> Callable[[], int]:
        """Starts fetching the current token; the result waits for it and returns it. Call it before the next `read`."""
        if not self.runs_ahead:
            return lambda: int(self.token)
        self._host.copy_(self.token, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> int:
            arrived.synchronize()
            return int(self._host)

        return wait

    def _pick(self, logits: Tensor) -> Tensor:
        if self.suppressed.numel():
            logits = logits.index_fill(1, self.suppressed, float("-inf"))
        return sample(logits[0], self.params, self.generator)

    def _next(self) -> Tensor:
        """Runs the current token; int64 [1], the one after it."""
        return self._pick(self.model(self.token, self.position, self.cache))

    def _step(self) -> None:
        self.token.copy_(self._next())
        self.position.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        torch.cuda.empty_cache()  # what a prompt needed more
        before, random = [tensor.clone() for tensor in self.state], self.generator.get_state()
        stream = torch.cuda.Stream(self.token.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Warming up compiles kernels. It writes only slots that replays write again before they are read.
            for _ in range(_WARM_UP_STEPS):
                self._restore(before)
                self._step()
            self._restore(before)
        torch.cuda.current_stream().wait_stream(stream)
        self.generator.set_state(random)
        graph = torch.cuda.CUDAGraph(keep_graph=bool(self.dependent_kernels))
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            reserve_blocks([_STEP_BYTES], self.token.device)
            self._step()
        if self.dependent_kernels:
            make_programmatic(graph.raw_cuda_graph(), self.dependent_kernels)
            graph.instantiate()
        return graph

    def _restore(self, state: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.state, state, strict=True):
            tensor.copy_(value)
