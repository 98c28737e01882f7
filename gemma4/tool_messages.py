"""Conversations with tool calls, as chat templates of different ages take them.

Callers write OpenAI's form: an assistant message with `tool_calls`, whose arguments may be a JSON text, then a message
of role "tool" for each call. Early Gemma 4 templates take the answers as `tool_responses` of the assistant message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def with_argument_objects(messages: Sequence[Message]) -> list[Message]:
    """The messages with every tool call's arguments as an object where they are the JSON text of one."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), Sequence)
        else message
        for message in messages
    ]


def with_tool_responses(messages: Sequence[Message]) -> list[Message]:
    """The messages with those of role "tool" folded into the assistant message before them, as `tool_responses`.

    What a tool answered is taken as an object where it is the JSON text of one.
    """
    folded: list[Message] = []
    for message in messages:
        caller = folded[-1] if folded else {}
        if message.get("role") != "tool" or not caller.get("tool_calls"):
            folded.append(message)
            continue
        names = {call["id"]: call["function"]["name"] for call in caller["tool_calls"] if "id" in call}
        name = names.get(message.get("tool_call_id"), message.get("name", "unknown"))
        answer = {"name": name, "response": _object_or_text(message.get("content"))}
        folded[-1] = {**caller, "tool_responses": [*caller.get("tool_responses", ()), answer]}
    return folded


def _with_object(call: Any) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = call["function"]
    return {**call, "function": {**function, "arguments": _object_or_text(function.get("arguments", {}))}}


def _object_or_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value
