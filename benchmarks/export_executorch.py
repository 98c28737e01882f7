"""Exports a GGUF for ExecuTorch's CUDA backend on this machine's GPU, by default a small one, and verifies the files.

usage: python benchmarks/export_executorch.py [--layers 6] [--max-seq-len 1024] [--gguf FILE] [--out DIR]
       [--kv-cache NAME]

Prints one line a phase and a check, then one JSON document. Exits with an error where a check fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import synthesize

from gemma4.config import CacheKind
from gemma4.export.executorch import PROGRAM, export_executorch
from gemma4.export.host_tensors import host_tensors
from gemma4.export.verify_pte import verify_pte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--gguf", type=Path, help="export this file instead of a synthetic one")
    parser.add_argument("--out", type=Path, help="where to keep what was written")
    parser.add_argument("--kv-cache", type=CacheKind, default=CacheKind.LOSSLESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gguf = args.gguf or Path(folder) / "synthetic.gguf"
        if args.gguf is None:
            synthesize.write(gguf, synthesize.tiny(args.layers))
        out = args.out or Path(folder) / "out"
        start = time.perf_counter()
        on_phase = lambda phase: print(f"{time.perf_counter() - start:8.1f} s ... {phase}", flush=True)  # noqa: E731
        report = export_executorch(
            gguf, out, backend="cuda", max_seq_len=args.max_seq_len, kv_cache=args.kv_cache, on_phase=on_phase
        )
        for phase, seconds in report.seconds.items():
            print(f"{phase:24} {seconds:10.1f} s")
        for name, nbytes in report.sizes.items():
            print(f"{name:24} {nbytes / 1e6:10.1f} MB")
        for where, peak in (("host, anonymous", report.peak_host_bytes), ("device", report.peak_device_bytes)):
            if peak is not None:
                print(f"peak {where:19} {peak / 2**30:10.2f} GiB")
        (data,) = [name for name in report.sizes if name.endswith(".ptd")]
        start = time.perf_counter()
        with host_tensors(gguf, max_seq_len=args.max_seq_len, kv_cache=args.kv_cache) as tensors:
            checked = verify_pte(out / PROGRAM, out / data, tensors)
        print(f"{'verification':24} {time.perf_counter() - start:10.1f} s")
        print(f"methods    {', '.join(checked.methods)}; constants {len(checked.constants)}")
        print(f"weights    {checked.weights} equal to the file's, {checked.weight_bytes / 1e6:.1f} MB")
        print(f"libraries  {checked.libraries} load; shims needed: {', '.join(checked.shims)}")
        print(json.dumps({"export": asdict(report), "verified": asdict(checked)}, default=str))


if __name__ == "__main__":
    main()
