"""Chat templates of the shapes that are about, written for the tests, and conversations with tools."""

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from activations.chats import Chat, chat_from

TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}"
    "{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ ns.system }}{% set ns.system = '' %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FOLDED = "{% set ns = namespace(system='') %}" + TURNS
"""Users and the model alone, the system's words in the first user's turn, as Gemma 3's."""

BLOCKS = (
    "{% set ns = namespace(first=true) %}{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}# Tools\nEach call is an object in tags, such as <tool_call>\n"
    '{"name": <name>, "arguments": <object>}\n</tool_call>\n<tools>{% for tool in tools %}'
    "{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n' }}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content }}<|im_end|>\n{% endif %}{% for m in messages %}{% set said = m.content %}"
    "{% set thought = '' %}{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if m.reasoning_content %}{% set thought = m.reasoning_content %}{% endif %}"
    "{% if m.role == 'user' %}<|im_start|>user\n{{ said }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{% if thought and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{% if said or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\\n' }}{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\\n' }}"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "<|im_end|>\n{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Calls and answers in tags, definitions in the system's turn, thoughts cut out of contents, as Qwen3's."""

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|im_sep|>\n\n"
    "{% if m.role == 'user' and tools and not ns.told %}{% set ns.told = true %}Answer with a call of the form "
    '{"name": function, "parameters": values of its arguments}.\n\n{% for tool in tools %}{{ tool | tojson(indent=2) }}'
    "\n\n{% endfor %}{% endif %}{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>\n\n{% endif %}"
)
HEADED = "{% set ns = namespace(told=false) %}" + HEADERS
"""One call a turn as bare JSON, answers as JSON, definitions before the first question, as Llama 3.1's."""

LISTED = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}{{ m.content }}"
    "[TOOL_CALLS][{% for call in m.tool_calls %}{{ call.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]"
    "{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Calls in a list, as Mistral's."""

PYTHONIC = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call.function.name }}({% for name, value in call.function.arguments.items() %}{{ name }}={{ value | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %})]{% endfor %}<|im_end|>\n{% endfor %}"
)
"""Calls as a line of Python, as Llama 4's."""

TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}{{ '\\n' }}"
    "<tool_call>\n<function={{ call.function.name }}>\n{% for name, value in call.function.arguments.items() %}"
    "<parameter={{ name }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
"""Calls as tags, as Qwen3-Coder's."""

TEMPLATES = {
    "folded": FOLDED,
    "blocks": BLOCKS,
    "headed": HEADED,
    "listed": LISTED,
    "pythonic": PYTHONIC,
    "tagged": TAGGED,
}
WITH_TOOLS = ("blocks", "headed", "listed", "pythonic", "tagged")

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Says how the weather is, as {"sky": "clear"}.',
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "A town"}}},
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {}},
}
TOOLS = (WEATHER, CLOCK)


def called(name: str, **arguments: Any) -> dict[str, Any]:
    """A call, as a message holds it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def weather_chat() -> Chat:
    """A question, a call, its answer, and what is made of it."""
    return chat_from(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": 'How is the weather in "Old Town" {today}?'},
                {"role": "assistant", "content": "", "tool_calls": [called("get_weather", place='"Old Town"', days=1)]},
                {"role": "tool", "content": '{"sky": "grey", "wind": 3}'},
                {"role": "assistant", "content": " It is grey.\n"},
            ],
            "tools": list(TOOLS),
        }
    )


@functools.cache
def character_tokenizer() -> Any:
    """A tokenizer in which every character is a token, and some markup."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = [*map(chr, range(32, 127)), *"\n\té日"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )


def write_chats(path: Path, chats: list[Chat]) -> Path:
    """A file of chats with their tools."""
    rows = [
        {"messages": [message.as_dict for message in chat.messages], "tools": list(chat.tools), "title": f"chat {n}"}
        for n, chat in enumerate(chats)
    ]
    if path.suffix == ".parquet":
        for row in rows:
            row["tools"] = json.dumps(row["tools"])  # as many data sets have them
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
