"""A real `.pte` on ExecuTorch's own runtime against eager: portable kernels, both methods, one state."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.runtime import Method as LoadedMethod
from executorch.runtime import Runtime
from torch import Tensor

from gemma4 import Gemma4
from gemma4.cache import KVCache
from gemma4.export import executorch as exporter
from gemma4.export.executorch import PROGRAM, export_executorch
from gemma4.export.executorch_files import DataFile, ProgramFile
from gemma4.export.executorch_method import runner_methods
from gemma4.export.report import ExportError
from gemma4.export.verify_pte import verify_pte
from gemma4.generate import prefill
from gemma4.quant.errors import MalformedError, MissingTensorError, UnexpectedTensorError, UnsupportedFeatureError
from tests.tiny_gguf import gemma4

DECODE_STEPS = 32
Export = tuple[Path, Gemma4]


# ExecuTorch's own exporters import torchtune; here it cannot be.
EXPORT = """
import sys
import torch
sys.modules["torchtune"] = None
from gemma4.export.executorch import export_executorch
torch.set_num_threads(1)
gguf, out, max_seq_len = sys.argv[1:]
export_executorch(gguf, out, backend="portable", max_seq_len=int(max_seq_len), with_logits=True)
"""


@pytest.fixture(scope="module")
def exports(unpacked: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """Two models, exported side by side."""
    folder = tmp_path_factory.mktemp("executorch")
    types = {"matrix": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
    sizes = {"layers": 1, "hidden": 256, "ffn": 256, "vocab": 128, "context": 64, "period": 1}
    small = gemma4(types=types, **sizes, heads=4, kv_heads=(2, 1), head_dim=(64, 64))
    cases = {
        "golden": (unpacked("dense-f32.gguf"), 112),
        "quantized": (small.write(folder / "quantized.gguf"), 64),
    }
    commands = {
        name: [sys.executable, "-c", EXPORT, str(gguf), str(folder / name), str(max_seq_len)]
        for name, (gguf, max_seq_len) in cases.items()
    }
    running = {name: subprocess.Popen(command, stderr=subprocess.PIPE) for name, command in commands.items()}
    for process in running.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    return {
        name: (folder / name, Gemma4.from_gguf(gguf, device="cpu", dtype=torch.float32, max_seq_len=max_seq_len))
        for name, (gguf, max_seq_len) in cases.items()
    }


@pytest.fixture
def golden(exports: dict[str, Export]) -> Export:
    return exports["golden"]


@pytest.fixture
def quantized(exports: dict[str, Export]) -> Export:
    return exports["quantized"]


def run(method: LoadedMethod, ids: list[int], position: int) -> Tensor:
    """The last position's logits [V], after a check that the token is theirs."""
    count = len(ids)
    inputs = (torch.tensor([ids]), torch.arange(position, position + count), torch.zeros(1))
    token, logits = method.execute(inputs)
    assert token.tolist() == [[int(logits.argmax())]]
    return logits[0]


def check_against_eager(export: Export, ids: list[int], chunks: list[int]) -> None:
    out, model = export
    (data,) = out.glob("*.ptd")
    program = Runtime.get().load_program(out / PROGRAM, data_path=data)
    methods = {name: program.load_method(name) for name in ("prefill", "decode")}
    cache = KVCache(model.config, model.max_seq_len, torch.float32)
    position = 0
    for size in chunks:
        chunk = ids[position : position + size]
        expected = prefill(model.model, cache, chunk, position)[-1]
        found = run(methods["prefill"], chunk, position)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        position += size
    for _ in range(DECODE_STEPS):
        token = [int(expected.argmax())]
        assert token == [int(found.argmax())]
        expected = prefill(model.model, cache, token, position)[-1]
        found = run(methods["decode"], token, position)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        position += 1


def test_the_golden_model_equals_eager(golden: Export, data_dir: Path) -> None:
    ids = np.load(data_dir / "dense-f32-gelu32.npz")["tokens"].tolist()
    check_against_eager(golden, ids, [32, 31, 1, 16])


