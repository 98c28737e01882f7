"""One method traced and compiled in a process of its own, so that both of a model are compiled at once.

usage: python -m gemma4.export.method_process

Standard input tells what to compile, as one line of JSON, and stays open: where it ends, so did the process that asked,
and this one ends with it. Standard output answers in lines of JSON: phases as they begin, then the result or an error.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

import torch
from pydantic import BaseModel

from gemma4.config import CacheKind, Gemma4Config
from gemma4.export.hollow_model import hollow_methods
from gemma4.export.low_memory import compile_method, low_memory
from gemma4.export.methods import MethodName
from gemma4.export.peaks import Peaks
from gemma4.export.report import ExportError
from gemma4.kernels.dependent_launch import recorded_as_dependent
from gemma4.mapping import plan_load
from gemma4.quant.gguf_file import GGUFFile


class MethodRequest(BaseModel):
    """device: as torch writes it. dtype: of activations, without `torch.`."""

    gguf: Path
    method: MethodName
    max_seq_len: int
    kv_cache: CacheKind
    dtype: str
    device: str


class CompiledFiles(BaseModel):
    """files: for `write_package`. seconds: by phase. Peaks as in `gemma4.export.peaks.Peaks`."""

    files: list[str]
    seconds: dict[str, float]
    peak_host_bytes: int | None
    peak_device_bytes: int | None


class Answer(BaseModel):
    """One of these."""

    phase: str | None = None
    result: CompiledFiles | None = None
    error: str | None = None


def compile_here(request: MethodRequest, on_phase: Callable[[str], None]) -> CompiledFiles:
    """Compiles a method in this process. Raises what the compiler raises."""
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    peaks = Peaks(device, on_phase)
    with peaks.watching(), GGUFFile.open(request.gguf) as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)
        method = hollow_methods(file, config, plan, request.max_seq_len, request.kv_cache, dtype, device)[
            request.method
        ]
        with low_memory(method, device), recorded_as_dependent():
            with peaks.phase(f"trace {request.method}"):
                program = method.export()
            with peaks.phase(f"compile {request.method}"):
                files = compile_method(program)
    return CompiledFiles(
        files=files, seconds=peaks.seconds, peak_host_bytes=peaks.host_bytes, peak_device_bytes=peaks.device_bytes
    )


def compile_methods(requests: Sequence[MethodRequest], on_phase: Callable[[str], None]) -> list[CompiledFiles]:
    """Compiles methods at once, each in a process of its own. on_phase: called from threads, with each phase's name.

    Raises ExportError as soon as one fails; no process is left then.
    """
    with ThreadPoolExecutor(len(requests)) as pool, ExitStack() as stack:
        processes = [stack.enter_context(_started(request)) for request in requests]
        answers = [
            pool.submit(_answer_of, process, errors, request.gguf, on_phase)
            for request, (process, errors) in zip(requests, processes, strict=True)
        ]
        for answer in as_completed(answers):
            answer.result()  # raises what failed first
        return [answer.result() for answer in answers]


def python_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a module of this library as this process would."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return [sys.executable, "-m", module, *arguments], environment


def failure_of(returncode: int, errors: str) -> str:
    """What a process that ended with an error died of, in a line."""
    if returncode < 0:
        return (
            f"it ended by signal {-returncode}; a C++ compiler that links libstdc++ statically makes libraries that "
            "crash, try CXX=/usr/bin/g++ CC=/usr/bin/gcc"
        )
    return (errors.strip().splitlines() or [f"exit code {returncode}"])[-1]


@contextmanager
def _started(request: MethodRequest) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    command, environment = python_command("gemma4.export.method_process")
    with tempfile.TemporaryFile("w+") as errors:
        pipe = subprocess.PIPE
        process = subprocess.Popen(  # a group of its own, so that compilers it calls end with it
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment, start_new_session=True
        )
        try:
            assert process.stdin is not None
            process.stdin.write(request.model_dump_json() + "\n")
            process.stdin.flush()
            yield process, errors
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _answer_of(
    process: subprocess.Popen[str], errors: IO[str], gguf: Path, on_phase: Callable[[str], None]
) -> CompiledFiles:
    assert process.stdout is not None
    for line in process.stdout:
        answer = Answer.model_validate_json(line)
        if answer.phase:
            on_phase(answer.phase)
        if answer.error:
            raise ExportError(answer.error, path=gguf)
        if answer.result:
            return answer.result
    returncode = process.wait()
    errors.seek(0)
    raise ExportError(f"the compiler failed: {failure_of(returncode, errors.read())}", path=gguf)


def answer_request(request: MethodRequest, answer: Callable[[Answer], None]) -> None:
    """Compiles a method in this process and tells how it goes."""
    try:
        answer(Answer(result=compile_here(request, lambda phase: answer(Answer(phase=phase)))))
    except MemoryError:
        answer(Answer(error="out of memory on the host while compiling"))
    except Exception as error:  # what a compiler raises is anything, and torch without memory may be wrapped in it
        is_full = "out of memory" in str(error)
        what = "out of memory on the GPU while compiling" if is_full else "the compiler failed"
        answer(Answer(error=f"{what}: {_in_a_line(str(error)) or type(error).__name__}"))


_TOOL_ERROR: Final = re.compile(r"\b(error|undefined reference|No space left|Killed)\b")


def _in_a_line(error: str) -> str:
    """The first line of what a compiler says, and the first that tells of an error in what it ran."""
    lines = error.strip().splitlines()
    return ": ".join(lines[:1] + [line.strip() for line in lines[1:] if _TOOL_ERROR.search(line)][:1])


def main() -> None:
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = MethodRequest.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    answer_request(request, lambda answer: print(answer.model_dump_json(exclude_unset=True), file=out, flush=True))


def _end_with_the_asker() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
