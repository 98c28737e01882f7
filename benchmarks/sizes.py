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
  {(CONTEXT_BYTES + RUNTIME_BYTES) / GIB:.2f} GiB for CUDA. The last columns are at full context, by `kv_cache`.
- Gemma 4 31B Q4_K_M loads from the page cache to an H100 in 2.2 s ([benchmarks.md](benchmarks.md)); other sizes and
  recipes have not been timed.

| size | recipe | bits per weight | GB | GiB at {SHORT:,} | full context | {" | ".join(CacheKind)} |
|---|---|---:|---:|---:|---:|{"---:|" * len(CacheKind)}"""


def row(size: str, recipe: str) -> str:
    tensors = quantize(FULL_SIZE[size](), recipe).tensors.values()
    nbytes, weights = sum(t.nbytes for t in tensors), sum(prod(t.shape) for t in tensors)
    config, plan = read_header(size, recipe)
    full = config.context_length
    short = MemoryModel(config, plan).at(SHORT)
    memory = [short, *(MemoryModel(config, plan, kind).at(full) for kind in CacheKind)]
    figures = (8 * nbytes / weights, nbytes / 1e9, *(plan.total_bytes / GIB for plan in memory))
    formats = ("{:.2f}", "{:.2f}", *("{:.1f}" for _ in memory))
    cells = [form.format(figure) for form, figure in zip(formats, figures, strict=True)]
    return f"| {' | '.join((size, recipe, *cells[:3], f'{full:,}', *cells[3:]))} |"


def main() -> None:
    print(HEAD)
    for size in FULL_SIZE:
        for recipe in RECIPES:
            print(row(size, recipe))


if __name__ == "__main__":
    main()
