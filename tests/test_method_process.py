"""Compiling methods in processes of their own: failures, and that no process outlives who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gemma4.config import CacheKind
from gemma4.export import method_process
from gemma4.export.method_process import Answer, CompiledFiles, MethodRequest, answer_request, compile_methods
from gemma4.export.methods import MethodName
from gemma4.export.report import ExportError
from tests.stand_in_python import stand_in_python
from tests.tiny_gguf import gemma4

ROOT = Path(__file__).parent.parent


def request(gguf: Path, method: MethodName = MethodName.DECODE) -> MethodRequest:
    return MethodRequest(
        gguf=gguf, method=method, max_seq_len=64, kv_cache=CacheKind.LOSSLESS, dtype="float32", device="cpu"
    )


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory on the GPU while compiling: CUDA out of memory.",
        ),
        (
            RuntimeError("C++ compile error\n\nCommand: g++ -o a\n\nOutput:\nIn file a.h\n a.h:1: error: no\nb: error"),
            "the compiler failed: C++ compile error: a.h:1: error: no",
        ),
        (RuntimeError("C++ compile error\n\nCommand: g++"), "the compiler failed: C++ compile error"),
        (OSError(28, os.strerror(28)), "the compiler failed: [Errno 28] No space left on device"),
        (MemoryError(), "out of memory on the host while compiling"),
    ],
)
def test_what_a_compiler_raises_becomes_a_sentence(
    failure: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> CompiledFiles:
        raise failure

    monkeypatch.setattr(method_process, "compile_here", fail)
    answers: list[Answer] = []
    answer_request(request(tmp_path), answers.append)
    assert [answer.error for answer in answers] == [message]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("""echo '{"phase": "trace"}'; echo '{"error": "out of memory"}'; sleep 60""", "model.gguf: out of memory"),
        ("echo first >&2; echo last >&2; exit 3", "model.gguf: the compiler failed: last"),
        ("exit 3", "the compiler failed: exit code 3"),
        ("kill -SEGV $$", "the compiler failed: it ended by signal 11"),
    ],
)
def test_a_failure_ends_both_processes(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two fails, the other would go on for a minute."""
    stand_in_python(
        monkeypatch, tmp_path, f"read request; case $request in *decode*) {script};; *) exec sleep 60;; esac"
    )
    begin = time.monotonic()
    with pytest.raises(ExportError, match=message):
        compile_methods([request(tmp_path / "model.gguf", name) for name in MethodName], lambda _: None)
    assert time.monotonic() - begin < 30


def test_answers_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CompiledFiles(files=["a.so"], seconds={"trace": 1.5}, peak_host_bytes=7, peak_device_bytes=None)
    line = Answer(result=result).model_dump_json(exclude_unset=True)
    stand_in_python(
        monkeypatch, tmp_path, f"""read request; echo '{{"phase": "trace"}}'; echo '{line}'; exec sleep 60"""
    )
    phases: list[str] = []
    assert compile_methods([request(tmp_path)] * 2, phases.append) == [result, result]
    assert phases == ["trace", "trace"]


def test_killed_it_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither a directory where one was to be made, nor a process."""
    gguf = gemma4(layers=2).write(tmp_path / "model.gguf")
    code = (
        "import sys\nfrom gemma4.export.aoti import export_aoti\n"
        "export_aoti(sys.argv[1], sys.argv[2], max_seq_len=64, target='cpu', on_phase=lambda n: print(n, flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(gguf), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("trace"):
            pass
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert len(children) == 2
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 20
    while any(map(_is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, children))


def _is_running(pid: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
