"""The drafter: a small decoder that guesses the next tokens of the model whose keys and values it reads.

    x = pre_projection([target's embedding of the last token, hidden])     -> layers -> norm ->
    logits = x @ embed_tokens.T,    hidden of the next guess = post_projection(x)

`hidden` of the first guess is the target's last hidden state, after its last norm, of the token before. Every guess of
a round is made at the position of the last known token and sees the target's keys before it. Method: multi-token
prediction with shared keys and values, as Hugging Face's `Gemma4Assistant` and llama.cpp's `gemma4-assistant`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4.cache import AttentionCache, HeadTransform, KVCache, OwnCache
from gemma4.drafter_config import DrafterConfig, check_pair, plan_drafter, shared_layer
from gemma4.kernels.rope_cache import rms_norm, rotate
from gemma4.model import Decoder, Stream, TextModel, Weights
from gemma4.opening import require_memory
from gemma4.progress import progress_bar
from gemma4.quant.errors import DrafterMismatchError
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.linear import Rows
from gemma4.quant.loader import load_weights
from gemma4.quant.plan import LoadPlan
from gemma4.rows import RowMaker

if TYPE_CHECKING:
    from gemma4.api import Gemma4

_DENSE_TYPES = {torch.float32: GGMLType.F32, torch.bfloat16: GGMLType.BF16}


class DrafterModel(Decoder):
    """The last token and a hidden state of the target to logits and a guess of the next hidden state."""

    def __init__(self, config: DrafterConfig, plan: LoadPlan, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, plan, dtype, device)
        weights = Weights(plan.by_target())
        self.pre_projection = weights.linear("pre_projection")
        self.post_projection = weights.linear("post_projection")

    def forward(
        self, embedding: Tensor, hidden: Tensor, input_pos: Tensor, caches: list[AttentionCache]
    ) -> tuple[Tensor, Tensor]:
        """embedding, hidden: float32 [1, B], B the target's hidden size; input_pos: int64 [1].

        Returns logits float32 [1, vocab_size] and the next `hidden`.
        """
        make = self.rows_for(1)
        h = self.pre_projection(make.plain(torch.cat((embedding, hidden), dim=-1))).float()
        h, y = self.run_layers(Stream(h), [None] * len(caches), input_pos, caches, make)
        logits, h = self.head(h, y, make)
        return logits, self.post_projection(make.normed(h, self.norm)).float()


class TargetCache:
    """The cache of one layer of the target as a drafter at position p reads it: the positions before p.

    k_weight: float32 [D], of that layer's key norm.
    """

    def __init__(self, source: OwnCache, k_weight: Tensor) -> None:
        self.source = source
        self.k_weight = k_weight
        self.window = max(source.window - 1, 1) if source.window else 0  # p itself counts, but has no key yet

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        heads: HeadTransform,
        input_pos: Tensor,
        scale: float,
        make: RowMaker,
    ) -> Rows:
        rows = q.view(q.shape[0], -1, heads.q_weight.shape[0]).transpose(0, 1)
        queries = rotate(rms_norm(rows, heads.q_weight, heads.eps), input_pos, heads.inv_freq)[None]
        return self.source.read(queries, self.k_weight, input_pos - 1, scale, self.window, make)


class Drafter:
    """A loaded drafter with its target. Made by `from_gguf`; an argument of `Gemma4.generate`."""

    def __init__(self, model: DrafterModel, plan: LoadPlan, target: TextModel, path: Path) -> None:
        self.model = model
        self.plan = plan
        self.target = target
        self.path = path

    @classmethod
    def from_gguf(cls, path: str | Path, target: Gemma4, *, fuse: bool = True, dequantize: bool = False) -> Drafter:
        """Opens the GGUF file of a drafter (`gemma4-assistant`) for `target`, on its device and in its dtype.

        fuse, dequantize: as for `Gemma4.from_gguf`.
        Raises DrafterMismatchError where it was made for another model, and the errors of `Gemma4.from_gguf`:
        DoesNotFitError where the GPU has no room for it beside what a generation of `target` takes.
        """
        device, dtype = target.device, target.model.dtype
        with GGUFFile.open(path) as file:
            config = DrafterConfig.from_gguf(file)
            check_pair(config, file.metadata, target.config, target.metadata, file.path)
            plan = plan_drafter(file, config, fuse=fuse)
            if dequantize:
                plan = plan.dense(_DENSE_TYPES[dtype])
            require_memory(
                target.config,
                target.plan,
                device,
                dtype,
                target.max_seq_len,
                file.path,
                target.kv_cache,
                drafter=(config, plan),
                held_bytes=target.held_bytes,
            )
            model = DrafterModel(config, plan, dtype, device)
            with progress_bar(f"loading {file.path.name}", sum(entry.file_bytes for entry in plan.entries)) as progress:
                load_weights(model, plan, file, device, progress)
            return cls(model.eval(), plan, target.model, file.path)

    @property
    def config(self) -> DrafterConfig:
        config = self.model.config
        assert isinstance(config, DrafterConfig)
        return config

    def check_target(self, model: TextModel) -> None:
        """Raises DrafterMismatchError unless `model` is the one this drafter was loaded for."""
        if model is not self.target:
            message = f"loaded for another model than this one, {model.config.name!r}; load it with this model"
            raise DrafterMismatchError(message, path=self.path)

    def propose(self, token: Tensor, hidden: Tensor, position: Tensor, cache: KVCache, count: int) -> Tensor:
        """The `count` likeliest next tokens, int64 [count], one after another.

        token, position: int64 [1], the last known token; hidden: float32 [1, B], of the token before it, after the
        target's last norm; cache: of the target. Does not wait for the device.
        """
        caches: list[AttentionCache] = []
        for layer in self.config.layers:
            source = shared_layer(self.target.config, layer.kind)
            assert source is not None, "checked when the drafter was loaded"
            k_weight = self.target.get_parameter(f"layers.{source}.self_attn.k_norm.weight")
            caches.append(TargetCache(cache.own[source], k_weight))
        drafts: list[Tensor] = []
        for _ in range(count):
            logits, hidden = self.model(self.target.embed(token), hidden, position, caches)
            token = logits.argmax(dim=-1)
            drafts.append(token)
        return torch.cat(drafts) if drafts else token[:0]
