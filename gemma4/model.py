"""The decoder of Gemma 4 and Gemma 3 text models, packed weights in, logits out.

The residual stream stays in float32; matrix products run in `dtype`. Weights are built on the meta device in the
formats that a load plan names, so a fused projection is the module that exists, not a later patch. Graph rules follow
Hugging Face's and llama.cpp's Gemma 3 and Gemma 4 implementations.

Letters: T tokens of this pass, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gemma4.cache import AttentionCache, HeadTransform, KVCache
from gemma4.config import Gemma4Config, LayerConfig, LayerKind
from gemma4.experts import Experts, Router
from gemma4.kernels.fused_norm import rms_norm_reference
from gemma4.kernels.packed_matvec import MAX_ROWS
from gemma4.quant.errors import MissingTensorError
from gemma4.quant.linear import MATVEC_OPS, Embedding, Linear, Rows
from gemma4.quant.packed_weight import PackedWeight
from gemma4.quant.plan import LoadEntry, LoadPlan
from gemma4.quant.reserve import reserve_blocks
from gemma4.ring import chunk_size
from gemma4.rope import inverse_frequencies
from gemma4.rows import DenseRows, PackedRows, RMSNorm, RowMaker, closed
from gemma4.workspace import Workspace


class Weights:
    """Makes the modules of one scope ("layers.3.mlp.") in the formats of a load plan."""

    def __init__(self, entries: Mapping[str, LoadEntry], scope: str = "") -> None:
        self.entries = entries
        self.scope = scope

    def within(self, name: str) -> Weights:
        return Weights(self.entries, f"{self.scope}{name}.")

    def has(self, name: str) -> bool:
        return f"{self.scope}{name}.weight" in self.entries

    def _entry(self, name: str) -> LoadEntry:
        target = f"{self.scope}{name}.weight"
        if target not in self.entries:
            raise MissingTensorError("no transform of this architecture fills the weight", field=target)
        return self.entries[target]

    def packed(self, name: str) -> PackedWeight:
        entry = self._entry(name)
        n, k = entry.shape
        return PackedWeight(entry.type, (n, k), in_host_memory=entry.in_host_memory)

    def linear(self, name: str, out_dtype: torch.dtype = torch.float32) -> Linear:
        scale = self.entries.get(f"{self.scope}{name}.scale")
        return Linear(self.packed(name), out_dtype, 0 if scale is None else scale.shape[0])

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self._entry(name).shape[0], eps)


class Stream:
    """What a pass takes from layer to layer. Tensors are replaced in it, so that none outlives its last use.

    h: float32 [T, H], the residual stream. x: rows [T, H], its norm for the next branch; set before a layer runs.
    """

    def __init__(self, h: Tensor, x: Rows = ()) -> None:
        self.h = h
        self.x = x

    def take(self) -> Rows:
        """x, which the stream then no longer holds."""
        x, self.x = self.x, ()
        return x

    def add(self, y: Tensor, make: RowMaker, post_norm: RMSNorm, scale: Tensor | None, norm: RMSNorm) -> None:
        """Adds the branch y [T, H], through `post_norm`; x is then for the branch that begins with `norm`."""
        self.h, self.x = make.residual_normed(self.h, y, post_norm, scale, norm)


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

    def forward(self, stream: Stream, make: RowMaker) -> Tensor:
        out: Tensor = self.down_proj(self._gated(stream.take(), make))
        return out

    def _gated(self, x: Rows, make: RowMaker) -> Rows:
        """The input of the last product; gate and up, the widest tensors of a pass, do not outlive this."""
        if self.is_fused:
            return make.gated(x, self.gate_up_proj)
        return make.gelu_mul(self.gate_proj(x), self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention with normalised q and k; K = V layers have no v_proj and take V from the raw keys.

    q, k and v, or q and k, are one matrix where the plan fuses them.
    """

    def __init__(self, config: Gemma4Config, layer: LayerConfig, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = config.query_scale
        self.has_v_norm = config.has_v_norm
        kv_size = layer.num_key_value_heads * layer.head_dim
        self.sizes = {"q": layer.num_attention_heads * layer.head_dim, "k": kv_size, "v": kv_size}
        fused = next((name for name in ("qkv_proj", "qk_proj") if weights.has(name)), None)
        has_kv = layer.kv_source is None
        names = [fused] if fused else ["q_proj", "k_proj"] if has_kv else ["q_proj"]
        if has_kv and fused != "qkv_proj" and not layer.k_eq_v:
            names.append("v_proj")
        self.projections = tuple(names)
        for name in self.projections:
            self.add_module(name, weights.linear(name, dtype))
        self.q_norm = weights.norm("q_norm", config.rms_norm_eps)
        self.k_norm = weights.norm("k_norm", config.rms_norm_eps) if has_kv else None
        self.o_proj = weights.linear("o_proj")

    def forward(
        self, stream: Stream, make: RowMaker, input_pos: Tensor, inv_freq: Tensor, cache: AttentionCache
    ) -> Tensor:
        k_weight = None if self.k_norm is None else self.k_norm.weight
        rope = HeadTransform(self.q_norm.weight, k_weight, inv_freq, self.q_norm.eps, self.has_v_norm)
        raw = self._projected(stream.take())
        # Taken out: the cache alone holds them, and lets them go.
        rows = cache.attend(raw.pop("q"), raw.pop("k", None), raw.pop("v", None), rope, input_pos, self.scale, make)
        out: Tensor = self.o_proj(rows)
        return out

    def _projected(self, x: Rows) -> dict[str, Tensor]:
        """Rows [T, H * D] of the parts "q", "k" and "v" that this layer has."""
        projected: dict[str, Tensor] = {}
        for name in self.projections:
            parts = name.removesuffix("_proj")
            rows = self.get_submodule(name)(x).split([self.sizes[part] for part in parts], dim=-1)
            projected |= zip(parts, rows, strict=True)
        return projected


class DecoderLayer(nn.Module):
    """Attention and MLP, each between a norm before and a norm after, added to the residual stream.

    Layers of 26B-A4B add experts to the MLP. Layers of E2B and E4B have a third branch: an embedding of the token that
    is the layer's own, let in by a gate.
    """

    def __init__(self, config: Gemma4Config, layer: LayerConfig, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.kind = layer.kind
        self.input_layernorm = weights.norm("input_layernorm", eps)
        self.self_attn = Attention(config, layer, weights.within("self_attn"), dtype)
        self.post_attention_layernorm = weights.norm("post_attention_layernorm", eps)
        self.pre_feedforward_layernorm = weights.norm("pre_feedforward_layernorm", eps)
        self.mlp = MLP(weights.within("mlp"))
        self.post_feedforward_layernorm = weights.norm("post_feedforward_layernorm", eps)
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.dtype = dtype
            self.router = Router(weights.linear("router.proj"), config.num_experts_per_tok, eps)
            expert_weights = weights.within("experts")
            names = ["gate_up_proj"] if config.has_joined_experts else ["gate_proj", "up_proj"]
            first = {name: expert_weights.linear(name) for name in names}
            self.experts = Experts(first, expert_weights.linear("down_proj"), config.num_experts)
            self.post_feedforward_layernorm_1 = weights.norm("post_feedforward_layernorm_1", eps)
            self.pre_feedforward_layernorm_2 = weights.norm("pre_feedforward_layernorm_2", eps)
            self.post_feedforward_layernorm_2 = weights.norm("post_feedforward_layernorm_2", eps)
        self.has_per_layer_input = config.hidden_size_per_layer_input > 0
        if self.has_per_layer_input:
            self.per_layer_input_gate = weights.linear("per_layer_input_gate")
            self.per_layer_projection = weights.linear("per_layer_projection")
            self.post_per_layer_input_norm = weights.norm("post_per_layer_input_norm", eps)
        scalar = torch.empty(1, dtype=torch.float32, device="meta") if config.has_layer_scalar else None
        self.layer_scalar = None if scalar is None else nn.Parameter(scalar, requires_grad=False)

    @property
    def closing_norm(self) -> RMSNorm:
        """The norm after the last branch."""
        return self.post_per_layer_input_norm if self.has_per_layer_input else self.post_feedforward_layernorm

    def forward(
        self,
        stream: Stream,
        make: RowMaker,
        input_pos: Tensor,
        inv_freq: Tensor,
        cache: AttentionCache,
        per_layer_input: Tensor | None,
    ) -> Tensor:
        """stream: with this layer's input norm; per_layer_input: [T, P], the layer's own embeddings.

        Returns the last branch, which is still to be added, through `closing_norm`.
        """
        attended = self.self_attn(stream, make, input_pos, inv_freq, cache)
        stream.add(attended, make, self.post_attention_layernorm, None, self.pre_feedforward_layernorm)
        del attended  # the MLP is the widest part of a pass
        y: Tensor = self.mlp(stream, make)
        if self.has_experts:
            y = self.add_experts(stream.h, y)
        if per_layer_input is None:
            return y
        stream.h = closed(stream.h, y, self.post_feedforward_layernorm)
        gate = self.per_layer_input_gate(make.plain(stream.h))
        own: Tensor = self.per_layer_projection(make.gelu_mul(gate, per_layer_input.to(gate.dtype)))
        return own

    def add_experts(self, h: Tensor, y: Tensor) -> Tensor:
        """y, the shared MLP's output, plus the experts' for the residual stream h, both normalised; float32 [T, H]."""
        before, after, shared = (
            self.pre_feedforward_layernorm_2,
            self.post_feedforward_layernorm_2,
            self.post_feedforward_layernorm_1,
        )
        experts = self.experts(rms_norm_reference(h, before.weight, before.eps).to(self.dtype), *self.router(h))
        return rms_norm_reference(y, shared.weight, shared.eps) + rms_norm_reference(experts, after.weight, after.eps)


class Decoder(nn.Module):
    """Decoder layers between an embedding table and a head. Built on the meta device; `gemma4.quant.loader` gives it
    its weights.
    """

    def __init__(self, config: Gemma4Config, plan: LoadPlan, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        weights = Weights(plan.by_target())
        embeddings = weights.packed("embed_tokens")
        self.embed_tokens = Embedding(embeddings)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, weights.within(f"layers.{i}"), dtype) for i, layer in enumerate(config.layers)
        )
        self.norm = weights.norm("norm", config.rms_norm_eps)
        is_tied = config.tie_word_embeddings
        self.lm_head = Linear(embeddings, torch.float32) if is_tied else weights.linear("lm_head")
        for kind in LayerKind:
            example = next((layer for layer in config.layers if layer.kind is kind), None)
            frequencies = [] if example is None else inverse_frequencies(config, example)
            inv_freq = nn.Parameter(torch.tensor(frequencies, dtype=torch.float32, device=device), requires_grad=False)
            self.register_parameter(f"inv_freq_{kind}", inv_freq if frequencies else None)
        dense = ("embed_tokens_per_layer.weight", "per_layer_model_projection.weight", "router.proj.weight")
        matrices = (e for e in plan.entries if len(e.shape) > 1 and not e.target.endswith(dense))
        has_matvecs = all(e.type in MATVEC_OPS for e in matrices)
        # Up to this many tokens go through the packed matvec kernels.
        self.max_packed_rows = MAX_ROWS if has_matvecs and device.type == "cuda" and dtype == torch.bfloat16 else 0

    def rows_for(self, num_tokens: int) -> RowMaker:
        """The form of rows that is best for this many tokens."""
        return PackedRows() if num_tokens <= self.max_packed_rows else DenseRows(self.dtype)

    def run_layers(
        self,
        stream: Stream,
        per_layer_inputs: Sequence[Tensor | None],
        input_pos: Tensor,
        caches: Sequence[AttentionCache],
        make: RowMaker,
    ) -> tuple[Tensor, Tensor]:
        """stream: of the first layer's input. Returns h and the last branch, which `head` adds."""
        layers = cast("Sequence[DecoderLayer]", list(self.layers))  # one object a layer: tracers make one per access
        last = layers[-1]
        next_norms = [layer.input_layernorm for layer in layers[1:]] + [self.norm]
        stream.x = make.normed(stream.h, layers[0].input_layernorm)
        for layer, cache, next_norm, own_input in zip(layers, caches, next_norms, per_layer_inputs, strict=True):
            inv_freq = getattr(self, f"inv_freq_{layer.kind}")
            y = layer(stream, make, input_pos, inv_freq, cache, own_input)
            if layer is not last:
                stream.add(y, make, layer.closing_norm, layer.layer_scalar, next_norm)
                del y
        return stream.h, y

    def head(self, h: Tensor, y: Tensor, make: RowMaker) -> tuple[Tensor, Tensor]:
        """Of what `run_layers` returned: logits float32 [T, vocab_size], and h float32 [T, H] before the last norm."""
        last = cast("DecoderLayer", self.layers[-1])
        h, x = make.residual_normed(h, y, last.closing_norm, last.layer_scalar, self.norm)
        logits: Tensor = self.lm_head(x).float()
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)  # in place: the widest rows there are
        return logits, h


