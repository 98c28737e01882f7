"""Writes docs/sizes.md: bits per weight, bytes and GPU memory of every size and recipe, and measures them.

usage: python -m benchmarks.sizes [--measured FILE ...] > docs/sizes.md
       python -m benchmarks.sizes --measure --folder /dev/shm [--sizes E2B,12B] [--recipes Q4_K_M] [--no-decode]
              > measured.json

Planned figures come from headers alone. `--measure` writes a file of random weights to the folder (33 GB at most),
loads and runs it as each of the pairs, on the GPU if there is one, and prints one line of JSON as soon as one is
measured. `--measured` takes such files; of a pair that is in several, the last counts, figure by figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.headers import read_header
from gemma4.config import CacheKind
from gemma4.memory_plan import CONTEXT_BYTES, RUNTIME_BYTES, MemoryModel
from tests.family_gguf import FULL_SIZE, RECIPES, quantize

Pair = tuple[str, str]
Measured = Mapping[Pair, Mapping[str, Any]]

SHORT = 8192
GIB = 1 << 30
HEAD = f"""# Sizes and recipes

Every size of Gemma 4 in the type mixes of llama.cpp's quantizer (Q4_0 and IQ4_XS as it makes them with an importance
matrix); the mixes are those that `tests/test_recipes.py` counts. Written by `python -m benchmarks.sizes`: planned
figures from headers without weights, measured ones from what its `--measure` prints. `gemma4 fit FILE --context N`
plans for a file at hand, by purpose.

- bits per weight, GB: of all tensors as the file stores them (10^9 bytes).
- GiB at a context: everything a process takes of the GPU for one generation in bfloat16, as planned: packed weights,
  the caches for all positions, the widest pass, what PyTorch's allocator rounds up, and an allowance of
  {(CONTEXT_BYTES + RUNTIME_BYTES) / GIB:.2f} GiB for CUDA. The last columns are at full context, by `kv_cache`.
- load s, measured, tok/s: seconds from a file in memory to a model that is ready; the most the process took of the GPU
  with the caches for {SHORT:,} positions and a prefill of one chunk, and with decoding where that was timed; tokens
  decoded per second after that chunk. All pairs ran in one process on random weights, and what is compiled for one
  stays: that counts as measured, too. "-": not measured. Plans hold the decode step beside a prompt, which takes
  much where a type has no kernel of its own (IQ4_XS) and for experts: it is not in what was measured without tok/s.
"""
TABLE = f"""
| size | recipe | bits per weight | GB | load s | GiB at {SHORT:,} | measured | tok/s | full context | \
{" | ".join(CacheKind)} |
|---|---|---:|---:|---:|---:|---:|---:|---:|{"---:|" * len(CacheKind)}"""


def row(size: str, recipe: str, measured: Measured) -> str:
    tensors = quantize(FULL_SIZE[size](), recipe).tensors.values()
    nbytes, weights = sum(t.nbytes for t in tensors), sum(prod(t.shape) for t in tensors)
    config, plan = read_header(size, recipe)
    full = config.context_length
    found = measured.get((size, recipe), {})
    load_s, peak, decode_s = (found.get(key) for key in ("load_s", "gpu_peak_bytes", "decode_s"))
    cells = [
        size,
        recipe,
        f"{8 * nbytes / weights:.2f}",
        f"{nbytes / 1e9:.2f}",
        "-" if load_s is None else f"{load_s:.2f}",
        f"{MemoryModel(config, plan).at(SHORT).total_bytes / GIB:.1f}",
        "-" if peak is None else f"{peak / GIB:.1f}",
        "-" if decode_s is None else f"{1 / decode_s:.3g}",
        f"{full:,}",
        *(f"{MemoryModel(config, plan, kind).at(full).total_bytes / GIB:.1f}" for kind in CacheKind),
    ]
    return f"| {' | '.join(cells)} |"


def read_measured(paths: Iterable[Path]) -> dict[Pair, dict[str, Any]]:
    """What `--measure` printed, by pair; those that failed stay out."""
    measured: dict[Pair, dict[str, Any]] = {}
    for result in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        if "error" not in result:
            known = {key: value for key, value in result.items() if value is not None}
            measured.setdefault((result["size"], result["recipe"]), {}).update(known)
    return measured


def describe(measured: Measured) -> str:
    """Where the measured figures come from, as an item of the head; empty where there are none."""
    runs = {(r["device"], r["torch"], r["triton"], r["commit"]): None for r in measured.values()}
    items = [f"- Measured on one {d}, torch {t}, Triton {r}, commit {c}.\n" for d, t, r, c in runs]
    return "".join(items)


def table(measured: Measured) -> None:
    print(HEAD + describe(measured) + TABLE)
    for size in FULL_SIZE:
        for recipe in RECIPES:
            print(row(size, recipe, measured))


def measure(pairs: list[Pair], folder: Path, commit: str, *, decodes: bool = True) -> None:
    import torch

    from benchmarks.size_runs import measure_pairs

    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for result in measure_pairs(pairs, folder, device, decodes=decodes):
        print(json.dumps({**result, "commit": commit}), flush=True)
        outcome = result.get("error") or f"loaded in {result['load_s']:.2f} s"
        if result.get("decode_s"):
            outcome += f", {1 / result['decode_s']:.1f} tokens/s"
        elapsed = time.perf_counter() - begin
        print(f"{elapsed:6.1f} s  {result['size']} {result['recipe']}: {outcome}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE", help="put these into the table")
    parser.add_argument("--measure", action="store_true", help="measure instead of writing the table")
    parser.add_argument("--folder", type=Path, help="where --measure may write files, best in memory")
    parser.add_argument("--sizes", default=",".join(FULL_SIZE))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--no-decode", action="store_true", help="do not time decoding, which compiles many kernels")
    parser.add_argument("--commit", default="unknown", help="what the measured code is, for the head of the table")
    args = parser.parse_args()
    if not args.measure:
        table(read_measured(args.measured))
        return
    if args.folder is None:
        parser.error("--measure needs --folder")
    sizes, recipes = args.sizes.split(","), args.recipes.split(",")
    if unknown := [*({*sizes} - {*FULL_SIZE}), *({*recipes} - {*RECIPES})]:
        parser.error(f"found {', '.join(unknown)}, expected {', '.join((*FULL_SIZE, *RECIPES))}")
    measure(
        [(size, recipe) for size in sizes for recipe in recipes], args.folder, args.commit, decodes=not args.no_decode
    )


if __name__ == "__main__":
    main()
