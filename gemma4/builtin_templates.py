"""Chat templates of our own: for files without one, and in place of an early one that knows no tool messages.

Written from the published prompt formats of the two families; text only. Gemma 4's, as it stands today:

    <bos><|turn>system\\n<|think|>\\nSYSTEM<|tool>declaration:NAME{…}<tool|><turn|>\\n
    <|turn>user\\nTEXT<turn|>\\n
    <|turn>model\\n<|tool_call>call:NAME{…}<tool_call|><|tool_response>response:NAME{…}<tool_response|>TEXT<turn|>\\n

A tool's answer, and what the model says after it, belong to the turn of the call. What the model thought is left out,
but for what it thought before calls since the last user turn. Without thinking, an answer begins with an empty thought.
"""

from __future__ import annotations

GEMMA4 = """\
{%- macro quoted(text) -%}{{- '<|"|>' + text + '<|"|>' -}}{%- endmacro -%}
{%- macro value(item) -%}
    {%- if item is none -%}{{- 'null' -}}
    {%- elif item is boolean -%}{{- 'true' if item else 'false' -}}
    {%- elif item is string -%}{{- quoted(item) -}}
    {%- elif item is mapping -%}{{- '{' + pairs(item) + '}' -}}
    {%- elif item is iterable -%}
        {{- '[' -}}
        {%- for entry in item -%}{{- value(entry) + ('' if loop.last else ',') -}}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}{{- item -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro pairs(items) -%}
    {%- for key, item in items | dictsort -%}{{- key + ':' + value(item) + ('' if loop.last else ',') -}}{%- endfor -%}
{%- endmacro -%}
{%- macro schema(field) -%}
    {%- set out = namespace(parts=[]) -%}
    {%- if field['description'] -%}
        {%- set out.parts = out.parts + ['description:' + quoted(field['description'])] -%}
    {%- endif -%}
    {%- if field['enum'] -%}{%- set out.parts = out.parts + ['enum:' + value(field['enum'])] -%}{%- endif -%}
    {%- if field['items'] is mapping and field['items'] -%}
        {%- set out.parts = out.parts + ['items:{' + schema(field['items']) + '}'] -%}
    {%- endif -%}
    {%- if field['nullable'] -%}{%- set out.parts = out.parts + ['nullable:true'] -%}{%- endif -%}
    {%- if field['properties'] is mapping and field['properties'] -%}
        {%- set inner = namespace(parts=[]) -%}
        {%- for name, property in field['properties'] | dictsort -%}
            {%- set inner.parts = inner.parts + [name + ':{' + schema(property) + '}'] -%}
        {%- endfor -%}
        {%- set out.parts = out.parts + ['properties:{' + inner.parts | join(',') + '}'] -%}
    {%- endif -%}
    {%- if field['required'] -%}
        {%- set out.parts = out.parts + ['required:' + value(field['required'])] -%}
    {%- endif -%}
    {%- if field['type'] is string -%}
        {%- set out.parts = out.parts + ['type:' + quoted(field['type'] | upper)] -%}
    {%- elif field['type'] -%}
        {%- set out.parts = out.parts + ['type:' + value(field['type'] | map('upper') | list)] -%}
    {%- endif -%}
    {{- out.parts | join(',') -}}
{%- endmacro -%}
{%- macro declaration(function) -%}
    {%- set out = namespace(parts=['description:' + quoted(function['description'] or '')]) -%}
    {%- for part in ['parameters', 'response'] if function[part] -%}
        {%- set out.parts = out.parts + [part + ':{' + schema(function[part]) + '}'] -%}
    {%- endfor -%}
    {{- '<|tool>declaration:' + function['name'] + '{' + out.parts | join(',') + '}<tool|>' -}}
{%- endmacro -%}
{%- macro response(name, body) -%}
    {{- '<|tool_response>response:' + (name or 'unknown') + '{' -}}
    {{- (pairs(body) if body is mapping else 'value:' + value(body)) + '}<tool_response|>' -}}
{%- endmacro -%}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part['type'] != 'text' -%}
                {{- raise_exception('found content of type ' + part['type'] + ', expected text only') -}}
            {%- endif -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro without_thoughts(content) -%}
    {%- for part in content.split('<channel|>') -%}{{- part.split('<|channel>') | first -}}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- if has_system or enable_thinking or tools -%}
    {{- '<|turn>system\\n' + ('<|think|>\\n' if enable_thinking else '') -}}
    {%- if has_system -%}{{- text(messages[0]['content']) -}}{%- endif -%}
    {%- for tool in tools or [] -%}{{- declaration(tool['function'] or tool) -}}{%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- set state = namespace(last_user=-1, is_open=false) -%}
{%- for message in turns if message['role'] == 'user' -%}
    {%- set state.last_user = state.last_user + 1 -%}
{%- endfor -%}
{%- set users = namespace(seen=-1) -%}
{%- for message in turns -%}
    {%- if message['role'] == 'tool' -%}
        {%- if not state.is_open -%}
            {{- raise_exception('found a tool message without a call before it') -}}
        {%- endif -%}
    {%- elif message['role'] not in ['assistant', 'model'] -%}
        {%- set users.seen = users.seen + (1 if message['role'] == 'user' else 0) -%}
        {{- ('<turn|>\\n' if state.is_open else '') + '<|turn>' + message['role'] + '\\n' -}}
        {{- text(message['content']) + '<turn|>\\n' -}}
        {%- set state.is_open = false -%}
    {%- else -%}
        {%- set calls, out = message['tool_calls'] or [], namespace(responses='', name='') -%}
        {%- set thought = message['reasoning'] or message['reasoning_content'] -%}
        {{- '' if state.is_open else '<|turn>model\\n' -}}
        {%- if thought and calls and users.seen == state.last_user -%}
            {{- '<|channel>thought\\n' + thought + '\\n<channel|>' -}}
        {%- endif -%}
        {%- for call in calls -%}
            {%- set arguments = call['function']['arguments'] or {} -%}
            {{- '<|tool_call>call:' + call['function']['name'] + '{' -}}
            {{- (arguments if arguments is string else pairs(arguments)) + '}<tool_call|>' -}}
        {%- endfor -%}
        {%- for answer in message['tool_responses'] or [] -%}
            {%- set out.responses = out.responses + response(answer['name'], answer['response']) -%}
        {%- endfor -%}
        {%- for follow in turns[loop.index:] -%}
            {%- if follow['role'] != 'tool' -%}{%- break -%}{%- endif -%}
            {%- set out.name = follow['name'] -%}
            {%- for call in calls if call['id'] and call['id'] == follow['tool_call_id'] -%}
                {%- set out.name = call['function']['name'] -%}
            {%- endfor -%}
            {%- set body = follow['content'] if follow['content'] is mapping else text(follow['content']) -%}
            {%- set out.responses = out.responses + response(out.name, body) -%}
        {%- endfor -%}
        {%- set said = without_thoughts(text(message['content'])) | trim -%}
        {{- out.responses + said -}}
        {%- set is_waiting = calls and not out.responses -%}
        {%- set state.is_open = is_waiting or (out.responses and not said) -%}
        {{- '<|tool_response>' if is_waiting else '' if state.is_open else '<turn|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not state.is_open -%}
    {{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') -}}
{%- endif -%}
"""

GEMMA3 = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{- raise_exception('Gemma 3 has no format for tools') -}}{%- endif -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if loop.first and has_system -%}{{- text(messages[0]['content']) + '\\n\\n' -}}{%- endif -%}
    {{- text(message['content']) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
