"""Chats: the messages of a conversation, the tools that it may call, and what its tokens are.

Files hold conversations in a few usual shapes, all of which become a `Chat`:

- messages `{"role": …, "content": …}`; the content is a text, or a list of parts `{"type": "text", "text": …}`, and,
  where media are read (`activations.media`), `{"type": "image", "path": …}` and `{"type": "audio", "path": …}`;
- calls, `"tool_calls": [{"function": {"name": …, "arguments": …}, "id": …}]`, with or without the `function` around
  name and arguments, the arguments an object or its JSON; or one call as `"function_call"`;
- answers of tools, `{"role": "tool", "content": …}`, the content a text or any JSON;
- messages `{"from": "human", "value": …}`, with "human", "gpt" and "observation" for user, assistant and tool;
- reasoning in a field of its own, `"reasoning_content"`; the template gets further text fields, such as `name`, too;
- tools beside the messages, `"tools": [{"type": "function", "function": {"name": …, "parameters": …}}]`, or as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from activations.media import medium_from

__all__ = [
    "CHAT_COLUMNS",
    "CONTENT_KINDS",
    "REASONING",
    "ROLES",
    "Chat",
    "ChatTokens",
    "Message",
    "Part",
    "chat_from",
    "cleaned",
    "message_from",
    "role_code",
    "tools_from",
    "without_nulls",
]

ROLES = ("none", "system", "developer", "user", "assistant", "tool", "other")
"""Whose turn a token of a chat belongs to, by its code in the `role` column (uint8)."""
CONTENT_KINDS = ("markup", "text", "reasoning", "tool_call", "tool_response", "tool_definition")
"""What a token of a chat is, by its code in the `kind` column (uint8): what the chat template writes of its own, what a
message says, thinks, calls or answers for a tool, or what describes a tool that may be called."""
CHAT_COLUMNS = {"role": "uint8", "kind": "uint8", "message": "int32"}
"""The columns that chats have besides. `message` counts from the chat's first, -1 for tokens of none."""
ALIASES = {"model": "assistant", "function": "tool", "ipython": "tool"}
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Names of roles where messages are written `{"from": …, "value": …}`."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields in which a message's reasoning stands, apart from what it says."""
NOTHING: Mapping[str, str] = MappingProxyType({})


class Part(NamedTuple):
    """A part of a message's content."""

    kind: str
    """ "text", "image" or "audio"."""
    value: str
    """The text, or the medium's path."""

    @property
    def as_dict(self) -> dict[str, str]:
        """The part as chat templates take it."""
        return {"type": self.kind, "text" if self.kind == "text" else "path": self.value}


class Message(NamedTuple):
    """A turn of a chat."""

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`{"type": "function", "function": {"name": …, "arguments": {…}}}` each, with its `id` where it has one."""
    extra: Mapping[str, str] = NOTHING
    """Further fields that the template may read, such as `name`, `tool_call_id` and `reasoning_content`."""
    parts: tuple[Part, ...] = ()
    """What it says and shows, one after the other, where it has media; `content` is then the texts among them."""

    @property
    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        calls = {"tool_calls": [dict(call) for call in self.tool_calls]} if self.tool_calls else {}
        content = [part.as_dict for part in self.parts] or self.content
        return {"role": self.role, "content": content, **self.extra, **calls}

    @property
    def text(self) -> str:
        """All that it says, calls included."""
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in self.tool_calls]
        thought = [self.extra[name] for name in REASONING if name in self.extra]
        return "\n".join(part for part in (*thought, self.content, *calls) if part)


class Chat(NamedTuple):
    """A conversation."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """What may be called: JSON schemas of functions, as `apply_chat_template(tools=…)` takes them."""


class ChatTokens(NamedTuple):
    """A chat as a model reads it, `(n,)` each."""

    token_id: np.ndarray
    """int32."""
    role: np.ndarray
    """uint8: codes as in `ROLES`."""
    kind: np.ndarray
    """uint8: codes as in `CONTENT_KINDS`."""
    message: np.ndarray
    """int32: number of the message, -1 for none."""


def role_code(role: str) -> int:
    """The code in `ROLES` of what a message calls its role; some templates' own names are known."""
    name = ALIASES.get(role, role)
    return ROLES.index(name if name in ROLES else "other")


