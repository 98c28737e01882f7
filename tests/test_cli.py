"""The command line: what `inspect` reports about real files, what `generate` and `chat` print, and exit codes."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gemma4 import __version__
from gemma4.chat import render_chat_ids
from gemma4.cli import main
from gemma4.inspect_file import inspect_file
from gemma4.measured_run import LoadOptions, Run, TextOptions
from gemma4.printable import printable
from gemma4.quant.errors import ContextError
from gemma4.terminal_chat import Conversation, read_message, run_command
from tests.tiny_gguf import GEMMA4_31B, gemma4, q4_k_m

pytestmark = pytest.mark.usefixtures("one_thread")

Cli = Callable[..., tuple[int, str, str]]

GREEDY = TextOptions(max_new_tokens=6, sampling={"temperature": 0.0}, seed=0, stop=())
JSON_KEYS = {
    "path",
    "architecture",
    "name",
    "gguf_version",
    "parts",
    "file_bytes",
    "bytes",
    "parameters",
    "bits_per_weight",
    "tensor_types",
    "fused_gate_up",
    "unfused_gate_up",
    "decoded_types",
    "not_loaded",
    "config",
    "unsupported",
    "metadata",
}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """cli(*args, stdin=b"…") runs the command line in this process: exit code, stdout, stderr."""

    def run(*args: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def real_run(real_gguf: Path) -> Run:
    return Run.load(real_gguf, LoadOptions(torch.device("cpu"), None, 256, fuse=True, dequantize=True))


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of an architecture this library does not run, with every kind of metadata value, by gguf-py."""
    path = tmp_path_factory.mktemp("llama") / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("evil\x1b[31m name\n[bold]x")
    writer.add_block_count(1)
    writer.add_float32("llama.nan", math.nan)
    writer.add_bool("llama.flag", True)
    writer.add_array("llama.long", list(range(65)))
    writer.add_array("llama.short", [0.5, 2.0])
    writer.add_array("llama.words", [f"word {i}" for i in range(1000)])
    writer.add_string("llama.essay", "word " * 500)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 64), np.float16))
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((4, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def inspect_json(cli: Cli, *args: object) -> dict[str, Any]:
    code, out, _ = cli("inspect", *args, "--json")
    assert code == 0
    report: dict[str, Any] = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert report.keys() - {"tensors"} == JSON_KEYS
    return report


def test_inspect_json_of_the_real_file(cli: Cli, real_gguf: Path) -> None:
    report = inspect_json(cli, real_gguf)
    assert report["path"] == str(real_gguf)
    assert report["parts"] == [str(real_gguf)]
    assert report["architecture"] == "gemma3"
    assert report["name"] == "Gemma 3 270m"
    assert report["gguf_version"] == 3
    assert report["file_bytes"] == real_gguf.stat().st_size
    assert (report["parameters"], report["bytes"]) == (268_098_176, 246_587_904)  # as gguf-py counts them
    assert report["bits_per_weight"] == pytest.approx(8 * report["bytes"] / report["parameters"])
    assert report["tensor_types"] == {"Q8_0": 10, "Q5_0": 81, "Q4_K": 27, "Q6_K": 9, "F32": 109}
    assert (report["fused_gate_up"], report["unfused_gate_up"]) == (0, 18)
    assert report["unsupported"] is None
    assert report["config"]["hidden_size"] == 640
    assert len(report["config"]["layers"]) == 18
    assert report["metadata"]["gemma3.block_count"] == 18
    assert report["metadata"]["tokenizer.ggml.tokens"] == {"type": "string", "length": 262_144}
    assert report["metadata"]["tokenizer.ggml.scores"] == {"type": "float", "length": 262_144}
    assert report["metadata"]["general.tags"] == ["gemma3", "gemma", "google", "text-generation"]


def test_inspect_text_of_the_real_file(cli: Cli, real_gguf: Path) -> None:
    code, out, err = cli("inspect", real_gguf)
    assert (code, err) == (0, "")
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "Gemma 3 270m" in rows["name"]
    assert "268,098,176" in rows["parameters"]
    assert "7.358" in rows["bits per weight"]
    assert "[262144 strings]" in rows["tokenizer.ggml.tokens"]
    assert "15 (window 512): 4 heads, 1 KV heads, head size 256" in rows["sliding layers"]
    report = inspect_file(real_gguf)
    assert report.plan is not None
    assert report.plan.describe() in out
    assert "blk.0.attn_q.weight" not in out


def test_inspect_lists_tensors_when_asked(cli: Cli, real_gguf: Path) -> None:
    report = inspect_json(cli, real_gguf, "--tensors")
    tensors = {tensor.pop("name"): tensor for tensor in report["tensors"]}
    assert len(tensors) == 236
    assert tensors["token_embd.weight"] == {"shape": [262144, 640], "type": "Q8_0", "bytes": 178257920, "part": 0}
    code, out, _ = cli("inspect", real_gguf, "--tensors")
    assert code == 0
    assert any(
        line.split() == ["token_embd.weight", "Q8_0", "262144", "×", "640", "178,257,920"] for line in out.splitlines()
    )


def test_inspect_shows_what_is_special_in_gemma4(cli: Cli, unpacked: Callable[[str], Path]) -> None:
    path = unpacked("dense-f32.gguf")
    report = inspect_json(cli, path)
    assert (report["architecture"], report["unsupported"]) == ("gemma4", None)
    assert (report["fused_gate_up"], report["unfused_gate_up"]) == (0, 6)
    assert len(report["config"]["rope_freq_factors"]) == 16
    _, out, _ = cli("inspect", path)
    assert "2: 4 heads, 1 KV heads, head size 32, K = V on 2" in out
    assert "10000 sliding, 1e+06 full, proportional" in out
    assert "fused gate+up on 0 of 6 MLP layers (6 left: 6 F32+F32)" in out


@pytest.mark.parametrize(
    ("types", "fused", "unfused"),
    [(q4_k_m(GEMMA4_31B), 60, 0), (q4_k_m(GEMMA4_31B) | {"blk.7.ffn_up": "Q6_K", "blk.8.ffn_gate": "Q5_K"}, 58, 2)],
    ids=["all", "mixed"],
)
def test_inspect_counts_fused_layers_of_a_31b_file(
    cli: Cli, tmp_path: Path, types: dict[str, str], fused: int, unfused: int
) -> None:
    path = gemma4(GEMMA4_31B, types).write_sparse(tmp_path / "31b.gguf")
    report = inspect_json(cli, path)
    assert report["unsupported"] is None
    assert (report["fused_gate_up"], report["unfused_gate_up"]) == (fused, unfused)
    assert report["parameters"] > 30e9
    code, out, _ = cli("inspect", path)
    assert code == 0
    assert f"fused gate+up on {fused} of 60 MLP layers ({unfused} left" in out


def test_inspect_of_a_split_file_is_that_of_the_whole(cli: Cli, tmp_path: Path) -> None:
    model = gemma4()
    whole = inspect_json(cli, model.write(tmp_path / "whole.gguf"))
    first = model.write(tmp_path / "split.gguf", split_tensors=20)
    report = inspect_json(cli, first)
    assert report["parts"] == sorted(map(str, tmp_path.glob("split-*.gguf")))
    assert len(report["parts"]) > 1
    assert {key: report[key] for key in ("parameters", "bytes", "tensor_types", "config")} == {
        key: whole[key] for key in ("parameters", "bytes", "tensor_types", "config")
    }
    _, out, _ = cli("inspect", first)
    assert f"split parts      {len(report['parts'])}" in out


def test_inspect_any_architecture(cli: Cli, llama_gguf: Path) -> None:
    report = inspect_json(cli, llama_gguf)
    assert report["architecture"] == "llama"
    assert report["parameters"] == 8 * 64 + 4 * 64 + 4 * 64
    assert report["bytes"] == 8 * 64 * 4 + 4 * 64 * 2 + 4 * 68
    assert report["tensor_types"] == {"F32": 1, "F16": 1, "Q8_0": 1}
    assert report["unsupported"]["code"] == "unsupported_architecture"
    assert "'llama'" in report["unsupported"]["message"]
    assert report["config"] is report["fused_gate_up"] is report["unfused_gate_up"] is None
    metadata = report["metadata"]
    assert metadata["llama.nan"] == "nan"
    assert metadata["llama.flag"] is True
    assert metadata["llama.long"] == {"type": "int", "length": 65}
    assert metadata["llama.short"] == [0.5, 2.0]
    assert metadata["llama.essay"] == "word " * 500


def test_inspect_text_of_any_architecture(cli: Cli, llama_gguf: Path) -> None:
    code, out, _ = cli("inspect", llama_gguf, "--tensors")
    assert code == 0
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert r"evil\x1b[31m name\n[bold]x" in rows["name"]
    assert "\x1b" not in out
    assert "[1000 strings]" in rows["llama.words"]
    assert "… (2,500 characters)" in rows["llama.essay"]
    assert rows["Q8_0"].split() == ["Q8_0", "1", "256", "272", "8.500"]
    assert "unsupported_architecture" in out


def test_inspect_says_why_a_gemma4_file_is_not_run(cli: Cli, tmp_path: Path) -> None:
    model = gemma4()
    del model.tensors["blk.1.ffn_down.weight"]
    path = model.write(tmp_path / "incomplete.gguf")
    report = inspect_json(cli, path)
    assert report["tensor_types"] == {"F32": len(model.tensors)}
    message = f"{path}: blk.1.ffn_down.weight: the file lacks blk.1.ffn_down.weight"
    assert report["unsupported"] == {"code": "missing_tensor", "message": message}
    assert report["fused_gate_up"] is report["unfused_gate_up"] is None
    assert report["config"]["hidden_size"] == 256
    code, out, _ = cli("inspect", path)
    assert code == 0
    assert "Tensors by type" in out
    reason = "[missing_tensor] blk.1.ffn_down.weight: the file lacks blk.1.ffn_down.weight"
    assert out.endswith(f"Not a model this library runs: {reason}\n")


def test_inspect_shows_what_the_family_adds(cli: Cli, unpacked: Callable[[str], Path]) -> None:
    _, out, _ = cli("inspect", str(unpacked("e2b-f32.gguf")))
    assert "of size 16" in out
    assert "1 read another layer's KV" in out
    _, out, _ = cli("inspect", str(unpacked("moe-f32.gguf")))
    assert "8, 2 for a token, intermediate size 48" in out


def test_inspect_says_why_a_file_does_not_run(cli: Cli, tmp_path: Path) -> None:
    model = gemma4()
    model.metadata["gemma4.expert_count"] = 128
    report = inspect_json(cli, model.write(tmp_path / "experts.gguf"))
    assert report["unsupported"]["code"] == "metadata"  # how many of them are used is not said
    assert report["config"] is report["fused_gate_up"] is None
    assert report["parameters"] > 0


def test_inspect_a_file_without_tensors(cli: Cli, unpacked: Callable[[str], Path]) -> None:
    report = inspect_json(cli, unpacked("ggml-vocab-gemma-4.gguf"))
    assert (report["parameters"], report["bytes"], report["tensor_types"]) == (0, 0, {})
    assert report["bits_per_weight"] is None
    assert report["metadata"]["tokenizer.ggml.merges"] == {"type": "string", "length": 514_906}
    code, out, _ = cli("inspect", unpacked("ggml-vocab-gemma-4.gguf"))
    assert code == 0
    assert "[514906 strings]" in out


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_inspect_is_quick_and_does_without_torch(
    real_gguf: Path, unpacked: Callable[[str], Path], options: list[str]
) -> None:
    program = (
        "import sys\nfrom gemma4.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    for path in (real_gguf, unpacked("ggml-vocab-gemma-4.gguf")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program, "inspect", str(path), *options], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr == "False\n"
        # One thread and no waiting: processor time is wall time, without what others do on the machine.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_input_that_is_refused_is_one_line_and_exit_code_3(cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "model\n.gguf"
    text.write_text("This is no model.")
    for command in (["inspect"], ["generate", "--prompt", "x"], ["chat"]):
        code, out, err = cli(command[0], tmp_path / "gone.gguf", *command[1:])
        assert (code, out) == (3, "")
        assert err == f"error [file_missing]: {tmp_path}/gone.gguf: there is no file at this path\n"
        code, out, err = cli(command[0], text, *command[1:])
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert err.startswith("error [not_gguf]: ")


def test_a_model_that_cannot_run_is_refused(cli: Cli, llama_gguf: Path) -> None:
    code, out, err = cli("generate", llama_gguf, "--prompt", "x")
    assert (code, out) == (3, "")
    assert err.startswith("error [unsupported_architecture]: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Usage"),
        (["frobnicate"], "frobnicate"),
        (["inspect"], "FILE"),
        (["generate", "m.gguf", "--prompt", "a", "--prompt-file", __file__], "not both"),
        (["generate", "m.gguf", "--prompt-file", "/nonexistent"], "/nonexistent"),
        (["generate", "m.gguf", "--prompt", "a", "-n", "0"], "max-new-tokens"),
        (["generate", "m.gguf", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["generate", "m.gguf", "--prompt", "a", "--top-p", "nan"], "top_p"),
        (["generate", "m.gguf", "--prompt", "a", "--stop", ""], "stop"),
        (["generate", "m.gguf", "--prompt", "a", "--dtype", "float16"], "float16"),
        (["generate", "m.gguf", "--prompt", "a", "--device", "abacus"], "abacus"),
        (["generate", "m.gguf", "--prompt", "a", "--device", "meta"], "meta"),
        (["chat", "m.gguf", "--device", "cuda:99"], "cuda:99"),
        (["chat", "m.gguf", "--seed", "-1"], "seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2(cli: Cli, args: list[str], message: str) -> None:
    code, out, err = cli(*args)
    assert code == 2
    assert message in out + err
    assert "Traceback" not in err


def test_a_prompt_that_is_not_utf8_is_wrong_usage(cli: Cli) -> None:
    code, _, err = cli("generate", "m.gguf", stdin=b"caf\xe9")
    assert code == 2
    assert "UTF-8" in err


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"gemma4 {__version__}\n", "")


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "gemma4", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gemma4 {__version__}\n"


def generate_args(path: Path, *more: str) -> list[str]:
    return ["generate", str(path), "--dequantize", "--device", "cpu", "--max-seq-len", "128", "-n", "6", *more]


def test_generate_streams_only_the_text_to_stdout(cli: Cli, real_gguf: Path, real_run: Run, tmp_path: Path) -> None:
    prompt = "The Eiffel Tower is in"
    expected = real_run.model.generate(prompt, 6, temperature=0.0)
    (tmp_path / "prompt.txt").write_text(prompt)
    args = generate_args(real_gguf, "--temperature", "0", "--prompt-file", str(tmp_path / "prompt.txt"), "--stats")
    code, out, err = cli(*args)
    assert (code, out) == (0, expected + "\n")
    lines = err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("Gemma 3 270m (gemma3): 268 M parameters, 246.6 MB packed, held dense; float32 on cpu")
    assert lines[1] == "fused gate+up on 0 of 18 MLP layers (18 left: 18 Q5_0+Q5_0)"
    assert lines[2] == "fused q+k+v on 9 of 18 attention layers (9 left: 9 Q5_0+Q5_0+Q8_0)"
    assert lines[3] == "fused q+k on 9 of 9 other attention layers (0 left)"
    assert "prompt 6 tokens" in lines[4]
    assert "generated 6 tokens" in lines[4]


def test_generate_json_is_one_object_and_follows_the_seed(cli: Cli, real_gguf: Path, real_run: Run) -> None:
    args = generate_args(real_gguf, "--json", "--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--seed", "7")
    code, out, err = cli(*args, stdin="Once upon a time, é".encode())
    assert code == 0
    assert len(err.splitlines()) == 4  # no stats: stderr is no terminal
    result = json.loads(out)
    options = {"temperature": 1.5, "top_k": 0, "top_p": 1.0}
    same = real_run.model.generate("Once upon a time, é", 6, seed=7, **options)
    assert result.pop("text") == same
    assert same != real_run.model.generate("Once upon a time, é", 6, seed=8, **options)
    assert result.keys() == {
        "prompt_tokens",
        "new_tokens",
        "load_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "peak_rss_bytes",
        "peak_gpu_bytes",
    }
    assert result["prompt_tokens"] == len(real_run.model.tokenizer.encode("Once upon a time, é"))
    assert result["new_tokens"] == 6
    assert result["peak_gpu_bytes"] is None
    assert min(result[key] for key in ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s")) > 0
    assert result["peak_rss_bytes"] > 268_098_176 * 4


def test_a_request_past_the_context_is_refused(cli: Cli, real_gguf: Path) -> None:
    code, out, err = cli(*generate_args(real_gguf, "-n", "500", "--prompt", "a"))
    assert (code, out.strip()) == (3, "")
    assert "error [context]: " in err.splitlines()[-1]


def test_ctrl_c_ends_generate_with_130(real_gguf: Path) -> None:
    args = generate_args(real_gguf, "-n", "120", "--prompt", "a", "--temperature", "0")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gemma4", *args]
    # What runs in the background ignores interrupts, and so does what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_run_counts_tokens_and_time(real_run: Run) -> None:
    text = real_run.text(real_run.model.tokenizer.encode("The Eiffel Tower is in"), GREEDY)
    assert text.prefill_tokens_per_s is text.decode_tokens_per_s is None
    assert "".join(text) == real_run.model.generate("The Eiffel Tower is in", 6, temperature=0.0)
    assert (text.new_tokens, text.is_complete) == (6, False)
    assert text.decode_tokens_per_s == pytest.approx(5 / text.decode_s)


def test_piped_chat_session(cli: Cli, real_gguf: Path, real_run: Run) -> None:
    args = ["chat", real_gguf, "--dequantize", "--device", "cpu", "--max-seq-len", "256", "-n", "6"]
    typed = (
        "/help\nFirst\n/nonsense\n\nA text \\\nof two lines\n/reset\n/system Be brief.\n"
        '"""/starts with a slash\nand goes on"""\n/quit\nnever read\n'
    )
    code, out, err = cli(*args, "--temperature", "0", stdin=typed.encode())
    assert code == 0
    user, model = "user", "assistant"
    first = real_run.model.chat([{"role": user, "content": "First"}], 6, temperature=0.0)
    history = [
        {"role": user, "content": "First"},
        {"role": model, "content": first},
        {"role": user, "content": "A text \nof two lines"},
    ]
    second = real_run.model.chat(history, 6, temperature=0.0)
    fresh = [
        {"role": "system", "content": "Be brief."},
        {"role": user, "content": "/starts with a slash\nand goes on"},
    ]
    third = real_run.model.chat(fresh, 6, temperature=0.0)
    assert out == f"{first}\n{second}\n{third}\n"
    assert "/system TEXT" in err
    assert "unknown command /nonsense" in err
    assert "the conversation is forgotten" in err


def test_chat_ends_with_its_input(cli: Cli, real_gguf: Path) -> None:
    code, out, _ = cli("chat", real_gguf, "--device", "cpu", stdin=b"/reset\n")
    assert (code, out) == (0, "")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(real_run: Run) -> None:
    conversation = Conversation(real_run, GREEDY, None, think=False)
    written: list[str] = []

    def write(piece: str) -> None:
        written.append(piece)
        if len(written) == 2:
            raise KeyboardInterrupt

    assert conversation.answer("Tell me a story.", write) == "stopped"
    assert conversation.turns == [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "".join(written)},
    ]


def test_the_next_answer_goes_on_where_ctrl_c_stopped_one(real_run: Run) -> None:
    conversation = Conversation(real_run, replace(GREEDY, max_new_tokens=20), None, think=False)
    written: list[str] = []

    def write(piece: str) -> None:
        written.append(piece)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert conversation.answer("Tell me a long story about a fox.", write) == "stopped"
    assert len(written) == 2
    assert signal.getsignal(signal.SIGINT) is before
    passes: list[int] = []
    hook = real_run.model.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    try:
        conversation.answer("Go on.", lambda _: None)
    finally:
        hook.remove()
    messages = [*conversation.turns[:2], {"role": "user", "content": "Go on."}]
    whole = render_chat_ids(real_run.model.chat_template, real_run.model.tokenizer, messages)
    assert passes[0] < len(whole) // 2 + 4


def test_a_conversation_that_outgrows_the_context_is_kept(real_run: Run) -> None:
    conversation = Conversation(real_run, GREEDY, None, think=False)
    conversation.answer("Tell me a story.", str)
    kept = list(conversation.turns)
    with pytest.raises(ContextError, match=r"the context holds 256; /reset .*up to 32768"):
        conversation.answer("word " * 300, str)
    assert conversation.turns == kept
    conversation.answer("Go on.", str)
    assert len(conversation.turns) == 4


def test_an_answer_says_what_cut_it(real_run: Run) -> None:
    conversation = Conversation(real_run, GREEDY, None, think=False)
    assert conversation.answer("Tell me a story.", str) == "cut after 6 tokens (--max-new-tokens)"
    room = 3
    conversation = Conversation(real_run, replace(GREEDY, max_new_tokens=1000), None, think=False)
    questions = ("word " * n for n in range(200, 256))
    question = next(text for text in questions if prompt_size(real_run, text) == 256 - room)
    assert conversation.answer(question, str) == "the context is full"


def prompt_size(run: Run, question: str) -> int:
    messages = [{"role": "user", "content": question}]
    return len(render_chat_ids(run.model.chat_template, run.model.tokenizer, messages))


@pytest.mark.parametrize(
    ("lines", "message", "is_command"),
    [
        (["hello"], "hello", False),
        (["a\\", "b\\", "c"], "a\nb\nc", False),
        (["a\\"], "a", False),
        (['"""', "a", "", "b", '"""'], "a\n\nb", False),
        (['"""a', 'b"""  '], "a\nb", False),
        (['"""one"""'], "one", False),
        (['"""a', "b"], "a\nb", False),
        (["/reset"], "/reset", True),
        (['"""/reset"""'], "/reset", False),
        ([" /reset"], " /reset", False),
    ],
)
def test_messages_of_one_and_several_lines(lines: list[str], message: str, is_command: bool) -> None:
    source = iter(lines)

    def read_line(_: str) -> str:
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    assert read_message(read_line) == (message, is_command)
    with pytest.raises(EOFError):
        read_message(read_line)


def test_system_text_is_set_and_removed(real_run: Run) -> None:
    conversation = Conversation(real_run, GREEDY, None, think=False)
    run_command(conversation, "/system  Answer in French. ")
    assert conversation.system == "Answer in French."
    run_command(conversation, "/system")
    assert conversation.system is None


def test_printable_escapes_only_what_a_terminal_would_act_on() -> None:
    assert printable("naïve ▁日本") == "naïve ▁日本"
    assert printable("a\x1b[2J\r\nb\u202e") == r"a\x1b[2J\r\nb\u202e"
