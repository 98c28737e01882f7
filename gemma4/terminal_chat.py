"""A conversation on a terminal or a pipe: answers on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from gemma4.chat import render_chat_ids
from gemma4.measured_run import Run, TextOptions, TimedText, describe_drafts
from gemma4.printable import printable
from gemma4.quant.errors import ContextError, Gemma4Error
from gemma4.speculate import Speculation

HELP: Final = '''\
/help          this text
/reset         forget the conversation; the system text stays
/system TEXT   set the system text from here on; without TEXT remove it
/quit          end; so does Ctrl-D
A line that ends in \\ goes on in the next one. """ begins a text of several lines and ends it.
Ctrl-C stops an answer.'''

_BLOCK: Final = '"""'


@dataclass(slots=True)
class Conversation:
    """The messages so far and how to continue them. drafts: of all answers."""

    run: Run
    options: TextOptions
    system: str | None
    think: bool
    turns: list[dict[str, str]] = field(default_factory=list)
    drafts: Speculation = field(default_factory=Speculation)

    def answer(self, text: str, write: Callable[[str], object]) -> str | None:
        """Writes the answer to `text` piece by piece and keeps both; an interrupted answer is kept as far as it came.

        Returns why the answer is not whole, if it is not. An error leaves the conversation as it was.
        """
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        note = None
        try:
            timed, room = self._begin(question)
            with _interrupts_between_pieces() as check:
                for piece in timed:
                    pieces.append(piece)
                    write(piece)
                    check()
        except KeyboardInterrupt:
            note = "stopped"
        else:
            if timed.new_tokens == timed.options.max_new_tokens and not timed.is_complete:
                is_full = timed.new_tokens == room
                note = "the context is full" if is_full else f"cut after {timed.new_tokens} tokens (--max-new-tokens)"
        if pieces:
            if timed.speculation is not None:
                self.drafts.add(timed.speculation)
            self.turns += [question, {"role": "assistant", "content": "".join(pieces)}]
        return note

    def _begin(self, question: dict[str, str]) -> tuple[TimedText, int]:
        """The answer to `question`, not yet begun, and how many tokens the context has room for."""
        model = self.run.model
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns, question]
        ids = render_chat_ids(model.chat_template, model.tokenizer, messages, enable_thinking=self.think)
        room = model.max_seq_len - len(ids)
        if room < 1:
            raise ContextError(
                f"the conversation has grown to {len(ids)} tokens, the context holds {model.max_seq_len}; "
                f"/reset begins anew, --max-seq-len (up to {model.config.context_length}) allows a longer one",
                field="max_seq_len",
            )
        wanted = min(self.options.max_new_tokens, room)
        return self.run.text(ids, replace(self.options, max_new_tokens=wanted)), room


@contextlib.contextmanager
def _interrupts_between_pieces() -> Iterator[Callable[[], None]]:
    """From the first call of the function it gives, Ctrl-C waits for the next one; a second Ctrl-C does not.

    An answer that is left between two tokens leaves keys and values that the next one can go on from.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    has_begun, is_wanted = threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        if not has_begun.is_set() or is_wanted.is_set():
            raise KeyboardInterrupt
        is_wanted.set()

    def check() -> None:
        has_begun.set()
        if is_wanted.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def chat_loop(conversation: Conversation) -> None:
    """Reads messages from stdin until its end or /quit. Where there was a drafter, says last what became of drafts."""
    try:
        _read_and_answer(conversation)
    finally:
        for line in describe_drafts(conversation.drafts):
            _tell(line)


def _read_and_answer(conversation: Conversation) -> None:
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() editing and history
        _tell("/help lists commands, Ctrl-D ends")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")

    def read_line(prompt: str) -> str:
        return input(prompt if is_interactive else "")

    while True:
        try:
            text, is_command = read_message(read_line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            _tell("\nCtrl-D or /quit ends")
            continue
        if is_command:
            if text.split()[0] == "/quit":
                return
            _tell(run_command(conversation, text))
        elif text.strip():
            _print_answer(conversation, text)


def read_message(read_line: Callable[[str], str]) -> tuple[str, bool]:
    """The next message, of one line or several, and whether it is a command.

    read_line: returns one line without its end, or raises EOFError; given a prompt.
    Raises EOFError where no message begins.
    """
    line = read_line("> ")
    if line.startswith("/"):
        return line, True
    lines = []
    # Where the input ends inside a message, the message ends too.
    with contextlib.suppress(EOFError):
        if line.startswith(_BLOCK):
            line = line.removeprefix(_BLOCK)
            while not line.rstrip().endswith(_BLOCK):
                lines.append(line)
                line = ""
                line = read_line("… ")
            line = line.rstrip().removesuffix(_BLOCK)
        else:
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = ""
                line = read_line("… ")
    return "\n".join([*lines, line]).strip("\n"), False


def run_command(conversation: Conversation, line: str) -> str:
    """Carries out a command other than /quit. Returns what to tell the user."""
    command, _, argument = line.partition(" ")
    if command == "/help":
        return HELP
    if command == "/reset":
        conversation.turns.clear()
        return "the conversation is forgotten"
    if command == "/system":
        conversation.system = argument.strip() or None
        return "the system text is set" if conversation.system else "there is no system text now"
    return f'unknown command {printable(command)}; /help lists them, """ begins a text that starts with /'


def _print_answer(conversation: Conversation, text: str) -> None:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        note = conversation.answer(text, write)
    except Gemma4Error as error:
        _tell(printable(f"error [{error.code}]: {error}"))
        return
    write("\n")
    if note is not None:
        _tell(f"[{note}]")


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