class TextModel(Decoder):
    """Token ids to logits."""

    def __init__(self, config: Gemma4Config, plan: LoadPlan, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, plan, dtype, device)
        self.workspace = Workspace(config, plan, dtype.itemsize)
        if config.hidden_size_per_layer_input:
            weights = Weights(plan.by_target())
            self.embed_tokens_per_layer = Embedding(weights.packed("embed_tokens_per_layer"))
            self.per_layer_model_projection = weights.linear("per_layer_model_projection")
            self.per_layer_projection_norm = weights.norm("per_layer_projection_norm", config.rms_norm_eps)

    def reserve_workspace(self, num_tokens: int) -> None:
        """Has PyTorch hold the memory for running so many tokens, at most a chunk at a time. On a CPU does nothing.

        Without it PyTorch would take memory tensor by tensor, and then more of it where what is free is in pieces.
        """
        device = self.norm.weight.device
        if device.type == "cuda" and num_tokens > self.max_packed_rows:
            # The BLAS keeps a workspace from its first product on, which must not be cut from these blocks.
            square = torch.ones(16, 16, dtype=self.dtype, device=device)
            torch.mm(square, square)
            tokens = chunk_size(self.config.sliding_window, num_tokens)
            reserve_blocks(self.workspace.prefill_blocks(tokens), device)

    def forward(
        self,
        tokens: Tensor,
        input_pos: Tensor,
        cache: KVCache,
        num_logits: int | None = 1,
        rows: RowMaker | None = None,
    ) -> Tensor:
        """tokens, input_pos: int64 [T], consecutive positions. Returns float32 [num_logits, vocab_size].

        num_logits: how many of the last positions to return, None for all T. rows: their form, by default the best for
        T; an exporter fixes it, because a graph whose T is open cannot choose.
        """
        make = rows or self.rows_for(tokens.shape[0])
        h, y = self.run(tokens, input_pos, cache.layers, make)
        cache.commit(input_pos)
        if num_logits == 0:
            return h.new_empty(0, self.config.vocab_size)
        if num_logits is not None:
            h, y = h[-num_logits:], y[-num_logits:]
        return self.head(h, y, make)[0]

    def run(
        self, tokens: Tensor, input_pos: Tensor, caches: Sequence[AttentionCache], make: RowMaker
    ) -> tuple[Tensor, Tensor]:
        """tokens, input_pos: int64 [T]. Returns what `head` takes."""
        stream = Stream(self.embed(tokens))
        return self.run_layers(stream, self.per_layer_inputs(tokens, stream.h), input_pos, caches, make)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [T]. Returns float32 [T, H]."""
        h: Tensor = self.embed_tokens(tokens) * self.config.hidden_size**0.5
        return h

    def per_layer_inputs(self, tokens: Tensor, h: Tensor) -> Sequence[Tensor | None]:
        """What each layer adds of its own, [T, P] float32: from the token's id and from its embedding h [T, H]."""
        size = self.config.hidden_size_per_layer_input
        if not size:
            return [None] * len(self.layers)
        norm = self.per_layer_projection_norm
        from_id = self.embed_tokens_per_layer(tokens).unflatten(1, (-1, size)) * size**0.5
        projected = self.per_layer_model_projection((h.to(self.dtype),)).float() * self.config.hidden_size**-0.5
        from_embedding = rms_norm_reference(projected.unflatten(1, (-1, size)), norm.weight, norm.eps)
        inputs: Tensor = ((from_id + from_embedding) * 2**-0.5).transpose(0, 1).contiguous()
        return inputs.unbind()
