"""The process that renders chat templates, which are untrusted code taken from model files.

`template_process.py` starts this file as a script with two arguments: the seconds a rendering may take, and the bytes
of memory the process may take on top of the interpreter's own. A request is one line of JSON on stdin,
{"source": str, "variables": object}; the answer is one line on stdout, {"text": str} or {"error": str}.

Jinja's immutable sandbox stops a template from reaching Python. It does not stop a template that takes all memory or
never ends; the kernel does: memory is capped for the process, and an alarm ends it if one rendering takes too long.

The Jinja set-up (options, `tojson`, `raise_exception`, `strftime_now`, the `generation` tag) is that of transformers,
so that templates render to the same text.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 8 * 2**20
MAX_ERROR_CHARACTERS = 500


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (declared by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _answer(request: bytes) -> dict[str, str]:
    try:
        fields = json.loads(request)
        text = _compile(fields["source"]).render(fields["variables"])
    except MemoryError:
        return {"error": "rendering needs more memory than it may take"}
    except Exception as error:  # a template can raise anything, and each is an answer
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"the text is longer than {MAX_CHARACTERS} characters"}
    return {"text": text}


def _limit_process(memory_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        in_use_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use_bytes + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The parent may have blocked or ignored signals; Ctrl-C is the parent's to answer.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(seconds: float, memory_bytes: int) -> None:
    _limit_process(memory_bytes)
    for request in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = json.dumps(_answer(request)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
