"""Headers of every size and recipe, as files without weights: `python -m benchmarks.headers 31B Q4_K_M OUT`.

They take no disk, and `gemma4 inspect` and `gemma4 fit` read them like whole files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from tests.family_gguf import FULL_SIZE, RECIPES, quantize


def write_header(size: str, recipe: str, path: Path) -> Path:
    """Writes the header and a hole for the weights."""
    model = quantize(FULL_SIZE[size](), recipe)
    model.metadata["general.name"] = f"Gemma 4 {size} {recipe}"
    return model.write_sparse(path)


def read_header(size: str, recipe: str) -> tuple[Gemma4Config, LoadPlan]:
    with (
        TemporaryDirectory() as folder,
        GGUFFile.open(write_header(size, recipe, Path(folder) / "header.gguf")) as file,
    ):
        config = Gemma4Config.from_gguf(file)
        return config, plan_load(file, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=FULL_SIZE)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(write_header(args.size, args.recipe, args.out))


if __name__ == "__main__":
    main()
