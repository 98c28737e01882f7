"""The graphs that are compiled for a GPU, traced without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_cuda_export import GUARD
from tests.family_gguf import quantize
from tests.tiny_gguf import Sizes, gemma4

# Arguments that kernels write, by their names in the kernels; new keys and values count as such of a cache too.
OF_ROWS = {"h_out_ptr", "x_ptr", "xq_ptr", "xs_ptr", "xsum_ptr", "y_ptr"}
OF_ATTENTION = {"out_ptr", "q_out_ptr", "k_out_ptr", "v_out_ptr", "acc_ptr", "max_ptr", "sum_ptr", "slice_ptr"}
OF_CACHE = {
    "lossless": {"rows_ptr"},
    "turboquant": {"k_codes_ptr", "k_scale_ptr", "v_codes_ptr", "v_scale_ptr", "first_key_ptr"},
}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard") / "guard.so"
    root = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{root}/include", "-x", "c++", "-", "-o", str(path)]
    subprocess.run([*command, f"-L{root}/lib", "-lc10"], input=GUARD.encode(), check=True)
    return path


@pytest.mark.parametrize("kv_cache", OF_CACHE)
def test_operators_become_kernels_that_write_their_outputs_only(kv_cache: str, guard: Path, tmp_path: Path) -> None:
    sizes = Sizes(2, 256, 512, 4, (2, 1), (64, 128), vocab=512, window=32, context=256, period=2)
    path = quantize(gemma4(sizes), "Q4_K_M").write_sparse(tmp_path / "header.gguf")
    command = [sys.executable, "-m", "tests.fake_cuda_export", str(path), kv_cache]
    environment = os.environ | {"FAKE_CUDA_GUARD": str(guard)}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "every input is mutated" not in done.stderr
    for graph in json.loads(done.stdout.splitlines()[-1]).values():
        assert graph["kernels"] > 15
        assert not [name for name in graph["operators"] if "gemma4" in name]
        assert set(graph["written"]) <= OF_ROWS | OF_ATTENTION | OF_CACHE[kv_cache]
        assert set(graph["written"]) >= OF_CACHE[kv_cache]
