"""`Gemma4`: a GGUF file as a model one can ask for text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gemma4.cache import KVCache
from gemma4.chat import ChatTemplate, chat_template_from_metadata, render_chat_ids
from gemma4.config import Gemma4Config
from gemma4.generate import check_ids, generate_tokens, prefill
from gemma4.mapping import plan_load
from gemma4.model import TextModel
from gemma4.progress import progress_bar
from gemma4.quant.errors import ContextError
from gemma4.quant.formats import QuantTensor
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.linear import PackedWeight
from gemma4.quant.loader import load_weights
from gemma4.quant.plan import LoadPlan
from gemma4.sampling import SamplingParams
from gemma4.text_stream import stream_text
from gemma4.tokenizer import Tokenizer, tokenizer_from_metadata

logger = logging.getLogger(__name__)

_DENSE_TYPES = {torch.float32: GGMLType.F32, torch.bfloat16: GGMLType.BF16}


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
    ) -> None:
        self.model = model
        self.plan = plan
        self.metadata = metadata
        self.path = path
        self.max_seq_len = max_seq_len
        self.sampling = SamplingParams.from_metadata(metadata)

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
    ) -> Gemma4:
        """Opens a GGUF file and loads its weights, packed as they are stored.

        device: cuda if there is one, else cpu. dtype: of matrix products; float32 on a CPU, bfloat16 on a GPU.
        max_seq_len: positions a generation may use, at most the model's context.
        fuse: join gate and up projections where both are Q4_K.
        dequantize: hold dense weights in `dtype`; more memory, faster on a CPU.
        Raises a Gemma4Error that names the file and what is wrong with it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        if dtype not in _DENSE_TYPES:
            raise ValueError(f"dtype: found {dtype}, expected {' or '.join(map(str, _DENSE_TYPES))}")
        file = GGUFFile.open(path)
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config, fuse=fuse)
        for fusion in plan.fusions:
            logger.info("%s", fusion)
        if dequantize:
            plan = plan.dense(_DENSE_TYPES[dtype])
        max_seq_len = min(max_seq_len, config.context_length)
        model = TextModel(config, plan, dtype, device)
        with progress_bar(f"loading {file.path.name}", sum(entry.file_bytes for entry in plan.entries)) as progress:
            load_weights(model, plan, file, device, progress)
        return cls(model.eval(), plan, file.metadata, path=file.path, max_seq_len=max_seq_len)

    @property
    def config(self) -> Gemma4Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built from the file's metadata on first use. Raises TokenizerError where the file has none."""
        return tokenizer_from_metadata(self.metadata, self.path)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's own template, or a plain turn format where it has none."""
        return chat_template_from_metadata(self.metadata, self.tokenizer, self.path)

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
        cache = KVCache(self.config, len(ids), self.model.dtype, self.device)
        return prefill(self.model, cache, ids, all_logits=True)

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
        """The ids that follow `ids`, new ones only; an end-of-generation id ends them and is included.

        eog_ids: where to stop; by default the tokenizer's, none for a file without a tokenizer.
        """
        return list(self._new_ids(ids, max_new_tokens, seed, eog_ids, temperature=temperature, **sampling))

    @overload
    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int = ..., *, stream: Literal[False] = ..., **options: Any
    ) -> str: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int = ..., *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Text that continues `prompt`; with stream=True an iterator of pieces of it.

        prompt: text, in which control tokens are plain text, or token ids. Sampling settings left at None come from the
        file (`general.sampling.*`). stop: strings that end the text and are not part of it. Equal seeds, equal text.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        new_ids = self._new_ids(ids, max_new_tokens, seed, self.tokenizer.eog_ids, **settings)
        pieces = stream_text(new_ids, self.tokenizer, (stop,) if isinstance(stop, str) else stop)
        return pieces if stream else "".join(pieces)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int = 256,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        **options: Any,
    ) -> Any:
        """The model's answer to a conversation; options are those of `generate`.

        messages: {"role": "user" | "assistant" | "system" | …, "content": str}. What users write never becomes control
        tokens. Raises TemplateError.
        """
        ids = render_chat_ids(
            self.chat_template, self.tokenizer, messages, tools=tools, enable_thinking=enable_thinking
        )
        return self.generate(ids, max_new_tokens, **options)

    def _new_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        seed: int,
        eog_ids: frozenset[int] | None,
        **sampling: float | None,
    ) -> Iterator[int]:
        has_tokenizer = self.metadata.get("tokenizer.ggml.model", "none") != "none"
        if eog_ids is None:
            eog_ids = self.tokenizer.eog_ids if has_tokenizer else frozenset()
        return generate_tokens(
            self.model,
            ids,
            max_new_tokens,
            self.sampling.override(**sampling),
            seed=seed,
            eog_ids=eog_ids,
            suppress_ids=self.tokenizer.suppress_ids if has_tokenizer else (),
            max_seq_len=self.max_seq_len,
        )
