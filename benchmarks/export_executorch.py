"""Exports a small synthetic GGUF for ExecuTorch's CUDA backend on this machine's GPU, and verifies what was written.

usage: python benchmarks/export_executorch.py [--layers 6] [--max-seq-len 1024] [--gguf FILE] [--out DIR]

Prints one line a phase and a check, then one JSON document. Exits with an error where a check fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import synthesize
import torch
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.export.executorch import PROGRAM, export_executorch
from gemma4.export.executorch_method import runner_methods
from gemma4.export.methods import MethodName
from gemma4.export.verify_pte import verify_pte


def weights_of(gguf: Path, max_seq_len: int) -> dict[str, Tensor]:
    """Parameters and buffers of the exported module under all of their names, loaded anew on the CPU."""
    model = Gemma4.from_gguf(gguf, device="cpu", dtype=torch.bfloat16, max_seq_len=max_seq_len)
    cache = KVCache(model.config, model.max_seq_len, torch.bfloat16)
    method = runner_methods(model.model, cache)[MethodName.DECODE]
    return dict(method.named_parameters(remove_duplicate=False)) | dict(method.named_buffers(remove_duplicate=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--gguf", type=Path, help="export this file instead of a synthetic one")
    parser.add_argument("--out", type=Path, help="where to keep what was written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gguf = args.gguf or Path(folder) / "synthetic.gguf"
        if args.gguf is None:
            synthesize.write(gguf, synthesize.tiny(args.layers))
        out = args.out or Path(folder) / "out"
        on_phase = lambda phase: print(f"... {phase}", flush=True)  # noqa: E731
        report = export_executorch(gguf, out, backend="cuda", max_seq_len=args.max_seq_len, on_phase=on_phase)
        for phase, seconds in report.seconds.items():
            print(f"{phase:10} {seconds:8.1f} s")
        for name, nbytes in report.sizes.items():
            print(f"{name:24} {nbytes / 1e6:10.1f} MB")
        (data,) = [name for name in report.sizes if name.endswith(".ptd")]
        checked = verify_pte(out / PROGRAM, out / data, weights_of(gguf, args.max_seq_len))
        print(f"methods    {', '.join(checked.methods)}; constants {len(checked.constants)}")
        print(f"weights    {checked.weights} equal to the file's, {checked.weight_bytes / 1e6:.1f} MB")
        print(f"libraries  {checked.libraries} load; shims needed: {', '.join(checked.shims)}")
        print(json.dumps({"export": asdict(report), "verified": asdict(checked)}, default=str))


if __name__ == "__main__":
    main()
