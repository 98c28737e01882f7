"""Complete Gemma 4 and Gemma 3 GGUF files of any size: metadata, tensors and weights from ggml's own encoders.

    model = gemma4(types={"ffn_gate": "Q4_K", "blk.1.ffn_up": "Q6_K"})
    path = model.write(tmp_path / "good.gguf")
    del model.tensors["blk.0.attn_q.weight"]               # a damaged file is an edit of the two dictionaries
    model.metadata["gemma4.rope.freq_base"] = 0.0
    path = model.write_sparse(tmp_path / "bad.gguf")       # header and holes: a 31B file takes no disk

Files are written by gguf-py; equal models and seeds give equal bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

ALIGNMENT = 32


@dataclass(frozen=True)
class Sizes:
    """Pairs are (sliding layers, full layers). ffn: one size, or one per layer. period: every period-th is full."""

    layers: int
    hidden: int
    ffn: int | tuple[int, ...]
    heads: int
    kv_heads: tuple[int, int]
    head_dim: tuple[int, int]
    vocab: int = 262144
    window: int = 1024
    context: int = 262144
    period: int = 6
    k_eq_v: bool = True

    def is_full(self, layer: int) -> bool:
        return (layer + 1) % self.period == 0

    def ffn_of(self, layer: int) -> int:
        return self.ffn if isinstance(self.ffn, int) else self.ffn[layer]


# No two sizes are equal, so that a mix-up of dimensions shows.
TINY = Sizes(4, 256, 768, 8, (2, 1), (64, 128), vocab=320, window=16, context=512, period=2)
GEMMA4_31B = Sizes(60, 5376, 21504, 32, (16, 4), (256, 512))
GEMMA4_12B = Sizes(48, 3840, 15360, 16, (8, 1), (256, 512))
# Of the next three the dense part only: per-layer inputs, shared layers and experts are metadata and tensors beside it.
GEMMA4_26B = Sizes(30, 2816, 2112, 16, (8, 2), (256, 512))
GEMMA4_E4B = Sizes(42, 2560, 10240, 8, (2, 2), (256, 512), window=512, context=131072, k_eq_v=False)
GEMMA4_E2B = Sizes(
    35, 1536, (6144,) * 15 + (12288,) * 20, 8, (1, 1), (256, 512), window=512, context=131072, period=5, k_eq_v=False
)
TINY_GEMMA3 = Sizes(7, 256, 768, 8, (2, 2), (64, 64), vocab=320, window=16, context=512, k_eq_v=False)
GEMMA3_27B = Sizes(62, 5376, 21504, 32, (16, 16), (128, 128), context=131072, k_eq_v=False)


@dataclass(frozen=True)
class Tensor:
    """shape: torch order. type: name of a ggml type."""

    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return prod(self.shape) // block * size


@dataclass
class Model:
    """A file to be. Edit `metadata` and `tensors` before writing; `values` fixes the content of a tensor (float32)."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0

    def rename(self, old: str, new: str) -> None:
        self.tensors = {new if name == old else name: tensor for name, tensor in self.tensors.items()}

    def reshape(self, name: str, *shape: int) -> None:
        self.tensors[name] = replace(self.tensors[name], shape=shape)

    def retype(self, name: str, kind: str) -> None:
        self.tensors[name] = replace(self.tensors[name], type=kind)

    def weights(self, name: str) -> np.ndarray:
        """float32, before encoding."""
        if name in self.values:
            return self.values[name]
        shape = self.tensors[name].shape
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        noise = rng.standard_normal(shape, dtype=np.float32)
        return 1 + 0.1 * noise if len(shape) == 1 else noise * np.float32(shape[-1] ** -0.5)

    def encoded(self, name: str) -> np.ndarray:
        """uint8, as the file stores it."""
        kind = GGMLQuantizationType[self.tensors[name].type]
        return libgguf.quantize_rows(self.weights(name), kind.value).view(np.uint8)

    def write(self, path: Path, *, split_tensors: int = 0) -> Path:
        """The whole file; with split_tensors a set of parts with that many tensors each. Returns the (first) file."""
        writer = GGUFWriter(path, "", split_max_tensors=split_tensors)
        self._add_metadata(writer)
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, self.encoded(name), raw_dtype=GGMLQuantizationType[tensor.type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return writer.format_shard_names(path)[0]

    def write_sparse(self, path: Path) -> Path:
        """The header and a hole for the weights, but for those in `values`."""
        writer = GGUFWriter(path, "")
        self._add_metadata(writer)
        for name, tensor in self.tensors.items():
            kind = GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        offset = GGUFWriter.ggml_pad(file.tell(), ALIGNMENT)
        for name, tensor in self.tensors.items():
            if name in self.values:
                file.seek(offset)
                file.write(self.encoded(name).tobytes())
            offset += GGUFWriter.ggml_pad(tensor.nbytes, ALIGNMENT)
        file.truncate(offset)
        writer.close()
        return path

    def _add_metadata(self, writer: GGUFWriter) -> None:
        writer.kv_data[0].clear()
        for key, value in self.metadata.items():
            writer.add_key_value(key, value, _value_type(value))


def _value_type(value: Any) -> GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return GGUFValueType.INT32 if value < 0 else GGUFValueType.UINT32 if value < 2**32 else GGUFValueType.UINT64
    return GGUFValueType.get_type(value)


def gemma4(sizes: Sizes = TINY, types: Mapping[str, str] | None = None, *, tied: bool = True, **changes: Any) -> Model:
    """A Gemma 4 text model. changes: fields of `sizes` to replace.

    types: storage type by tensor ("blk.3.ffn_up") or by role ("ffn_up"); "matrix" is the default of all matrices.
    """
    sizes = replace(sizes, **changes)
    full = [sizes.is_full(i) for i in range(sizes.layers)]
    metadata = _metadata("gemma4", sizes) | {
        "gemma4.attention.head_count_kv": [sizes.kv_heads[is_full] for is_full in full],
        "gemma4.attention.key_length": sizes.head_dim[1],
        "gemma4.attention.value_length": sizes.head_dim[1],
        "gemma4.attention.key_length_swa": sizes.head_dim[0],
        "gemma4.attention.value_length_swa": sizes.head_dim[0],
        "gemma4.attention.sliding_window_pattern": [not is_full for is_full in full],
        "gemma4.attention.shared_kv_layers": 0,
        "gemma4.embedding_length_per_layer_input": 0,
        "gemma4.final_logit_softcapping": 30.0,
        "gemma4.rope.freq_base_swa": 1e4,
        "gemma4.rope.dimension_count": sizes.head_dim[1],
        "gemma4.rope.dimension_count_swa": sizes.head_dim[0],
    }
    rotated, pairs = sizes.head_dim[1] // 8, sizes.head_dim[1] // 2
    extra = {"rope_freqs.weight": (pairs,)} | {f"blk.{i}.layer_output_scale.weight": (1,) for i in range(sizes.layers)}
    values = {"rope_freqs.weight": np.repeat(np.float32([1, 1e30]), [rotated, pairs - rotated])}
    return Model(metadata, _tensors(sizes, types or {}, tied, extra), values)


def gemma3(
    sizes: Sizes = TINY_GEMMA3, types: Mapping[str, str] | None = None, *, tied: bool = True, **changes: Any
) -> Model:
    """A Gemma 3 text model; arguments as for `gemma4`."""
    sizes = replace(sizes, **changes)
    metadata = _metadata("gemma3", sizes) | {
        "gemma3.attention.head_count_kv": sizes.kv_heads[0],
        "gemma3.attention.key_length": sizes.head_dim[0],
        "gemma3.attention.value_length": sizes.head_dim[0],
    }
    return Model(metadata, _tensors(sizes, types or {}, tied, {}))


def more_bits(i: int, n: int) -> bool:
    """Whether llama.cpp's _M recipes give the i-th of n tensors a better type."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def q4_k_m(sizes: Sizes) -> dict[str, str]:
    """The types llama.cpp's Q4_K_M recipe gives a dense model."""
    types = {"matrix": "Q4_K", "token_embd": "Q6_K"}
    with_v = [i for i in range(sizes.layers) if not (sizes.k_eq_v and sizes.is_full(i))]
    types |= {f"blk.{i}.ffn_down": "Q6_K" for i in range(sizes.layers) if more_bits(i, sizes.layers)}
    types |= {f"blk.{layer}.attn_v": "Q6_K" for i, layer in enumerate(with_v) if more_bits(i, len(with_v))}
    return types


def _metadata(arch: str, sizes: Sizes) -> dict[str, Any]:
    return {
        "general.architecture": arch,
        "general.name": "synthetic",
        f"{arch}.block_count": sizes.layers,
        f"{arch}.context_length": sizes.context,
        f"{arch}.embedding_length": sizes.hidden,
        f"{arch}.feed_forward_length": sizes.ffn if isinstance(sizes.ffn, int) else list(sizes.ffn),
        f"{arch}.attention.head_count": sizes.heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.attention.sliding_window": sizes.window,
        f"{arch}.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "none",
    }


def _tensors(
    sizes: Sizes, types: Mapping[str, str], tied: bool, extra: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    hidden = sizes.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (sizes.vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    if not tied:
        shapes["output.weight"] = (sizes.vocab, hidden)
    for i in range(sizes.layers):
        is_full, ffn = sizes.is_full(i), sizes.ffn_of(i)
        head_dim = sizes.head_dim[is_full]
        q, kv = sizes.heads * head_dim, sizes.kv_heads[is_full] * head_dim
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "attn_q": (q, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_q_norm": (head_dim,),
            "attn_k_norm": (head_dim,),
            "attn_output": (hidden, q),
            "post_attention_norm": (hidden,),
            "ffn_norm": (hidden,),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
            "post_ffw_norm": (hidden,),
        }
        if sizes.k_eq_v and is_full:
            del layer["attn_v"]
        shapes |= {f"blk.{i}.{role}.weight": shape for role, shape in layer.items()}
    shapes |= extra

    def kind(name: str, shape: tuple[int, ...]) -> str:
        tensor = name.removesuffix(".weight")
        role = tensor.split(".")[-1]
        default = types.get("matrix", "F32") if len(shape) > 1 else "F32"
        return types.get(tensor, types.get(role, default))

    return {name: Tensor(shape, kind(name, shape)) for name, shape in shapes.items()}
