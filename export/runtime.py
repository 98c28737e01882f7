"""`ExportedGemma4`: an exported model with the GGUF it was made from, run without a compiler.

    model = ExportedGemma4.load("exported/", "model.gguf")
    print(model.chat([{"role": "user", "content": "hi"}]))

Nothing here imports Triton, Inductor or the model's own code: weights are loaded by the load plan and handed to the
compiled methods, which use them where they lie.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gemma4.chat import ChatTemplate, chat_template_from_metadata, render_chat_ids
from gemma4.config import Gemma4Config, LayerKind
from gemma4.decode_loop import DecodeLoop
from gemma4.export.low_memory import CompiledMethod
from gemma4.export.manifest import CONSTANTS, PACKAGE, Manifest
from gemma4.export.weights import bind_methods, weight_tree
from gemma4.generate import check_ids, check_room, generate_tokens, prefill
from gemma4.history import Session, TokenHistory
from gemma4.mapping import plan_load
from gemma4.progress import progress_bar
from gemma4.quant.errors import ContextError, MalformedError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.loader import load_weights
from gemma4.quant.reserve import reserve
from gemma4.ring import ring_length
from gemma4.ring_snapshot import RingSnapshot
from gemma4.sampling import SamplingParams
from gemma4.text_stream import stream_text
from gemma4.tokenizer import Tokenizer, has_tokenizer, tokenizer_from_metadata

Methods = dict[str, CompiledMethod]


def open_methods(folder: Path) -> tuple[Manifest, torch.device, Methods, dict[str, Tensor]]:
    """Manifest, device, methods still without constants, and those constants that the artifact itself holds.

    Raises ArtifactMismatchError where this machine or installation is another than it was made for, MalformedError.
    """
    manifest = Manifest.read(folder)
    manifest.check_versions(folder)
    device = manifest.find_device(folder)
    try:
        constants = load_file(folder / CONSTANTS, device=str(device))
        methods = {name: CompiledMethod(folder / PACKAGE, name, device) for name in manifest.methods}
    except (SafetensorError, FileNotFoundError, RuntimeError) as error:
        raise MalformedError(f"cannot be opened: {error}", path=folder) from error
    return manifest, device, methods, constants


class _CompiledCache(NamedTuple):
    """What generation asks a cache; its tensors are the methods' own."""

    max_seq_len: int
    chunk_size: int

    def up_to(self, end: int) -> AbstractContextManager[None]:
        """Nothing: compiled methods read what the positions on the device tell them to."""
        return nullcontext()


