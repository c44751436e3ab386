"""Chat templates that do as those of well-known models do, for the tokenizer of `llama`."""

from __future__ import annotations

THINKING = """\
{%- set ns = namespace(asked=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = messages.index(m) %}{% endfor %}
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- set content = m.content or '' %}
{%- if m.role == 'assistant' %}
{%- set thoughts = m.reasoning_content or '' %}
{%- if not thoughts and '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}<|im_start|>assistant
{% if loop.index0 > ns.asked and (loop.last or thoughts) %}<think>
{{ thoughts }}
</think>

{% endif %}{{ content }}
{%- for call in m.tool_calls or [] %}{% set call = call.function or call %}
<tool_call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>{{ content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""As Qwen3's: thoughts of answers before the last question are left out, and no thoughts are shown in the last answer alone."""

CALLS = THINKING.replace("(loop.last or thoughts)", "thoughts")
"""The same where there are no thoughts; calls may be several."""

ONE_CALL = """\
{{ bos_token }}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.first %}{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
"""As Llama 3.1's: one call, and no text beside it."""

LAST_QUESTION = """\
{%- if messages[0].role == 'system' %}{% set system, talk = messages[0].content, messages[1:] %}
{%- else %}{% set system, talk = '', messages %}{% endif %}{{ bos_token }}
{%- for m in talk %}
{%- if m.role == 'user' %}[INST] {% if system and loop.index0 >= talk | length - 2 %}{{ system }}

{% endif %}{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
"""As Mistral's: the system prompt is part of the last question. Tools are not known."""
