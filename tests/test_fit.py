"""`gemma4 fit`: table, verdict and exit code from a header alone."""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma4 import fit_report, gpu_memory
from gemma4.cli import main
from gemma4.fit_report import parse_memory
from gemma4.gpu_memory import GPUMemory, first_gpu
from gemma4.quant.errors import DoesNotFitError
from tests.tiny_gguf import GEMMA4_31B, gemma4, q4_k_m

GIB = 1 << 30


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 31B header; its weights are a hole."""
    return gemma4(GEMMA4_31B, q4_k_m(GEMMA4_31B)).write_sparse(tmp_path_factory.mktemp("fit") / "31b.gguf")


@pytest.fixture
def fit(path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["fit", str(path), *map(str, args)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu(memory) puts a GPU, or none, into this machine."""

    def put(found: GPUMemory | None) -> None:
        monkeypatch.setattr(fit_report, "first_gpu", lambda: found)

    return put


def test_verdicts_and_exit_codes(fit: Any) -> None:
    code, out, err = fit("--gpu-memory", 80, "--context", 131072)
    assert (code, err) == (0, "")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "17.76 GiB" in rows["weights"]
    assert "0.83 GiB" in rows["KV cache, 50 sliding layers of 1,088 positions"]
    assert "KV cache, 10 full layers of 131,072 positions" in rows
    assert "a GPU of 80.00 GiB: fits" in out
    assert "longest context that fits: 262,144 tokens" in out
    code, out, err = fit("--gpu-memory", "24GiB", "--context", 131072)
    assert (code, err) == (4, "")
    assert "does not fit" in out
    assert "none" not in out
    code, out, err = fit("--gpu-memory", "16GB")
    assert (code, err) == (4, "")
    assert "longest context that fits: none" in out


def test_json(fit: Any, path: Path) -> None:
    code, out, _ = fit("--gpu-memory", 24, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["path"], report["fits"], report["available_bytes"]) == (str(path), True, 24 * GIB)
    parts = ("weight_bytes", "kv_bytes", "prefill_bytes", "decode_bytes", "rounding_bytes", "allowance_bytes")
    assert report["loading_bytes"] == 0
    assert report["total_bytes"] == sum(report[part] for part in parts)
    longest = report["longest_context"]
    assert fit("--gpu-memory", 24, "--context", longest)[0] == 0
    assert fit("--gpu-memory", 24, "--context", longest + 1)[0] == 4


def test_the_gpu_of_this_machine(fit: Any, gpu: Any) -> None:
    gpu(GPUMemory("NVIDIA Abacus", 24 * GIB, 22 * GIB))
    code, out, _ = fit()
    assert code == 0
    assert "NVIDIA Abacus, 22.00 GiB of 24.00 GiB free: fits" in out
    gpu(GPUMemory("NVIDIA Abacus", 24 * GIB, 12 * GIB))
    assert fit()[0] == 4
    assert fit("--gpu-memory", 24)[0] == 0
    gpu(None)
    code, out, _ = fit()
    assert code == 2
    assert "17.76 GiB" in out
    assert "--gpu-memory" in out
    assert json.loads(fit("--json")[1])["fits"] is None


def test_what_is_refused(fit: Any, tmp_path: Path) -> None:
    code, out, err = fit("--context", 262_145)
    assert (code, out) == (3, "")
    assert err.startswith("error [context]: ")
    assert fit("--context", 0)[0] == 2
    assert fit("--gpu-memory", "24 apples")[0] == 2
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(tmp_path / "gone.gguf")])
    assert ended.value.code == 3


@pytest.mark.parametrize(("text", "size"), [("24", 24 * GIB), ("24 GiB", 24 * GIB), ("1.5gib", 3 * GIB // 2)])
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size
    assert parse_memory("80GB") == 80 * 10**9
    for wrong in ("", "0", "-1", "GB", "24TB", "1e3"):
        with pytest.raises(ValueError, match="GiB"):
            parse_memory(wrong)


def test_a_model_too_large_to_load_shows_its_table(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise DoesNotFitError("found 3, needed 4", path=path, field="max_seq_len", table="weights 3\ntotal 4")

    monkeypatch.setattr("gemma4.measured_run.Run.load", load)
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(path), "--prompt", "x"])
    assert ended.value.code == 4
    expected = f"weights 3\ntotal 4\nerror [does_not_fit]: {path}: max_seq_len: found 3, needed 4\n"
    assert capsys.readouterr() == ("", expected)


def test_the_driver_is_asked_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """What nvml.h promises; `fails` names the call that does not succeed."""

        fails = ""

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> int:
                if name == "nvmlDeviceGetName":
                    args[1].value = b"NVIDIA Abacus"
                elif name == "nvmlDeviceGetMemoryInfo":
                    info = args[1]._obj
                    info.total, info.free = 24 * GIB, 20 * GIB
                return int(name == self.fails)

            return call

    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert first_gpu() == GPUMemory("NVIDIA Abacus", 24 * GIB, 20 * GIB)
    for driver.fails in ("nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMemoryInfo"):
        assert first_gpu() is None
    assert ctypes.sizeof(gpu_memory._MemoryInfo) == 24


def test_fit_is_quick_and_does_without_torch(path: Path) -> None:
    program = (
        "import sys\nfrom gemma4.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", program, "fit", str(path), "--gpu-memory", "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "False\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
