"""Writes a Gemma 4 GGUF with random but sane weights in a Q4_K_M type mix: the 31B in seconds, for timing.

usage: python benchmarks/synthesize.py OUT [--layers 60] [--tiny]

Every tensor is a slice of one random pool per type, so memory stays near the largest tensor and time near that of the
disk. Scales are chosen so that activations keep their size from layer to layer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

BLOCK_BYTES = {Type.Q4_K: 144, Type.Q6_K: 210}
POOL_BLOCKS = 400_000


@dataclass(frozen=True)
class Sizes:
    """Shapes of a Gemma 4 dense model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads_sliding: int
    kv_heads_full: int
    head_dim_sliding: int
    head_dim_full: int
    vocab: int
    window: int


def gemma4_31b(layers: int) -> Sizes:
    return Sizes(layers, 5376, 21504, 32, 16, 4, 256, 512, 262144, 1024)


def tiny(layers: int) -> Sizes:
    return Sizes(layers, 256, 512, 4, 2, 1, 64, 128, 2048, 64)


def random_blocks(kind: Type, count: int, k: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """`count` blocks whose weights have a standard deviation near 1 / sqrt(k), as bytes."""
    n = min(count, POOL_BLOCKS)
    blocks = rng.integers(0, 256, (n, BLOCK_BYTES[kind]), dtype=np.uint8)
    spread = (0.5 + rng.random(n)).astype(np.float32) / np.sqrt(k)
    if kind is Type.Q4_K:
        d = (spread / (31.5 * 7.5 * 0.75)).astype(np.float16)
        blocks[:, 0:2] = d.view(np.uint8).reshape(n, 2)
        blocks[:, 2:4] = (d * np.float16(7.5)).view(np.uint8).reshape(n, 2)
    else:
        blocks[:, 192:208] = rng.integers(-64, 64, (n, 16), dtype=np.int8).view(np.uint8)
        blocks[:, 208:210] = (spread / (37 * 18.5)).astype(np.float16).view(np.uint8).reshape(n, 2)
    return np.concatenate([blocks] * (count // n + 1))[:count].reshape(-1)


def gets_more_bits(layer: int, layers: int) -> bool:
    """The layers whose attn_v and ffn_down llama.cpp's Q4_K_M recipe stores as Q6_K."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


class Synthesizer:
    """Adds random tensors to a GGUF writer."""

    def __init__(self, writer: gguf.GGUFWriter) -> None:
        self.writer = writer
        self.rng = np.random.default_rng(0)
        self.pools: dict[tuple[Type, int], NDArray[np.uint8]] = {}

    def matrix(self, name: str, n: int, k: int, kind: Type) -> None:
        row_bytes = k // 256 * BLOCK_BYTES[kind]
        pool = self.pools.get((kind, k))
        if pool is None or pool.size < n * row_bytes:
            pool = self.pools[kind, k] = random_blocks(kind, n * k // 256, k, self.rng)
        self.writer.add_tensor(name, pool[: n * row_bytes].reshape(n, row_bytes), raw_dtype=kind)

    def norm(self, name: str, size: int) -> None:
        self.writer.add_tensor(name, (1 + 0.1 * self.rng.standard_normal(size)).astype(np.float32))


def write(path: Path, s: Sizes) -> None:
    """Writes the whole file."""
    is_sliding = [(i + 1) % 6 != 0 for i in range(s.layers)]
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_name(f"synthetic gemma4, {s.layers} layers of {s.hidden}")
    writer.add_file_type(15)
    writer.add_quantization_version(2)
    counts = {
        "context_length": 262144,
        "embedding_length": s.hidden,
        "block_count": s.layers,
        "feed_forward_length": s.ffn,
        "embedding_length_per_layer_input": 0,
        "attention.head_count": s.heads,
        "attention.key_length": s.head_dim_full,
        "attention.value_length": s.head_dim_full,
        "attention.key_length_swa": s.head_dim_sliding,
        "attention.value_length_swa": s.head_dim_sliding,
        "attention.sliding_window": s.window,
        "attention.shared_kv_layers": 0,
        "rope.dimension_count": s.head_dim_full,
        "rope.dimension_count_swa": s.head_dim_sliding,
    }
    for key, count in counts.items():
        writer.add_uint32(f"gemma4.{key}", count)
    for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }.items():
        writer.add_float32(f"gemma4.{key}", value)
    kv_heads = [s.kv_heads_sliding if sliding else s.kv_heads_full for sliding in is_sliding]
    writer.add_array("gemma4.attention.head_count_kv", kv_heads)
    writer.add_array("gemma4.attention.sliding_window_pattern", is_sliding)
    writer.add_tokenizer_model("none")

    add = Synthesizer(writer)
    add.matrix("token_embd.weight", s.vocab, s.hidden, Type.Q6_K)
    add.norm("output_norm.weight", s.hidden)
    rotated = s.head_dim_full // 8
    factors = [1.0] * rotated + [1e30] * (s.head_dim_full // 2 - rotated)
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for i, sliding in enumerate(is_sliding):
        head_dim = s.head_dim_sliding if sliding else s.head_dim_full
        mixed = Type.Q6_K if gets_more_bits(i, s.layers) else Type.Q4_K
        block = f"blk.{i}."
        add.matrix(block + "attn_q.weight", s.heads * head_dim, s.hidden, Type.Q4_K)
        add.matrix(block + "attn_k.weight", kv_heads[i] * head_dim, s.hidden, Type.Q4_K)
        if sliding:
            add.matrix(block + "attn_v.weight", kv_heads[i] * head_dim, s.hidden, mixed)
        add.matrix(block + "attn_output.weight", s.hidden, s.heads * head_dim, Type.Q4_K)
        add.matrix(block + "ffn_gate.weight", s.ffn, s.hidden, Type.Q4_K)
        add.matrix(block + "ffn_up.weight", s.ffn, s.hidden, Type.Q4_K)
        add.matrix(block + "ffn_down.weight", s.hidden, s.ffn, mixed)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add.norm(f"{block}{name}.weight", s.hidden)
        for name in ("attn_q_norm", "attn_k_norm"):
            add.norm(f"{block}{name}.weight", head_dim)
        writer.add_tensor(block + "layer_output_scale.weight", np.array([0.5], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="shapes of a few megabytes")
    args = parser.parse_args()
    write(args.out, tiny(args.layers) if args.tiny else gemma4_31b(args.layers))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
