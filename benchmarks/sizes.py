"""Writes docs/sizes.md: bits per weight, bytes and planned GPU memory of every size and recipe, from headers alone.

usage: python -m benchmarks.sizes > docs/sizes.md
"""

from __future__ import annotations

from math import prod

from benchmarks.headers import read_header
from gemma4.config import CacheKind
from gemma4.memory_plan import CONTEXT_BYTES, RUNTIME_BYTES, MemoryModel
from tests.family_gguf import FULL_SIZE, RECIPES, quantize

SHORT = 8192
GIB = 1 << 30
HEAD = f"""# Sizes and recipes

Every size of Gemma 4 in the type mixes of llama.cpp's quantizer (Q4_0 and IQ4_XS as it makes them with an importance
matrix). Written by `python -m benchmarks.sizes > docs/sizes.md` from headers without weights; the mixes are those that
`tests/test_recipes.py` counts. `gemma4 fit FILE --context N` gives the same figures for a file at hand, by purpose.

- bits per weight, GB: of all tensors as the file stores them (10^9 bytes).
- GiB at a context: everything a process takes of the GPU for one generation in bfloat16, as planned: packed weights,
  the caches for all positions, the widest pass, what PyTorch's allocator rounds up, and an allowance of
  {(CONTEXT_BYTES + RUNTIME_BYTES) / GIB:.2f} GiB for CUDA itself. "turboquant": with `kv_cache="turboquant"`.
- Gemma 4 31B Q4_K_M loads from the page cache to an H100 in 3.9 s ([benchmarks.md](benchmarks.md)); other sizes and
  recipes have not been timed.

| size | recipe | bits per weight | GB | GiB at {SHORT:,} | full context | GiB there | turboquant |
|---|---|---:|---:|---:|---:|---:|---:|"""


def row(size: str, recipe: str) -> str:
    tensors = quantize(FULL_SIZE[size](), recipe).tensors.values()
    nbytes, weights = sum(t.nbytes for t in tensors), sum(prod(t.shape) for t in tensors)
    config, plan = read_header(size, recipe)
    full = config.context_length
    lossless, turboquant = (MemoryModel(config, plan, kind) for kind in CacheKind)
    memory = [(lossless, SHORT), (lossless, full), (turboquant, full)]
    short, long, quantized = (f"{model.at(context).total_bytes / GIB:.1f}" for model, context in memory)
    cells = (size, recipe, f"{8 * nbytes / weights:.2f}", f"{nbytes / 1e9:.2f}", short, f"{full:,}", long, quantized)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(HEAD)
    for size in FULL_SIZE:
        for recipe in RECIPES:
            print(row(size, recipe))


if __name__ == "__main__":
    main()