def chat_from(value: Any, media: bool = False) -> Chat:
    """The chat that some JSON stands for: a list of messages, or an object with `messages` and perhaps `tools`.

    Args:
        value: the JSON.
        media: whether contents may hold images and sounds.

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(value, Mapping):
        return Chat(chat_from(value.get("messages"), media).messages, tools_from(value.get("tools")))
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of messages, got {str(value)[:80]}")
    return Chat(tuple(message_from(message, media) for message in value))


def message_from(value: Any, media: bool = False) -> Message:
    """The message that a mapping stands for, in one of the shapes above; `media` as for `chat_from`.

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(value, Mapping) and {"from", "value"} <= set(value):
        speaker = str(value["from"])
        value = {"role": SPEAKERS.get(speaker, speaker), "content": value["value"]}
    if not isinstance(value, Mapping) or "role" not in value:
        raise ValueError(f"expected messages with role and content, got {str(value)[:80]}")
    calls = tuple(map(_call, _calls_of(value)))
    extra = {
        cleaned(str(name)): cleaned(own)
        for name, own in value.items()
        if isinstance(own, str) and own and name not in ("role", "content", "tool_calls", "function_call")
    }
    content = value.get("content")
    if content is None and (calls or any(name in extra for name in REASONING)):
        content = ""
    elif "content" not in value:
        raise ValueError(f"expected messages with role and content, got {str(value)[:80]}")
    parts = _parts(content) if media else ()
    if parts:
        content = "\n".join(part.value for part in parts if part.kind == "text")
    role, content = value["role"], _content(content, answers=value["role"] in ("tool", "function", "ipython"))
    if not isinstance(role, str) or content is None:
        raise ValueError(f"expected a message whose role and content are text, got {str(value)[:80]}")
    return Message(cleaned(role), cleaned(content), calls, extra or NOTHING, parts)


def tools_from(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools that a list of JSON schemas, or its JSON, stands for; none for None or "".

    Raises:
        ValueError: it is no list of objects.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"the tools are no JSON: {error}") from error
    tools = () if value is None else value
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"expected tools as a list of JSON schemas, got {str(value)[:80]}")
    return tuple(cleaned(dict(tool)) for tool in tools)


def cleaned(value: Any) -> Any:
    """A text, or the texts in a JSON value, with lone surrogates as U+FFFD: JSON can hold them, UTF-8 can't."""
    if isinstance(value, Mapping):
        return {cleaned(str(name)): cleaned(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(one) for one in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def without_nulls(value: Any) -> Any:
    """A value without the fields that are None: parquet gives every struct of a column all of their fields."""
    if isinstance(value, Mapping):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _parts(content: Any) -> tuple[Part, ...]:
    """The parts of a content, if there are media among them; raises ValueError."""
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        return ()
    if all(isinstance(part.get("text"), str) for part in content):
        return ()
    parts = []
    for part in content:
        if isinstance(part.get("text"), str):
            parts.append(Part("text", cleaned(part["text"])))
        else:
            medium = medium_from(part, Path())
            parts.append(Part(medium.kind, medium.name))
    return tuple(parts)


def _content(content: Any, answers: bool) -> str | None:
    """What a message says; None where that is no text."""
    if isinstance(content, Sequence) and not isinstance(content, str):  # a list of parts, as multimodal models take
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    if answers and isinstance(content, Mapping | list | int | float):
        return json.dumps(content, ensure_ascii=False)
    return content if isinstance(content, str) else None


def _calls_of(value: Mapping[str, Any]) -> Sequence[Any]:
    calls = value.get("tool_calls")
    if calls is None:
        calls = [value["function_call"]] if value.get("function_call") else []
    if not isinstance(calls, list | tuple):
        raise ValueError(f"expected tool_calls as a list, got {str(calls)[:80]}")
    return calls


def _call(value: Any) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(f"expected a tool call with a function's name, got {str(value)[:80]}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValueError(f"the arguments of the call of {name} are no JSON: {error}") from error
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"expected the arguments of the call of {name} as an object, got {str(arguments)[:80]}")
    id = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    called = {"name": name, "arguments": arguments or {}}
    call: dict[str, Any] = cleaned({"type": "function", "function": called, **id})
    return call
