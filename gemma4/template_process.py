"""Starts and talks to the process of `template_worker.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma4.quant.errors import TemplateError

SECONDS_PER_RENDERING = 3.0
MEMORY_BYTES = 192 * 2**20
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateProcess:
    """One worker process, started by the first rendering and again whenever a template has ended it.

    Threads take turns. A process forked from this one starts a worker of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., Any] | None = None
        self._owner_pid = 0

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError on whatever keeps the template from rendering; `variables` must be JSON values."""
        try:
            request = json.dumps({"source": source, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages are not plain JSON values: {error}") from error
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError as error:
            raise TemplateError("the rendering process ended before it was asked") from error
        finally:
            # Also on Ctrl-C, when an answer may still be under way.
            if not line.endswith(b"\n"):
                self.close()
        if not line.endswith(b"\n"):
            raise TemplateError(_how_it_ended(process.returncode))
        answer: dict[str, str] = json.loads(line)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None or self._owner_pid != os.getpid():
            self.close()
            # -P keeps this package's folder off the worker's module path.
            command = [sys.executable, "-P", str(_WORKER), str(SECONDS_PER_RENDERING), str(MEMORY_BYTES)]
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError as error:
                raise TemplateError(f"the rendering process does not start: {error}") from error
            self._owner_pid = os.getpid()
            self._stop = weakref.finalize(self, _end, self._process, self._owner_pid)
        return self._process

    def close(self) -> None:
        """End the worker; the next rendering starts a new one."""
        if self._stop is not None:
            self._stop()


def _end(process: subprocess.Popen[bytes], owner_pid: int) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # of a request that was never read
            pipe.close()
    if os.getpid() == owner_pid:
        process.kill()
        process.wait()


def _how_it_ended(returncode: int) -> str:
    if returncode == -signal.SIGALRM:
        return f"rendering took longer than {SECONDS_PER_RENDERING:g} seconds"
    cause = f"signal {-returncode}" if returncode < 0 else f"status {returncode}"
    return f"rendering ended the process that did it ({cause})"
