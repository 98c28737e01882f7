"""Conversations to prompts: the chat template of a GGUF file, rendered as text or as token ids.

    template = chat_template_from_metadata(file.metadata, tokenizer, file.path)
    ids = render_chat_ids(template, tokenizer, [{"role": "user", "content": "hi"}])

The template is untrusted code, so it runs in a process of its own (`template_worker.py`). The messages are untrusted
text, so `render_chat_ids` lets only the template write special tokens: "<|turn>" inside a message stays the seven
characters it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4 import builtin_templates
from gemma4.quant.errors import TemplateError
from gemma4.template_process import TemplateProcess
from gemma4.tokenizer import Tokenizer
from gemma4.tool_messages import with_argument_objects, with_tool_responses

if TYPE_CHECKING:
    from gemma4.quant.gguf_file import MetadataValue

TEMPLATE_KEY = "tokenizer.chat_template"
FROM_FILE, BUILTIN = "file", "builtin"

# A template may look for these in what the model said before, to drop its reasoning.
_REASONING_MARKS = ("<|channel>", "<channel|>")
_ASSISTANT_ROLES = ("assistant", "model")
# CJK extension B: no case, and printable, so that a template's repr() of a message leaves them as they are.
_MARKS = range(0x20000, 0x2A6E0)


def chat_template_from_metadata(
    metadata: Mapping[str, MetadataValue],
    tokenizer: Tokenizer,
    path: Path | None = None,
    choice: str | Path = FROM_FILE,
) -> ChatTemplate:
    """A chat template for the vocabulary of a file.

    choice: "file" for the file's own (`tokenizer.chat_template`), or ours where it has none; "builtin" for ours; or the
    path of a text file with one.
    Raises TemplateError if the text file cannot be read, or the vocabulary has no turn tokens Gemma models use and a
    template of ours is needed.
    """
    source = metadata.get(TEMPLATE_KEY, "") if choice == FROM_FILE else ""
    if choice not in (FROM_FILE, BUILTIN):
        source, path = _read_template(Path(choice)), Path(choice)
    if not isinstance(source, str):
        raise TemplateError(f"expected a string, found {type(source).__name__}", path=path, field=TEMPLATE_KEY)
    if not source and tokenizer.special_id("<|turn>") is not None:
        source = builtin_templates.GEMMA4
    elif not source and tokenizer.special_id("<start_of_turn>") is not None:
        source = builtin_templates.GEMMA3
    elif not source:
        raise TemplateError("the file has no chat template", path=path, field=TEMPLATE_KEY)
    bos_token, eos_token = tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id)
    return ChatTemplate(source, bos_token, eos_token, path=path)


def _read_template(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the template cannot be read: {error}", path=path) from error
    if not source.strip():
        raise TemplateError("the template is empty", path=path)
    return source


class ChatTemplate:
    """A Jinja chat template. Rendering gives the text that transformers' `apply_chat_template` gives."""

    def __init__(self, source: str, bos_token: str, eos_token: str, *, path: Path | None = None) -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.path = path
        # Early Gemma 4 templates: a tool's answers are a part of the message that called it.
        self.folds_tool_messages = "tool_responses" in source and "tool_call_id" not in source
        self._process = TemplateProcess()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        **extra: Any,
    ) -> str:
        """The prompt as text.

        messages: {"role": ..., "content": ...} and what else the template reads; JSON values throughout.
        tools: JSON schemas of functions. enable_thinking: None leaves it undefined, so the template decides.
        extra: further variables of the template.
        Raises TemplateError if the template does not compile, fails, refuses the messages, takes longer than
        3 seconds, or needs more than 192 MiB.
        """
        variables = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **({} if enable_thinking is None else {"enable_thinking": enable_thinking}),
            **extra,
        }
        try:
            return self._process.render(self.source, variables)
        except TemplateError as error:
            raise TemplateError(error.message, path=self.path, field=TEMPLATE_KEY) from error


def render_chat_ids(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    **extra: Any,
) -> list[int]:
    """The prompt as token ids, BOS exactly once. Arguments and errors are those of `ChatTemplate.render`.

    Messages are in OpenAI's form whatever the age of the template (`gemma4.tool_messages`).

    Special tokens come from the template only. Before rendering, a mark is put behind every character of the
    conversation that could start one, so nothing that holds conversation text spells a special token, not even pieces
    that the template joins; the marks are taken out of the text between special tokens before it is encoded. Prompts
    without such text get the ids of the whole rendering. One exception: in what the assistant said, reasoning
    channels stay as they are, because templates remove them there.
    """
    try:
        messages = with_argument_objects(messages)
        if template.folds_tool_messages:
            messages = with_tool_responses(messages)
        arguments = {"messages": messages, "tools": tools, **extra}
        mark = _unused_character(arguments, template.source)
        marked = _Guard(tokenizer, mark).marked(arguments)
    except RecursionError as error:
        raise TemplateError("the messages are nested too deeply", path=template.path, field=TEMPLATE_KEY) from error
    text = template.render(add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking, **marked)
    ids: list[int] = []
    for piece in tokenizer.split_special(text):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += tokenizer.encode_ordinary(piece.replace(mark, ""))
    return tokenizer.with_bos(ids)


class _Guard:
    """Puts `mark` behind every character that starts a special token's text."""

    def __init__(self, tokenizer: Tokenizer, mark: str) -> None:
        first = "|".join(map(re.escape, sorted(tokenizer.special_first_characters))) or r"(?!)"
        kept = "|".join(re.escape(text) for text in _REASONING_MARKS)
        self._replacement = rf"\g<0>{mark}"
        self._starts = re.compile(first)
        self._starts_but_reasoning = re.compile(rf"(?!{kept})(?:{first})")

    def marked(self, value: Any) -> Any:
        """`value` (JSON) with every string in it marked, keys included."""
        return self._walk(value, self._starts)

    def _walk(self, value: Any, starts: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return starts.sub(self._replacement, value)
        if isinstance(value, Mapping):
            by_assistant = value.get("role") in _ASSISTANT_ROLES
            return {
                self._walk(key, starts): self._walk(
                    item, self._starts_but_reasoning if by_assistant and key == "content" else starts
                )
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._walk(item, starts) for item in value]
        return value


def _unused_character(arguments: Mapping[str, Any], source: str) -> str:
    used = set(source).union(*_strings(arguments))
    for character in map(chr, _MARKS):
        if character not in used:
            return character
    raise TemplateError("the messages hold every character that could mark their text")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
