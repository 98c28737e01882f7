from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4.quant.errors import MalformedError
from gemma4.response import Event, Reasoning, Response, ResponseParser, Text, ToolCall, parse_response, parse_tool_call

ANSWER = (
    "<|channel>thought\nThe user wants <b>weather</b>.<channel|>Let me look."
    '<|tool_call>call:weather{city:<|"|>Zürich, {CH}<|"|>,days:3,exact:true,at:null}<tool_call|>'
    "<|tool_call>call:now{}<tool_call|><|tool_response>"
)
PARSED = Response(
    "The user wants <b>weather</b>.",
    "Let me look.",
    [ToolCall("weather", {"city": "Zürich, {CH}", "days": 3, "exact": True, "at": None}), ToolCall("now", {})],
)


def in_pieces(text: str, borders: list[int]) -> list[Event]:
    parser = ResponseParser()
    cuts = [0, *sorted(borders), len(text)]
    events = [e for a, b in pairwise(cuts) for e in parser.push(text[a:b])]
    return [*events, *parser.finish()]


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one kind as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            out[-1] = Reasoning(last.text + event.text)
        else:
            out.append(event)
    return out


def test_whole_answer() -> None:
    assert parse_response(ANSWER) == PARSED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", Response("", "plain")),
        ("<|turn>model\nhi<turn|>", Response("", "hi")),
        ("<|channel>thought\n<channel|>hi", Response("", "hi")),
        ("<|channel>final answer", Response("", "final answer")),  # a stray mark is dropped
        ("<|channel>thought\nnever ends", Response("never ends")),
        ("a < b and <| c", Response("", "a < b and <| c")),
        ("", Response()),
    ],
)
def test_forms(text: str, expected: Response) -> None:
    assert parse_response(text) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(ANSWER)), max_size=12))
def test_borders_of_pieces_do_not_matter(borders: list[int]) -> None:
    assert joined(in_pieces(ANSWER, borders)) == joined(in_pieces(ANSWER, []))


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = ResponseParser()
    assert list(parser.push("Hello <|tool")) == [Text("Hello ")]
    assert list(parser.push("box")) == [Text("<|toolbox")]


def encode(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{encode(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(encode, value)) + "]"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else repr(value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda s: '<|"|>' not in s and "<tool_call|>" not in s and not s.endswith("<"))
)
keys = st.text("abcXYZ_09-", min_size=1, max_size=6)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_values_round_trip(arguments: dict[str, Any]) -> None:
    assert parse_tool_call(f"call:f{encode(arguments)}") == ToolCall("f", arguments)


@pytest.mark.parametrize(
    "call",
    [
        "",
        "call:",
        "call:{}",
        "call:f",
        "call:f{",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:1",
        "call:f{a:1 b:2}",
        "call:f{a:nope}",
        'call:f{a:<|"|>x}',
        "call:f{a:[1,}",
        "call:f{} more",
        "f{}",
        "call:f{a:" + "[" * 100 + "]" * 100 + "}",
    ],
)
def test_broken_calls(call: str) -> None:
    with pytest.raises(MalformedError, match="tool call"):
        parse_tool_call(call)


def test_call_that_never_ends() -> None:
    parser = ResponseParser()
    assert list(parser.push("<|tool_call>call:f{")) == []
    with pytest.raises(MalformedError, match="no end"):
        list(parser.finish())