def test_a_quantized_model_equals_eager(quantized: Export) -> None:
    check_against_eager(quantized, [7 * i % 128 for i in range(30)], [1, 17, 12])


def weights_of(model: Gemma4) -> dict[str, Tensor]:
    cache = KVCache(model.config, model.max_seq_len, model.model.dtype)
    method = next(iter(runner_methods(model.model, cache).values()))
    return dict(method.named_parameters(remove_duplicate=False)) | dict(method.named_buffers(remove_duplicate=False))


def test_methods_constants_and_weights_read_back(quantized: Export) -> None:
    out, model = quantized
    report = verify_pte(out / PROGRAM, out / "model.ptd", weights_of(model))
    assert report.methods == ("decode", "prefill")
    constants: dict[str, Any] = {name: values[0] for name, values in report.constants.items()}
    state = json.loads(constants.pop("get_mutable_buffer_metadata"))
    assert state == {"version": 1, "mutable_buffers": ["cache.0.kv"]}
    assert constants == {
        "get_max_seq_len": 64,
        "get_max_context_len": 64,
        "get_vocab_size": 128,
        "get_n_layers": 1,
        "get_max_prefill_chunk": 32,
        "get_min_prefill_chunk": 1,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    stored = sum(len(blob) for blob in DataFile.open(out / "model.ptd").blobs.values())
    assert report.weight_bytes == stored
    assert (report.backends, report.libraries) == ((), 0)


def test_a_flipped_bit_of_a_weight_is_found(quantized: Export, tmp_path: Path) -> None:
    out, model = quantized
    content = bytearray((out / "model.ptd").read_bytes())
    content[-1] ^= 1
    damaged = tmp_path / "model.ptd"
    damaged.write_bytes(content)
    with pytest.raises(MalformedError, match="bytes differ") as error:
        verify_pte(out / PROGRAM, damaged, weights_of(model))
    assert error.value.path == damaged


def test_missing_and_extra_weights_are_named(quantized: Export) -> None:
    out, model = quantized
    weights = weights_of(model)
    extra = weights | {"model.extra": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(MissingTensorError, match=r"model\.extra"):
        verify_pte(out / PROGRAM, out / "model.ptd", extra)
    del weights["model.norm.weight"]
    with pytest.raises(UnexpectedTensorError, match=r"model\.norm\.weight"):
        verify_pte(out / PROGRAM, out / "model.ptd", weights)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.3, 0.9])
def test_cut_files_are_refused(quantized: Export, tmp_path: Path, part: float) -> None:
    out, _ = quantized
    for name, opener in ((PROGRAM, ProgramFile.open), ("model.ptd", DataFile.open)):
        content = (out / name).read_bytes()
        cut = tmp_path / name
        cut.write_bytes(content[: int(part * len(content))])
        with pytest.raises(MalformedError) as error:
            opener(cut)
        assert error.value.path == cut


def test_a_failing_compiler_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(programs: object, constants: object) -> None:
        raise RuntimeError("no kernel for aten::frob")

    monkeypatch.setattr(exporter, "lower_portable", fail)
    model = gemma4(layers=2, hidden=64, ffn=64, heads=2, kv_heads=(1, 1), head_dim=(16, 16), vocab=64, context=64)
    with pytest.raises(ExportError, match="aten::frob"):
        export_executorch(model.write(tmp_path / "m.gguf"), tmp_path / "out", backend="portable", max_seq_len=64)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_what_a_backend_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedFeatureError, match="kv_cache: found turboquant"):
        export_executorch(tmp_path / "m.gguf", tmp_path / "out", backend="portable", kv_cache="turboquant")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedFeatureError, match="no GPU"):
        export_executorch(tmp_path / "m.gguf", tmp_path / "out")


def test_absent_or_unknown_executorch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.metadata, "version", lambda name: "2.0.1")
    with pytest.raises(UnsupportedFeatureError, match=r"executorch: found 2\.0\.1"):
        export_executorch(tmp_path / "m.gguf", tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedFeatureError, match="pip install"):
        export_executorch(tmp_path / "m.gguf", tmp_path / "out")
