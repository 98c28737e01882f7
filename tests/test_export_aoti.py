"""A `.pt2` for the CPU from compiler to text: exported, loaded in another process, compared with eager; refusals."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4 import Gemma4
from gemma4.decode_loop import DecodeLoop
from gemma4.export import aoti
from gemma4.export.aoti import export_aoti
from gemma4.export.manifest import MANIFEST, PACKAGE, ArtifactMismatchError
from gemma4.export.method_process import CompiledFiles
from gemma4.export.report import ExportError, ExportReport
from gemma4.export.runtime import ExportedGemma4
from gemma4.quant.atomic_write import FileUnwritableError
from gemma4.quant.errors import ContextError, FileMissingError, MalformedError, UnsupportedFeatureError
from tests.stand_in_python import stand_in_python
from tests.tiny_gguf import gemma4

LENGTH = 64
PROMPT = [5, 6, 7, 8, 11, 40, 2, 99, 300, 17]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    types = {"ffn_gate": "Q4_K", "ffn_up": "Q4_K", "ffn_down": "Q6_K"}
    return gemma4(layers=2, types=types).write(tmp_path_factory.mktemp("file") / "model.gguf")


@pytest.fixture(scope="module")
def exported(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExportReport]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")  # plain loops compile fastest
        yield export_aoti(gguf, tmp_path_factory.mktemp("export") / "out", max_seq_len=LENGTH, target="cpu")


@pytest.fixture(scope="module")
def eager(gguf: Path) -> Gemma4:
    return Gemma4.from_gguf(gguf, device="cpu", max_seq_len=LENGTH)


@pytest.fixture(scope="module")
def loaded(exported: ExportReport, gguf: Path) -> ExportedGemma4:
    return ExportedGemma4.load(exported.folder, gguf)


def test_logits_and_greedy_tokens_equal_eager(loaded: ExportedGemma4, eager: Gemma4) -> None:
    logits, expected = loaded.logits(PROMPT), eager.logits(PROMPT)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.99999
    assert loaded.generate_ids(PROMPT, 33) == eager.generate_ids(PROMPT, 33)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 31, 32, 33, 60])
def test_every_length_of_prefill(tokens: int, loaded: ExportedGemma4, eager: Gemma4) -> None:
    ids = [(i * 37 + 5) % 320 for i in range(tokens)]
    size = loaded.manifest.chunk_size
    chunks = zip(torch.tensor(ids).split(size), torch.arange(tokens).split(size), strict=True)
    neutral = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    *_, last = (loaded._model.methods["prefill"](*chunk, *neutral)[1] for chunk in chunks)
    torch.testing.assert_close(last, eager.logits(ids)[-1:], rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_from_the_tokens_it_shares(loaded: ExportedGemma4, eager: Gemma4) -> None:
    """Past the end of a ring of 24, too, after which the rings of its prompt are put back."""
    ran: list[int] = []
    method = loaded._model.methods["prefill"]

    def counting(tokens: torch.Tensor, *rest: torch.Tensor) -> Any:
        ran.append(tokens.shape[0])
        return method(tokens, *rest)

    said = PROMPT + loaded.generate_ids(PROMPT, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loaded._model.methods, "prefill", counting)
        for ids, new in (([*said, 7, 9, 3], 4), ([*said[:14], 1, 2], 2)):  # the last of an answer did not run yet
            assert loaded.generate_ids(ids, 40) == eager.generate_ids(ids, 40)
            assert sum(ran) == new
            ran.clear()


def test_a_failed_generation_leaves_nothing_behind(loaded: ExportedGemma4, eager: Gemma4) -> None:
    def fail(*_: object) -> None:
        raise InterruptedError

    ids = [3, *PROMPT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeLoop, "advance", fail)
        with pytest.raises(InterruptedError):
            loaded.generate_ids(ids, 5)
    assert loaded._history.ids == []
    assert loaded.generate_ids(ids, 5) == eager.generate_ids(ids, 5)
    left = loaded.stream_ids(ids, 20)
    next(left)
    left.close()
    assert loaded._history.ids[: len(ids)] == ids


def test_sampling_equals_eager(loaded: ExportedGemma4, eager: Gemma4) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "seed": 3}
    assert loaded.generate_ids(PROMPT, 20, **settings) == eager.generate_ids(PROMPT, 20, **settings)


def test_both_methods_read_the_same_tensors_and_every_cache(loaded: ExportedGemma4) -> None:
    decode, prefill = (loaded._model.methods[name] for name in ("decode", "prefill"))
    shared = decode._constants.keys() & prefill._constants.keys()
    assert loaded.manifest.state.keys() <= shared
    assert all(decode._constants[name] is prefill._constants[name] for name in shared)
    assert len({tensor.data_ptr() for tensor in loaded._state.values()}) == len(loaded.manifest.state) == 3


def test_another_process_runs_it_without_a_compiler(exported: ExportReport, gguf: Path, eager: Gemma4) -> None:
    code = (
        "import sys, torch\nfrom gemma4.export.runtime import ExportedGemma4\n"
        f"print(ExportedGemma4.load(sys.argv[1], sys.argv[2]).generate_ids({PROMPT}, 8))\n"
        "found = {'triton', 'sympy', 'torch._inductor', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    command = [sys.executable, "-c", code, str(exported.folder), str(gguf)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == eager.generate_ids(PROMPT, 8)


def test_the_report_and_the_artifact(exported: ExportReport, gguf: Path) -> None:
    assert {path.name for path in exported.folder.iterdir()} == set(exported.sizes)
    assert sum(exported.sizes.values()) < 20e6
    assert list(exported.seconds) == [
        "trace decode", "compile decode", "trace prefill", "compile prefill", "both methods", "package", "trial run"
    ]  # fmt: skip
    assert exported.fusions[0] == "fused gate+up on 2 of 2 MLP layers (0 left)"
    manifest = json.loads((exported.folder / MANIFEST).read_bytes())
    assert manifest["gguf"]["nbytes"] == gguf.stat().st_size
    assert manifest["target"] == "cpu"


def copy_with(exported: ExportReport, folder: Path, **changes: Any) -> Path:
    for path in exported.folder.iterdir():
        (folder / path.name).hardlink_to(path)
    manifest = json.loads((folder / MANIFEST).read_bytes()) | changes
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("torch", "2.9.1", r"exported with torch 2\.9\.1, here is"),
        ("library", "9.9", r"exported with library 9\.9, here is"),
        ("machine", "sparc", "exported with machine sparc, here is"),
        ("target", "sm_42", "exported for sm_42, here is"),
        ("format", "other", "found format 'other', expected"),
    ],
)
def test_a_mismatch_is_refused(
    field: str, value: str, message: str, exported: ExportReport, gguf: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactMismatchError, match=message):
        ExportedGemma4.load(copy_with(exported, tmp_path, **{field: value}), gguf)


def test_another_file_is_refused(exported: ExportReport, gguf: Path, tmp_path: Path) -> None:
    other = gemma4(layers=2).write(tmp_path / "other.gguf")
    with pytest.raises(ArtifactMismatchError, match=r"exported from model\.gguf .* found other\.gguf"):
        ExportedGemma4.load(exported.folder, other)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(gguf.read_bytes())
    ExportedGemma4.load(exported.folder, renamed)


def test_what_is_no_export_is_refused(exported: ExportReport, gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="not a directory of `gemma4 export`"):
        ExportedGemma4.load(tmp_path, gguf)
    folder = copy_with(exported, tmp_path)
    (folder / PACKAGE).unlink()
    (folder / PACKAGE).write_bytes(b"PK")
    with pytest.raises(MalformedError, match="cannot be opened"):
        ExportedGemma4.load(folder, gguf)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(MalformedError, match="not a manifest"):
        ExportedGemma4.load(folder, gguf)


def test_requests_that_cannot_be_met(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="found sm_42, this machine"):
        export_aoti(gguf, tmp_path / "out", target="sm_42")
    with pytest.raises(ContextError, match="found 9999, expected 32 to 512"):
        export_aoti(gguf, tmp_path / "out", max_seq_len=9999, target="cpu")


@pytest.fixture
def compiled(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: each method is a file of zeros."""
    file = tmp_path_factory.mktemp("compiled") / "model.so"
    file.write_bytes(bytes(1 << 20))
    method = CompiledFiles(files=[str(file)], seconds={}, peak_host_bytes=0, peak_device_bytes=None)
    monkeypatch.setattr(aoti, "compile_methods", lambda requests, on_phase: [method for _ in requests])


@pytest.mark.usefixtures("compiled")
def test_a_full_disk_is_named_and_leaves_nothing(gguf: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(FileUnwritableError):
            export_aoti(gguf, tmp_path / "out", max_seq_len=LENGTH, target="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_what_does_not_run_is_not_kept(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial run is another process: here it finds a package that is none."""
    monkeypatch.setattr(aoti, "write_package", lambda path, files: path.write_bytes(b"PK"))
    with pytest.raises(ExportError, match=r"the exported model does not run: .*cannot be opened"):
        export_aoti(gguf, tmp_path / "out", max_seq_len=LENGTH, target="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_a_crash_of_what_was_made_is_explained(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = stand_in_python(monkeypatch, tmp_path, "kill -SEGV $$")
    with pytest.raises(ExportError, match=r"ended by signal 11; a C\+\+ compiler that links libstdc\+\+ statically"):
        export_aoti(gguf, tmp_path / "out", max_seq_len=LENGTH, target="cpu")
    assert list(tmp_path.iterdir()) == [python]