class _CompiledModel:
    """The two methods called like the model: logits of the last positions."""

    def __init__(self, methods: Methods, weights: nn.Module, device: torch.device) -> None:
        self.methods = methods
        self.norm = weights.get_submodule("norm")
        self._neutral = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def reserve_workspace(self, num_tokens: int) -> None:
        """Nothing: compiled methods take what they need as one."""

    def __call__(self, tokens: Tensor, input_pos: Tensor, cache: object, num_logits: int | None = 1) -> Tensor:
        """tokens, input_pos: int64 [T]. Returns float32 [num_logits, vocab_size]; None, for all T, runs one by one."""
        if num_logits is None:
            # Compiled methods take addresses that are multiples of 16 bytes, which slices do not have.
            pairs = zip(torch.split(tokens, 1), torch.split(input_pos, 1), strict=True)
            return torch.cat([self.run(token.clone(), position.clone())[1] for token, position in pairs])
        return self.run(tokens, input_pos)[1][:num_logits]

    def run(self, tokens: Tensor, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest next token, int64 [1], and the last position's logits [1, vocab_size]."""
        method = self.methods["decode" if tokens.shape[0] == 1 else "prefill"]
        token, logits = method(tokens, input_pos, *self._neutral)
        return token, logits


class _CompiledLoop(DecodeLoop):
    """Takes the token that the decode method itself finds, where the likeliest is wanted."""

    def _next(self) -> Tensor:
        if self.params.temperature > 0:
            return super()._next()
        return cast("_CompiledModel", self.model).run(self.token, self.position)[0]


class ExportedGemma4:
    """An exported model. Made by `load`.

    It has one cache: one generation at a time, which continues from the tokens that it shares with the one before.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: Gemma4Config,
        metadata: Mapping[str, Any],
        path: Path,
        model: _CompiledModel,
        state: Mapping[str, Tensor],
    ) -> None:
        self.manifest = manifest
        self.config = config
        self.metadata = metadata
        self.path = path
        self.max_seq_len = manifest.max_seq_len
        self.sampling = SamplingParams.from_metadata(metadata, path)
        self._model = model
        self._state = state
        self._cache = _CompiledCache(manifest.max_seq_len, manifest.chunk_size)
        self._loops: dict[SamplingParams, _CompiledLoop] = {}
        self._history = self._new_history()
        self._in_use = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, gguf: str | Path) -> ExportedGemma4:
        """Opens the directory of `gemma4 export` and loads the weights of the GGUF that was exported.

        Raises ArtifactMismatchError where file, device or versions are not those of the export, MalformedError.
        """
        folder = Path(folder)
        manifest, device, methods, others = open_methods(folder)
        with GGUFFile.open(gguf) as file:
            manifest.check_file(file, folder)
            config = Gemma4Config.from_gguf(file)
            plan = plan_load(file, config, fuse=manifest.has_fusion)
            weights = weight_tree(plan)
            with progress_bar(f"loading {file.path.name}", sum(entry.file_bytes for entry in plan.entries)) as progress:
                load_weights(weights, plan, file, device, progress)
            reserve((tensor.zeros(torch.device("meta")) for tensor in manifest.state.values()), device)
            state = {name: tensor.zeros(device) for name, tensor in manifest.state.items()}
            bind_methods(methods.values(), weights, others | state, fill=lambda weight: weight)
            return cls(manifest, config, file.metadata, file.path, _CompiledModel(methods, weights, device), state)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError where the file has none."""
        return tokenizer_from_metadata(self.metadata, self.path)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's own template, or ours where it has none."""
        return chat_template_from_metadata(self.metadata, self.tokenizer, self.path)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [len(ids), vocab_size], one token after another. Raises ContextError."""
        check_ids(ids, self.config.vocab_size)
        if len(ids) > self.max_seq_len:
            raise ContextError(f"found {len(ids)} tokens, max_seq_len is {self.max_seq_len}", field="ids")
        with self._in_use:
            self._history = self._new_history()
            return prefill(cast("Any", self._model), cast("Any", self._cache), ids, all_logits=True)

    def generate_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float | None = 0.0,
        *,
        seed: int = 0,
        eog_ids: frozenset[int] | None = None,
        **sampling: float | None,
    ) -> list[int]:
        """As `Gemma4.generate_ids`."""
        options: dict[str, float | None] = {"temperature": temperature, **sampling}
        return list(self.stream_ids(ids, max_new_tokens, seed=seed, eog_ids=eog_ids, **options))

    def stream_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        *,
        seed: int = 0,
        eog_ids: frozenset[int] | None = None,
        **sampling: float | None,
    ) -> Iterator[int]:
        """As `Gemma4.stream_ids`."""
        check_ids(ids, self.config.vocab_size)
        check_room(len(ids), max_new_tokens, self.max_seq_len)
        has_text = has_tokenizer(self.metadata)
        own_eog_ids = self.tokenizer.eog_ids if has_text else frozenset[int]()
        suppress_ids = self.tokenizer.suppress_ids if has_text else ()
        params = self.sampling.override(**sampling)
        return self._run(ids, max_new_tokens, seed, own_eog_ids if eog_ids is None else eog_ids, params, suppress_ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        *,
        stream: bool = False,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **sampling: float | None,
    ) -> str | Iterator[str]:
        """As `Gemma4.generate`."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        new_ids = self.stream_ids(ids, max_new_tokens, seed=seed, eog_ids=None, **sampling)
        pieces = stream_text(new_ids, self.tokenizer, (stop,) if isinstance(stop, str) else stop)
        return pieces if stream else "".join(pieces)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 256,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **sampling: float | None,
    ) -> str | Iterator[str]:
        """As `Gemma4.chat`."""
        template, thinking = self.chat_template, enable_thinking
        ids = render_chat_ids(template, self.tokenizer, messages, tools=tools, enable_thinking=thinking)
        return self.generate(ids, max_new_tokens, stream=stream, seed=seed, stop=stop, **sampling)

    @torch.inference_mode()
    def _run(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        seed: int,
        eog_ids: frozenset[int],
        params: SamplingParams,
        suppress_ids: Sequence[int],
    ) -> Iterator[int]:
        with self._in_use:
            if params not in self._loops:
                model, cache = cast("Any", self._model), cast("Any", self._cache)
                names = self.manifest.dependent_kernels
                self._loops = {params: _CompiledLoop(model, cache, params, suppress_ids, dependent_kernels=names)}
            # Kept only where the generation ends well, or nobody listens any more.
            history, self._history = self._history, self._new_history()
            session = Session(self._loops[params], history)
            try:
                yield from generate_tokens(session, ids, max_new_tokens, seed=seed, eog_ids=eog_ids)
            except GeneratorExit:
                self._history = history
                raise
            self._history = history

    def _new_history(self) -> TokenHistory:
        """Of a cache of which nothing is known."""
        window = self.config.sliding_window
        of_sliding = [f"cache.{i}." for i, layer in enumerate(self.config.layers) if layer.kind is LayerKind.SLIDING]
        is_ring = window < self.max_seq_len
        rings = [x for name, x in self._state.items() if is_ring and name.startswith(tuple(of_sliding))]
        return TokenHistory(window, ring_length(window, self.max_seq_len), RingSnapshot(rings))
