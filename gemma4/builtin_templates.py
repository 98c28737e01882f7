"""Turn formats for files without a chat template: text messages only, no tools.

Written from the published prompt formats of the two families.
"""

from __future__ import annotations

GEMMA4 = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{- raise_exception('the built-in chat template has no tools') -}}{%- endif -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- if has_system or enable_thinking -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {%- if has_system -%}{{- text(messages[0]['content']) -}}{%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message['role'] in ['assistant', 'model'] -%}
        {{- '<|turn>model\\n' + (text(message['content']).split('<channel|>') | last | trim) -}}
    {%- else -%}
        {{- '<|turn>' + message['role'] + '\\n' + text(message['content']) -}}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
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
{%- if tools -%}{{- raise_exception('the built-in chat template has no tools') -}}{%- endif -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if loop.first and has_system -%}{{- text(messages[0]['content']) + '\\n\\n' -}}{%- endif -%}
    {{- text(message['content']) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
