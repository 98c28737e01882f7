"""What a Gemma 4 model wrote, taken apart: reasoning, text and tool calls, whole or while it streams.

    <|channel>thought\\n REASONING <channel|> TEXT <|tool_call>call:NAME{key:VALUE,…}<tool_call|> <turn|>

A value is <|"|>text<|"|>, a number, true, false, null, [VALUE,…] or {key:VALUE,…} with bare keys. The format is that of
the chat template Google publishes with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from gemma4.quant.errors import MalformedError

_CHANNEL, _CHANNEL_END = "<|channel>", "<channel|>"
_CALL, _CALL_END = "<|tool_call>", "<tool_call|>"
_QUOTE = '<|"|>'
_THOUGHT: Final = "thought"
# Marks that end or open a turn carry no text of their own.
_IGNORED: Final = ("<|turn>model\n", "<turn|>", "<|tool_response>", _CHANNEL_END)
_MARKS: Final = (_CHANNEL, _CALL, *_IGNORED)
_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS: Final = {"true": True, "false": False, "null": None}
_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the model asks for, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thought channel."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


Event = ToolCall | Reasoning | Text


@dataclass(slots=True)
class Response:
    """A whole answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def parse_response(text: str) -> Response:
    """Takes a whole answer apart. Raises MalformedError for a tool call that cannot be read."""
    parser = ResponseParser()
    response = Response()
    for event in [*parser.push(text), *parser.finish()]:
        if isinstance(event, ToolCall):
            response.tool_calls.append(event)
        elif isinstance(event, Reasoning):
            response.reasoning += event.text
        else:
            response.content += event.text
    response.reasoning, response.content = response.reasoning.strip(), response.content.strip()
    return response


class ResponseParser:
    """Takes an answer apart as it arrives: `push` every piece, then `finish`."""

    def __init__(self) -> None:
        self._held = ""
        self._is_thinking = False

    def push(self, piece: str) -> Iterator[Event]:
        """Yields what is certain with this piece. Raises MalformedError for a tool call that cannot be read."""
        self._held += piece
        yield from self._events(is_last=False)

    def finish(self) -> Iterator[Event]:
        """Yields what was held back. Raises MalformedError for a tool call that never ended."""
        yield from self._events(is_last=True)

    def _events(self, *, is_last: bool) -> Iterator[Event]:
        while self._held:
            mark, at = _first_mark(self._held, (_CHANNEL_END,) if self._is_thinking else _MARKS)
            if mark is None:
                certain = len(self._held) - (0 if is_last else _possible_mark(self._held))
                yield from self._text(certain)
                return
            yield from self._text(at)
            if mark == _CALL:
                end = self._held.find(_CALL_END)
                if end < 0 and not is_last:
                    return
                if end < 0:
                    raise MalformedError(f"found no end of the tool call {self._held!r}", field="response")
                yield parse_tool_call(self._held[len(_CALL) : end])
                self._held = self._held[end + len(_CALL_END) :]
            elif mark == _CHANNEL:
                rest = self._held[len(_CHANNEL) :]
                if len(rest) <= len(_THOUGHT) and not is_last:
                    return  # the channel's name may still be arriving
                self._is_thinking = rest.startswith(_THOUGHT)
                self._held = rest.removeprefix(_THOUGHT).removeprefix("\n") if self._is_thinking else rest
            else:
                self._is_thinking = False
                self._held = self._held[len(mark) :]

    def _text(self, length: int) -> Iterator[Event]:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            yield Reasoning(text) if self._is_thinking else Text(text)


def _first_mark(text: str, marks: tuple[str, ...]) -> tuple[str | None, int]:
    found = [(text.index(mark), mark) for mark in marks if mark in text]
    at, mark = min(found, default=(len(text), None))
    return mark, at


def _possible_mark(text: str) -> int:
    """Length of the longest end of `text` that a mark begins with."""
    longest = min(len(text), max(map(len, _MARKS)) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in _MARKS)), 0)


def parse_tool_call(text: str) -> ToolCall:
    """`call:NAME{key:VALUE,…}`. Raises MalformedError naming the position."""
    reader = _Reader(text)
    reader.expect("call:")
    name = reader.until("{").strip()
    if not name:
        reader.fail("a function name")
    arguments = reader.mapping(0)
    if text[reader.at :].strip():
        reader.fail("the end")
    return ToolCall(name, arguments)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, expected: str) -> NoReturn:
        found = self.text[self.at : self.at + 20]
        raise MalformedError(f"tool call: expected {expected}, found {found!r}", field="response", offset=self.at)

    def accept(self, word: str) -> bool:
        has = self.text.startswith(word, self.at)
        self.at += len(word) * has
        return has

    def expect(self, word: str) -> None:
        if not self.accept(word):
            self.fail(repr(word))

    def until(self, word: str) -> str:
        """The text before `word`, at which the reader then stands."""
        end = self.text.find(word, self.at)
        if end < 0:
            self.fail(repr(word))
        text, self.at = self.text[self.at : end], end
        return text

    def skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def mapping(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        self.expect("{")
        for _ in self.items("}"):
            key = self.quoted() if self.text.startswith(_QUOTE, self.at) else self.until(":").strip()
            self.skip_space()
            self.expect(":")
            result[key] = self.value(depth + 1)
        return result

    def items(self, end: str) -> Iterator[None]:
        """Once for each item between commas, up to and including `end`."""
        self.skip_space()
        if self.accept(end):
            return
        while True:
            self.skip_space()
            yield
            self.skip_space()
            if self.accept(end):
                return
            self.expect(",")

    def quoted(self) -> str:
        self.expect(_QUOTE)
        text = self.until(_QUOTE)
        self.expect(_QUOTE)
        return text

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self.fail(f"at most {_MAX_DEPTH} levels")
        self.skip_space()
        if self.text.startswith(_QUOTE, self.at):
            return self.quoted()
        if self.text.startswith("{", self.at):
            return self.mapping(depth)
        if self.accept("["):
            return [self.value(depth + 1) for _ in self.items("]")]
        for word, meaning in _WORDS.items():
            if self.accept(word):
                return meaning
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            self.fail("a value")
        self.at = number.end()
        return float(number[0]) if number[1] or number[2] else int(number[0])
