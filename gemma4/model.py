"""The decoder of Gemma 4 and Gemma 3 text models, packed weights in, logits out.

The residual stream stays in float32; matrix products run in `dtype`. Weights are built on the meta device in the
formats that a load plan names, so a fused projection is the module that exists, not a later patch. Graph rules follow
Hugging Face's and llama.cpp's Gemma 3 and Gemma 4 implementations.

Letters: T tokens of this pass, H hidden size, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma4.cache import KVCache, LayerCache
from gemma4.config import Gemma4Config, LayerConfig, LayerKind
from gemma4.kernels.rope_cache import qk_norm_rope
from gemma4.quant.linear import Embedding, Linear, PackedWeight
from gemma4.quant.plan import LoadEntry, LoadPlan
from gemma4.rope import inverse_frequencies


class Weights:
    """Makes the modules of one scope ("layers.3.mlp.") in the formats of a load plan."""

    def __init__(self, entries: dict[str, LoadEntry], scope: str = "") -> None:
        self.entries = entries
        self.scope = scope

    def within(self, name: str) -> Weights:
        return Weights(self.entries, f"{self.scope}{name}.")

    def has(self, name: str) -> bool:
        return f"{self.scope}{name}.weight" in self.entries

    def packed(self, name: str) -> PackedWeight:
        entry = self.entries[f"{self.scope}{name}.weight"]
        n, k = entry.shape
        return PackedWeight(entry.type, (n, k))

    def linear(self, name: str) -> Linear:
        return Linear(self.packed(name))

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self.entries[f"{self.scope}{name}.weight"].shape[0], eps)


def _parameter(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=torch.float32, device="meta"), requires_grad=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (arXiv 1910.07467); x [..., size] of any dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(size)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(dtype)


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)); gate and up are one matrix where the plan fuses them."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.is_fused = weights.has("gate_up_proj")
        if self.is_fused:
            self.gate_up_proj = weights.linear("gate_up_proj")
        else:
            self.gate_proj = weights.linear("gate_proj")
            self.up_proj = weights.linear("up_proj")
        self.down_proj = weights.linear("down_proj")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.is_fused else (self.gate_proj(x), self.up_proj(x))
        out: Tensor = self.down_proj(F.gelu(gate, approximate="tanh") * up)
        return out


class Attention(nn.Module):
    """Grouped-query attention with normalised q and k; K = V layers have no v_proj and take V from the raw keys."""

    def __init__(self, config: Gemma4Config, layer: LayerConfig, weights: Weights) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.scale = config.query_scale
        self.has_v_norm = config.has_v_norm
        self.q_proj = weights.linear("q_proj")
        self.k_proj = weights.linear("k_proj")
        self.v_proj = None if layer.k_eq_v else weights.linear("v_proj")
        self.q_norm = weights.norm("q_norm", config.rms_norm_eps)
        self.k_norm = weights.norm("k_norm", config.rms_norm_eps)
        self.o_proj = weights.linear("o_proj")

    def forward(self, x: Tensor, input_pos: Tensor, inv_freq: Tensor, cache: LayerCache) -> Tensor:
        q, k, v = qk_norm_rope(
            self.q_proj(x),
            self.k_proj(x),
            None if self.v_proj is None else self.v_proj(x),
            self.q_norm.weight,
            self.k_norm.weight,
            inv_freq,
            input_pos,
            self.q_norm.eps,
            self.has_v_norm,
        )
        heads = cache.attend(q, k, v, input_pos, self.scale)  # [1, heads, T, D]
        out: Tensor = self.o_proj(heads[0].transpose(0, 1).flatten(1))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each between a norm before and a norm after, added to the residual stream."""

    def __init__(self, config: Gemma4Config, layer: LayerConfig, weights: Weights) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.kind = layer.kind
        self.input_layernorm = weights.norm("input_layernorm", eps)
        self.self_attn = Attention(config, layer, weights.within("self_attn"))
        self.post_attention_layernorm = weights.norm("post_attention_layernorm", eps)
        self.pre_feedforward_layernorm = weights.norm("pre_feedforward_layernorm", eps)
        self.mlp = MLP(weights.within("mlp"))
        self.post_feedforward_layernorm = weights.norm("post_feedforward_layernorm", eps)
        self.layer_scalar = _parameter(1) if config.has_layer_scalar else None

    def forward(self, h: Tensor, input_pos: Tensor, inv_freq: Tensor, cache: LayerCache, dtype: torch.dtype) -> Tensor:
        attn = self.self_attn(self.input_layernorm(h, dtype), input_pos, inv_freq, cache)
        h = h + self.post_attention_layernorm(attn, torch.float32)
        mlp = self.mlp(self.pre_feedforward_layernorm(h, dtype))
        h = h + self.post_feedforward_layernorm(mlp, torch.float32)
        return h if self.layer_scalar is None else h * self.layer_scalar


class TextModel(nn.Module):
    """Token ids to logits. Built on the meta device; `gemma4.quant.loader` gives it its weights."""

    def __init__(self, config: Gemma4Config, plan: LoadPlan, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        weights = Weights(plan.by_target())
        embeddings = weights.packed("embed_tokens")
        self.embed_tokens = Embedding(embeddings)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, weights.within(f"layers.{i}")) for i, layer in enumerate(config.layers)
        )
        self.norm = weights.norm("norm", config.rms_norm_eps)
        self.lm_head = Linear(embeddings) if config.tie_word_embeddings else weights.linear("lm_head")
        for kind in LayerKind:
            example = next((layer for layer in config.layers if layer.kind is kind), None)
            frequencies = None if example is None else inverse_frequencies(config, example, device)
            self.register_parameter(
                f"inv_freq_{kind}", None if frequencies is None else nn.Parameter(frequencies, requires_grad=False)
            )

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: KVCache, num_logits: int | None = 1) -> Tensor:
        """tokens, input_pos: int64 [T], consecutive positions. Returns float32 [num_logits, vocab_size].

        num_logits: how many of the last positions to return, None for all T.
        """
        h = self.embed_tokens(tokens) * self.config.hidden_size**0.5
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            h = layer(h, input_pos, getattr(self, f"inv_freq_{layer.kind}"), layer_cache, self.dtype)
        if num_logits is not None:
            h = h[h.shape[0] - num_logits :]
        logits: Tensor = self.lm_head(self.norm(h, self.dtype)).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap
