"""The largest sum of tensors alive at a time in one pass of the model, and while it loads; from shapes, no torch.

It follows `gemma4.model`: what a layer's caller holds, what attention, MLP, experts and per-layer inputs add at their
widest, and the weights that are decoded for a product. It grows with the tokens of a pass, not with the context.

Letters: T tokens of the pass, H hidden size, b bytes of an activation, N and K rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from gemma4.config import Gemma4Config, LayerConfig, LayerKind
from gemma4.kernels.pieces import SCRATCH_BYTES, SLICED_BYTES, piece_rows
from gemma4.quant.ggml_types import GGMLType, row_bytes
from gemma4.quant.plan import LoadEntry, LoadPlan

# Limits of `gemma4.quant.linear` and `gemma4.quant.loader`, here so that planning does not import torch.
CHUNK_BYTES: Final = 64 << 20
LOADER_SLICE_BYTES: Final = 32 << 20
LOADER_WORKERS: Final = 6
MATVEC_TYPES: Final = frozenset(
    {
        GGMLType.Q4_0,
        GGMLType.Q4_1,
        GGMLType.Q5_0,
        GGMLType.Q5_1,
        GGMLType.Q8_0,
        GGMLType.Q4_K,
        GGMLType.Q5_K,
        GGMLType.Q6_K,
    }
)

# Most bytes alive while torch decodes a type, in bytes of its float32 result.
_DECODE_FACTOR: Final[Mapping[GGMLType, float]] = {
    GGMLType.Q5_0: 3.5,
    GGMLType.Q5_1: 3.5,
    GGMLType.Q5_K: 3.5,
    GGMLType.Q6_K: 4.3,
    GGMLType.IQ4_NL: 2.5,
    GGMLType.IQ4_XS: 2.5,
    GGMLType.MXFP4: 2.5,
}
_OTHER_FACTOR: Final = 2.85
# Dense matrices that are multiplied as they are, by bytes of an activation.
_MULTIPLIED: Final = {4: GGMLType.F32, 2: GGMLType.BF16}

# Matrices that are multiplied by dense rows beside packed ones.
_NEVER_PACKED: Final = ("embed_tokens_per_layer.weight", "per_layer_model_projection.weight", "router.proj.weight")

# Most bytes beside its slice that a worker of the loader needs to unpack one.
UNPACKING_BYTES: Final = 20 << 20

_Matrices = Mapping[str, LoadEntry]


class Workspace:
    """Bytes of activations and decoded weights of a model in passes of any length. itemsize: of an activation."""

    def __init__(self, config: Gemma4Config, plan: LoadPlan, itemsize: int) -> None:
        self.config = config
        self.itemsize = itemsize
        layers: list[dict[str, LoadEntry]] = [{} for _ in config.layers]
        matrices = [entry for entry in plan.entries if len(entry.shape) > 1]
        for entry in matrices:
            scope, _, rest = entry.target.partition(".")
            if scope == "layers":
                index, _, name = rest.partition(".")
                layers[int(index)][name] = entry
        self._others = {e.target.removesuffix(".weight"): e for e in matrices if not e.target.startswith("layers.")}
        # Layers that are equal but for their place need no second look.
        kinds = {
            (layer, tuple((name, e.type, e.shape) for name, e in own.items())): own
            for layer, own in zip(config.layers, layers, strict=True)
        }
        self._layers = [(layer, own) for (layer, _), own in kinds.items()]
        self._is_packed = itemsize == 2 and all(
            e.type in MATVEC_TYPES for e in matrices if not e.target.endswith(_NEVER_PACKED)
        )

    def prefill_bytes(self, tokens: int) -> int:
        """Most bytes alive in a pass over a chunk."""
        return int(self._carried_bytes(tokens) + max(map(sum, self._stages(tokens))))

    def prefill_blocks(self, tokens: int) -> tuple[int, int]:
        """Bytes of two blocks of memory that hold all tensors of a pass over a chunk, in whatever order they come.

        One is for what passes from layer to layer: the residual stream, its norm and a branch, which trade places. So
        the other, for what a layer adds to them, is whole again each time.
        """
        streams = tokens * self.config.hidden_size * (4 + 2 * self.itemsize) + 2 * self._own_input_bytes(tokens)
        return streams, int(max(beside for _, beside in self._stages(tokens)))

    def _own_input_bytes(self, tokens: int) -> int:
        """Of the per-layer inputs of all layers."""
        return 4 * tokens * self.config.num_hidden_layers * self.config.hidden_size_per_layer_input

    def _carried_bytes(self, tokens: int) -> int:
        """What is there all the time: the residual stream in float32, and the per-layer inputs."""
        return 4 * tokens * self.config.hidden_size + self._own_input_bytes(tokens)

    def _stages(self, tokens: int) -> Iterator[tuple[float, float]]:
        """Bytes alive beyond that at the widest moments of a pass: norms and branches, and what is beside them."""
        carried, own_inputs = self._carried_bytes(tokens), self._own_input_bytes(tokens)
        embedded = 4 * tokens * self.config.hidden_size * decode_factor(self._others["embed_tokens"].type)
        yield 0, embedded - carried
        yield 0, 4 * own_inputs + self._scratch(self._others, "per_layer_model_projection", tokens)
        for layer, matrices in self._layers:
            yield from self._layer_stages(layer, matrices, tokens)

    def decode_bytes(self) -> int:
        """Most bytes alive in a pass over one token: logits, and what is decoded where no kernel reads packed rows."""
        config = self.config
        tables = {"embed_tokens_per_layer", "embed_tokens" if "lm_head" in self._others else ""}
        products = {name: entry for name, entry in self._others.items() if name not in tables}
        stages = [0.0 if self._is_packed else self._scratch(products, "", 1)]
        for _, matrices in self._layers:
            for name, entry in matrices.items():
                if name.startswith("experts."):
                    chosen = entry.numel * config.num_experts_per_tok // config.num_experts
                    stages.append(4 * chosen * decode_factor(entry.type))
                elif not self._is_packed:
                    stages.append(self._scratch({name: entry}, "", 1))
        return int(3 * 4 * config.vocab_size + max(stages))

    def _layer_stages(self, layer: LayerConfig, matrices: _Matrices, tokens: int) -> Iterator[tuple[float, float]]:
        """Of one layer."""
        b, hidden = self.itemsize, tokens * self.config.hidden_size
        q = tokens * layer.num_attention_heads * layer.head_dim * b
        kv = 0 if layer.kv_source is not None else tokens * layer.num_key_value_heads * layer.head_dim * b
        x = hidden * b  # a norm, or a branch
        projected = q + (kv if layer.k_eq_v else 2 * kv)
        yield x, projected + self._scratch(matrices, "self_attn.", tokens)
        # Normalised heads beside the projections; then with attention's output.
        yield 0, projected + q + 2 * kv
        yield 0, 2 * q + max(2 * kv, self._sliced(layer))
        yield x, q + self._scratch(matrices, "self_attn.o_proj", tokens)
        yield 2 * x, 0  # a branch, and the norm of the stream that it was added to
        ffn = tokens * layer.intermediate_size * b
        fused = matrices.get("mlp.gate_up_proj.weight")
        if fused is not None and fused.type in MATVEC_TYPES:
            yield x, ffn + self._gated(fused, tokens)
        else:
            yield x, 2 * ffn + max(self._scratch(matrices, f"mlp.{name}", tokens) for name in ("gate", "up"))
            yield x, 3 * ffn
        yield x, ffn + self._scratch(matrices, "mlp.down_proj", tokens)
        if self.config.num_experts:
            # The MLP's output, normed rows, the sum, and one expert that every token may have chosen.
            around = hidden * (2 * b + 4 + 4)
            expert = hidden * (2 * b + 8) + tokens * self.config.moe_intermediate_size * 6 * b
            yield 0, around + expert + self._scratch(matrices, "experts.", tokens)

    def _sliced(self, layer: LayerConfig) -> int:
        """Bytes in `gemma4.kernels.tq4_prefill`: a decoded slice of keys and values, and the state of its softmax."""
        return SLICED_BYTES if layer.kind is LayerKind.FULL else 0

    def _gated(self, fused: LoadEntry, tokens: int) -> float:
        """Bytes in `gemma4.kernels.gated_linear` beside its result: two pieces of products and one of weights."""
        n, k = fused.shape
        rows = piece_rows(n // 2, 2 * k * self.itemsize, SCRATCH_BYTES["cuda"])
        return (2 * tokens * rows + rows * k) * self.itemsize

    def _scratch(self, matrices: _Matrices, prefix: str, tokens: int) -> float:
        """Bytes of decoded weights in the widest product of the weights whose names begin so."""
        sizes = (self._decoded(name, e, tokens) for name, e in matrices.items() if name.startswith(prefix))
        return max(sizes, default=0.0)

    def _decoded(self, name: str, entry: LoadEntry, tokens: int) -> float:
        k, b = entry.shape[-1], self.itemsize
        n = entry.numel // k // (self.config.num_experts if name.startswith("experts.") else 1)
        if entry.type in MATVEC_TYPES:
            return piece_rows(n, k * b, SCRATCH_BYTES["cuda"]) * k * b
        if entry.type is _MULTIPLIED[b]:
            return 0
        rows = min(n, max(1, CHUNK_BYTES // (4 * k)))
        joined = tokens * n * b if rows < n else 0  # the pieces of the product, beside their whole
        return rows * k * (4 * decode_factor(entry.type) + b) + joined


def decode_factor(kind: GGMLType) -> float:
    """Bytes that torch needs to decode a type, in bytes of the float32 result."""
    return _DECODE_FACTOR.get(kind, _OTHER_FACTOR)


def loading_bytes(plan: LoadPlan) -> int:
    """Most bytes alive beside the weights while a plan loads onto a GPU."""
    return int(LOADER_WORKERS * max(LOADER_SLICE_BYTES + _unpacking_bytes(entry) for entry in plan.entries))


def _unpacking_bytes(entry: LoadEntry) -> float:
    if entry.type is entry.file_type:
        return UNPACKING_BYTES
    k = entry.shape[-1]
    rows = min(entry.numel // k, max(1, LOADER_SLICE_BYTES // row_bytes(entry.file_type, k)))
    return 4 * rows * k * (1 + decode_factor(entry.file_type))
