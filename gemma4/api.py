"""`Gemma4`: a GGUF file as a model one can ask for text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gemma4.cache import KVCache
from gemma4.chat import ChatTemplate, chat_template_from_metadata, render_chat_ids
from gemma4.checkpoint import load_model, save_model
from gemma4.config import CacheKind, Gemma4Config
from gemma4.generate import check_ids, check_room, generate_tokens, prefill
from gemma4.model import TextModel
from gemma4.open_weights import open_weights
from gemma4.opening import open_model, placement
from gemma4.options import IdOptions, TextOptions
from gemma4.quant.errors import ContextError
from gemma4.quant.formats import QuantTensor
from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.plan import LoadPlan
from gemma4.sampling import SamplingParams
from gemma4.session import SessionPool
from gemma4.speculate import NUM_DRAFT_TOKENS, Draft, Speculation, SpeculativeLoop, check_draft, speculate_tokens
from gemma4.text_stream import stream_text
from gemma4.tokenizer import Tokenizer, has_tokenizer, tokenizer_from_metadata


class Gemma4:
    """A loaded model with its tokenizer. Made by `from_gguf` or `from_packed`."""

    def __init__(
        self,
        model: TextModel,
        plan: LoadPlan,
        metadata: Mapping[str, Any],
        *,
        path: Path,
        max_seq_len: int,
        kv_cache: CacheKind = CacheKind.LOSSLESS,
    ) -> None:
        self.model = model
        self.plan = plan
        self.metadata = metadata
        self.path = path
        self.max_seq_len = min(max_seq_len, model.config.context_length)
        self.sampling = SamplingParams.from_metadata(metadata, path)
        self.kv_cache = kv_cache
        self._sessions = SessionPool(model, self.max_seq_len, kv_cache)
        self._speculative_loop: SpeculativeLoop | None = None
        self.last_speculation: Speculation | None = None  # of the last generation with a draft; counts while it runs

    @classmethod
    def from_gguf(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_seq_len: int = 4096,
        fuse: bool = True,
        dequantize: bool = False,
        per_layer_table: Literal["device", "host"] = "device",
        kv_cache: str = CacheKind.LOSSLESS,
    ) -> Gemma4:
        """Opens a GGUF file and loads its weights, packed as they are stored.

        path: of the file, any part of a split one, or of a directory with a Hugging Face Gemma 4 checkpoint.
        device: cuda if there is one, else cpu. dtype: of matrix products; float32 on a CPU, bfloat16 on a GPU.
        max_seq_len: positions a generation may use, at most the model's context.
        fuse: join gate and up projections where both are Q4_K.
        dequantize: hold dense weights in `dtype`; more memory, faster on a CPU.
        per_layer_table: where the per-layer embeddings of E2B and E4B are kept for a GPU, on it or in pinned host
        memory, of which each token reads one row.
        kv_cache: how full-attention layers keep keys and values, "lossless", "turboquant" (6 bits a number) or
        "turboquant-4bit"; see `CacheKind`. Sliding layers keep them in `dtype`.
        Raises a Gemma4Error that names the file and what is wrong with it; DoesNotFitError before anything is loaded.
        """
        device, dtype = placement(device, dtype)
        kind = CacheKind(kv_cache)
        with open_weights(path) as file:
            model, plan = open_model(
                file,
                device,
                dtype,
                max_seq_len,
                fuse=fuse,
                dequantize=dequantize,
                per_layer_table=per_layer_table,
                kv_cache=kind,
            )
            return cls(model, plan, file.metadata, path=file.path, max_seq_len=max_seq_len, kv_cache=kind)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_seq_len: int = 4096,
        per_layer_table: Literal["device", "host"] = "device",
        kv_cache: str = CacheKind.LOSSLESS,
    ) -> Gemma4:
        """Opens a directory with a Hugging Face Gemma 4 checkpoint (`config.json`, `model*.safetensors`, tokenizer).

        Weights are kept as they are stored: bfloat16, float16 or float32. `from_gguf`, which opens directories too,
        under the name of Hugging Face's libraries; arguments and errors are the same.
        """
        return cls.from_gguf(
            path,
            device=device,
            dtype=dtype,
            max_seq_len=max_seq_len,
            per_layer_table=per_layer_table,
            kv_cache=kv_cache,
        )

    @classmethod
    def from_packed(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_seq_len: int = 4096,
        kv_cache: str = CacheKind.LOSSLESS,
    ) -> Gemma4:
        """Opens a file of `save_packed`, arguments as `from_gguf`; on a CPU weights are views on the mapped file."""
        device, dtype = placement(device, dtype)
        kind = CacheKind(kv_cache)
        model, plan, metadata = load_model(path, dtype, device, max_seq_len, kind)
        return cls(model.eval(), plan, metadata, path=Path(path), max_seq_len=max_seq_len, kv_cache=kind)

    def forget(self) -> None:
        """Drops the keys and values of the last generation, and the memory they take."""
        self._sessions.clear()
        self._speculative_loop = None

    def save_packed(self, path: str | Path) -> None:
        """Writes the model as one safetensors file, weights packed as they are; an existing file is replaced whole."""
        save_model(path, self.model, self.plan, self.metadata)

    @property
    def config(self) -> Gemma4Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def held_bytes(self) -> int:
        """Bytes on its device of the weights, and of the keys and values that the last generation left."""
        weights = (weight for weight in self.model.parameters() if weight.device == self.device)
        return sum(weight.nbytes for weight in weights) + self._sessions.nbytes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built from the file's metadata on first use. Raises TokenizerError where the file has none."""
        return tokenizer_from_metadata(self.metadata, self.path)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's own template, or ours where it has none."""
        return chat_template_from_metadata(self.metadata, self.tokenizer, self.path)

    def use_chat_template(self, choice: str | Path) -> None:
        """Renders conversations by another template from now on.

        choice: "file" for the file's own; "builtin" for ours, in today's format; or the path of a text file with one.
        Raises TemplateError.
        """
        self.chat_template = chat_template_from_metadata(self.metadata, self.tokenizer, self.path, choice)

    def weight(self, name: str) -> QuantTensor:
        """The weight that came from the file's tensor `name`, as a container sharing the model's storage.

        Raises KeyError for a name the plan does not hold.
        """
        entry, part = self.plan.source(name)
        module = self.model.get_submodule(entry.target)
        assert isinstance(module, PackedWeight), f"{name} is a vector"
        return module.tensor.slice_rows(part.start, part.stop)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [len(ids), vocab_size]: one pass over `ids` with a fresh cache. Raises ContextError."""
        check_ids(ids, self.config.vocab_size)
        if len(ids) > self.max_seq_len:
            raise ContextError(f"found {len(ids)} tokens, max_seq_len is {self.max_seq_len}", field="ids")
        cache = KVCache(self.config, len(ids), self.model.dtype, self.device, self.kv_cache)
        self.model.reserve_workspace(len(ids))
        return prefill(self.model, cache, ids, all_logits=True)

    def generate_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float | None = 0.0,
        **options: Unpack[IdOptions],
    ) -> list[int]:
        """The ids that follow `ids`, new ones only; an end-of-generation id ends them and is included.

        options: those of `stream_ids`.
        """
        return list(self.stream_ids(ids, max_new_tokens, temperature=temperature, **options))

    def stream_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        *,
        seed: int = 0,
        eog_ids: frozenset[int] | None = None,
        draft: Draft | None = None,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
        **sampling: float | None,
    ) -> Iterator[int]:
        """The ids that follow `ids`, one by one. Raises ContextError at once.

        eog_ids: where to stop, after one of them; by default the tokenizer's, none for a file without a tokenizer.
        Other arguments as those of `generate`. Tokens at the beginning of `ids` that the generation before has run
        already do not run again.
        """
        own_eog_ids, suppress_ids = self._text_options()
        check_ids(ids, self.config.vocab_size)
        check_room(len(ids), max_new_tokens, self.max_seq_len)
        eog_ids = own_eog_ids if eog_ids is None else eog_ids
        if draft is not None:
            check_draft(self.model, draft, num_draft_tokens)
        params = self.sampling.override(**sampling)
        return self._run(ids, max_new_tokens, seed, eog_ids, params, suppress_ids, draft, num_draft_tokens)

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        stop: str | Sequence[str] = ...,
        **options: Unpack[TextOptions],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        stop: str | Sequence[str] = ...,
        **options: Unpack[TextOptions],
    ) -> Iterator[str]: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        *,
        stream: bool = False,
        stop: str | Sequence[str] = (),
        **options: Unpack[TextOptions],
    ) -> str | Iterator[str]:
        """Text that continues `prompt`; with stream=True an iterator of pieces of it.

        prompt: text, in which control tokens are plain text, or token ids. stop: strings that end the text and are not
        part of it. options: seed; temperature, top_k, top_p, min_p; what is left out or None comes from the file
        (`general.sampling.*`). Equal seeds, equal text. Raises ContextError where it would not fit in `max_seq_len`.
        draft: a `gemma4.drafter.Drafter` that guesses num_draft_tokens tokens ahead, of which one pass checks all; the
        text stays the same where temperature is 0, its distribution otherwise. `last_speculation` says how many held.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        new_ids = self.stream_ids(ids, max_new_tokens, **options)
        pieces = stream_text(new_ids, self.tokenizer, (stop,) if isinstance(stop, str) else stop)
        return pieces if stream else "".join(pieces)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        enable_thinking: bool = ...,
        stop: str | Sequence[str] = ...,
        **options: Unpack[TextOptions],
    ) -> str: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        enable_thinking: bool = ...,
        stop: str | Sequence[str] = ...,
        **options: Unpack[TextOptions],
    ) -> Iterator[str]: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 256,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        stop: str | Sequence[str] = (),
        **options: Unpack[TextOptions],
    ) -> str | Iterator[str]:
        """The model's answer to a conversation; options as those of `generate`.

        messages: {"role": "user" | "assistant" | "system", "content": str}. What they say never becomes control tokens.
        Raises TemplateError.
        """
        template, thinking = self.chat_template, enable_thinking
        ids = render_chat_ids(template, self.tokenizer, messages, tools=tools, enable_thinking=thinking)
        pieces = self.generate(ids, max_new_tokens, stream=True, stop=stop, **options)
        return pieces if stream else "".join(pieces)

    def _text_options(self) -> tuple[frozenset[int], tuple[int, ...]]:
        """End-of-generation ids and ids never to be sampled; both empty for a file without a tokenizer."""
        if not has_tokenizer(self.metadata):
            return frozenset(), ()
        return self.tokenizer.eog_ids, self.tokenizer.suppress_ids

    def _run(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        seed: int,
        eog_ids: frozenset[int],
        params: SamplingParams,
        suppress_ids: tuple[int, ...],
        draft: Draft | None,
        num_draft_tokens: int,
    ) -> Iterator[int]:
        session = self._sessions.take(params, suppress_ids)
        if draft is None:
            new_ids = generate_tokens(session, ids, max_new_tokens, seed=seed, eog_ids=eog_ids)
        else:
            loop = SpeculativeLoop.beside(session.loop, draft, num_draft_tokens, self._speculative_loop)
            self._speculative_loop, self.last_speculation = loop, loop.stats
            new_ids = speculate_tokens(loop, session.history, ids, max_new_tokens, seed=seed, eog_ids=eog_ids)
        try:
            yield from new_ids
        except GeneratorExit:
            self._sessions.put(session)  # nobody listens any more; the tokens so far are whole
            raise
        self._sessions.put(session)
