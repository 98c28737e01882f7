"""Proof that an exported model loads and runs: both methods once, in this process, on zeros.

Weights and caches all lie in one piece of zeroed memory, as large as the largest of them: little is taken, and every
kernel runs.

usage: python -m gemma4.export.trial_run FOLDER GGUF
"""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemma4.config import Gemma4Config
from gemma4.export.runtime import open_methods
from gemma4.export.weights import bind_methods, weight_tree
from gemma4.mapping import plan_load
from gemma4.quant.gguf_file import GGUFFile


def try_run(folder: Path, gguf: Path) -> None:
    """Raises what loading or running raises, RuntimeError for an impossible result."""
    manifest, device, methods, others = open_methods(folder)
    with GGUFFile.open(gguf) as file:
        manifest.check_file(file, folder)
        tree = weight_tree(plan_load(file, Gemma4Config.from_gguf(file), fuse=manifest.has_fusion))
    sizes = [parameter.nbytes for parameter in tree.parameters()]
    sizes += [prod(tensor.shape) * tensor.torch_dtype.itemsize for tensor in manifest.state.values()]
    memory = torch.zeros(max(sizes), dtype=torch.uint8, device=device)

    def place(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return memory[: prod(shape) * dtype.itemsize].view(dtype).view(shape)

    others |= {name: place(tensor.shape, tensor.torch_dtype) for name, tensor in manifest.state.items()}
    bind_methods(methods.values(), tree, others, fill=lambda weight: place(tuple(weight.shape), weight.dtype))
    for name, method in methods.items():
        tokens = 1 if name == "decode" else manifest.chunk_size
        positions = torch.arange(tokens, device=device)
        zero = torch.zeros(1, device=device)
        token, logits = method(torch.zeros_like(positions), positions, zero, zero.to(torch.int64))
        vocab_size = logits.shape[-1]
        if logits.shape[0] != 1 or not 0 <= int(token) < vocab_size:
            raise RuntimeError(f"{name} returned token {token.tolist()} of logits {list(logits.shape)}")


if __name__ == "__main__":
    try_run(Path(sys.argv[1]), Path(sys.argv[2]))
