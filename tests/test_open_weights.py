"""What takes a GGUF file takes a Hugging Face checkpoint's directory: the commands and the API, by the same results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gemma4 import Gemma4
from gemma4.cli import main
from gemma4.hf_checkpoint import HFCheckpoint
from gemma4.hf_export import export_hf
from gemma4.inspect_file import inspect_file
from gemma4.open_weights import open_weights
from gemma4.quant.errors import FileMissingError, NotGGUFError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.terminal_chat import Conversation
from tests.drafter_gguf import drafter_for
from tests.tiny_gguf import gemma4
from tests.tiny_vocabulary import vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in bfloat16 as a GGUF file and as a directory of shards."""
    root = tmp_path_factory.mktemp("twins")
    model = gemma4()
    model.metadata |= vocabulary()
    for name in model.tensors.keys() - {"rope_freqs.weight"}:
        model.retype(name, "BF16")
    drafter_for(model).write(root / "drafter.gguf")
    path = model.write(root / "model.gguf")
    export_hf(path, root / "checkpoint", shard_bytes=1_000_000)
    return path, root / "checkpoint"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_files_and_directories(twins: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = twins
    with open_weights(path) as file, open_weights(str(folder)) as checkpoint:
        assert (type(file), type(checkpoint)) == (GGUFFile, HFCheckpoint)
        assert file.tensors.keys() == checkpoint.tensors.keys()
    with pytest.raises(FileMissingError) as caught:
        open_weights(tmp_path / "gone")
    assert caught.value.path == tmp_path / "gone"
    with pytest.raises(FileMissingError, match="expected a checkpoint directory") as caught:
        open_weights(tmp_path)
    assert caught.value.path == tmp_path / "config.json"


def test_the_api_opens_both(twins: tuple[Path, Path]) -> None:
    ids = [2, 9, 41, 33, 17, 5]
    file, folder = (Gemma4.from_gguf(path, device="cpu") for path in twins)
    assert torch.equal(file.logits(ids), folder.logits(ids))
    assert torch.equal(file.logits(ids), Gemma4.from_pretrained(twins[1], device="cpu").logits(ids))
    dense = Gemma4.from_gguf(twins[1], device="cpu", dequantize=True)
    assert dense.weight("blk.0.attn_q.weight").planes_dict()["weight"].dtype is torch.float32


def test_generate_and_chat(
    twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for path in twins:
        code, out, err = run(
            capsys, "generate", path, "-p", "the sea", "-n", 4, "--temperature", 0, "--device", "cpu", "--json"
        )
        assert code == 0, err
        texts.append(json.loads(out)["text"])
        assert " M parameters, " in err
    assert texts[0] == texts[1]
    conversations: list[Conversation] = []
    monkeypatch.setattr("gemma4.terminal_chat.chat_loop", conversations.append)
    for path in twins:
        assert run(capsys, "chat", path, "--device", "cpu")[0] == 0
        assert conversations[-1].run.model.path == path


def test_a_drafter_serves_both(twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for path in twins:
        drafter = twins[0].with_name("drafter.gguf")
        args = ("-p", "the sea", "-n", 6, "--temperature", 0, "--device", "cpu", "--draft", drafter, "--json")
        code, out, err = run(capsys, "generate", path, *args)
        assert code == 0, err
        results.append({key: json.loads(out)[key] for key in ("text", "rounds", "drafted", "accepted")})
    assert results[0] == results[1]
    assert results[0]["drafted"] > 0


def test_fit(twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for path in twins:
        code, out, _ = run(capsys, "fit", path, "--context", 64, "--gpu-memory", 24, "--json")
        assert code == 0
        plans.append(json.loads(out))
        assert (plans[-1].pop("path"), bool(plans[-1].pop("name"))) == (str(path), True)
    assert plans[0] == plans[1]


def test_inspect(twins: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = twins
    report, expected = inspect_file(folder), inspect_file(path)
    assert report.unsupported is None
    assert report.plan == expected.plan
    assert (report.gguf_version, report.parameters) == (None, expected.parameters)
    assert [shard.name for shard in report.paths] == sorted(shard.name for shard in folder.glob("*.safetensors"))
    assert len(report.paths) > 1
    assert report.file_bytes == sum(shard.stat().st_size for shard in report.paths)
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "Hugging Face checkpoint" in rows["format"]
    assert str(len(report.paths)) in rows["split parts"]
    assert report.plan.describe() in out
    assert json.loads(run(capsys, "inspect", folder, "--json")[1])["gguf_version"] is None


@pytest.mark.parametrize("command", [["inspect"], ["fit"], ["generate", "-p", "x"], ["chat"]], ids=lambda args: args[0])
def test_what_is_no_checkpoint_is_refused_by_its_path(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, command[0], tmp_path, *command[1:])
    assert (code, out) == (3, "")
    assert err.startswith(f"error [file_missing]: {tmp_path}/config.json: ")


def test_convert_takes_files_only(twins: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(NotGGUFError, match="a directory") as caught:
        export_hf(twins[1], tmp_path / "out")
    assert caught.value.path == twins[1]
