"""Plots decode speed against context from the JSON line of end_to_end.py, beside llama.cpp and the bandwidth ceiling.

usage: python benchmarks/plot_decode.py RESULT.json OUT.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

# llama.cpp (ggml 0.25.3, sm_90, flash attention, F16 cache), the same file on the same kind of card.
LLAMA_CPP = {512: 75.7, 2048: 74.6, 8192: 73.4, 32768: 69.5}
# Bytes of keys and values that a token reads: 10 full layers of 4 x 512; 50 sliding ones of 16 x 256, 1024 tokens back.
FULL_BYTES, SLIDING_BYTES, WINDOW = 10 * 2 * 2 * 4 * 512, 50 * 2 * 2 * 16 * 256, 1024


def ceiling(weight_bytes: int, bandwidth: float, context: int) -> float:
    """Tokens per second if every byte moved at copy bandwidth and nothing else took time."""
    return bandwidth / (weight_bytes + context * FULL_BYTES + min(context, WINDOW) * SLIDING_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    speeds = {int(context): speed for context, speed in result["decode_tokens_per_s"].items()}
    contexts = sorted(speeds)
    limits = [ceiling(result["weight_bytes"], result["copy_bytes_per_s"], context) for context in contexts]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(contexts, limits, "--", color="gray", label="every byte at copy bandwidth")
    axes.plot(contexts, [speeds[c] for c in contexts], "o-", label="gemma4-gguf")
    axes.plot(list(LLAMA_CPP), list(LLAMA_CPP.values()), "s-", label="llama.cpp")
    axes.set(xscale="log", xlabel="context (tokens)", ylabel="decode (tokens/s)", ylim=(0, None))
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.set_title(f"Gemma 4 31B Q4_K_M, batch 1, {result['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
