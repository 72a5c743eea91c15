"""Conversations of the prompt page: what an address says of one, what the model is given, and what its tokens are.

An address holds the turns as JSON: `[[role, content], …]`, or, where there are calls or tools, an object with
`messages` and `tools` in one of the shapes that `activations.chats` reads. They are written by the template that the
dashboard was given, else by that of the index's own chats, else by the tokenizer's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from activations.chats import Chat

__all__ = ["Prepared", "Said", "chat_of", "form_turns", "prepare", "turns_of", "words_of"]

CHAT_ROLES = ("user", "assistant", "system", "tool")
"""What the form offers."""
WORDS = {"text": "", "reasoning": "reasoning", "tool_call": "call", "tool_response": "", "markup": "markup"}


class Said(NamedTuple):
    """What a token of a chat is."""

    role: str
    """One of `activations.chats.ROLES`."""
    kind: str
    """One of `activations.chats.CONTENT_KINDS`."""
    message: int
    """Number of the message, -1 for none."""


class Prepared(NamedTuple):
    """A prompt as the model is given it."""

    prompt: Any
    """A text, or token ids."""
    n_tokens: int
    said: tuple[Said, ...]
    """Of a chat, token by token."""


def form_turns(text: str) -> tuple[list[list[str]], str]:
    """What the form shows of a chat: role, content, calls (JSON or "") and further fields (likewise) of each turn, and
    the tools as JSON. What cannot be read is left out."""
    try:
        messages, tools = _read(text)
    except ValueError:
        return [], ""
    turns = []
    for message in messages:
        role, content, calls = (message.get(name) for name in ("role", "content", "tool_calls"))
        others = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls") and isinstance(v, str)}
        said = content if isinstance(content, str) else "" if content is None else _json(content)
        turns.append([str(role), said, _json(calls) if calls else "", _json(others) if others else ""])
    return turns, _json(tools, indent=1) if tools else ""


def chat_of(text: str) -> "Chat":
    """The chat that an address holds; turns that say nothing are left out.

    Raises:
        InvalidInputError: it holds none.
    """
    from activations.chats import chat_from

    try:
        messages, tools = _read(text)
        kept = [one for one in messages if one.get("content") or one.get("tool_calls")]
        return chat_from({"messages": kept, "tools": tools})
    except ValueError as error:
        raise InvalidInputError(f"The chat cannot be read: {error}.") from error


def _read(text: str) -> tuple[list[dict[str, Any]], Any]:
    """The messages as mappings, and the tools, of a chat's JSON; raises ValueError."""
    value = json.loads(text)
    tools = value.get("tools") if isinstance(value, Mapping) else None
    messages = value.get("messages") if isinstance(value, Mapping) else value
    if not isinstance(messages, list):
        raise ValueError("expected a list of turns")
    return [_message(one) for one in messages], tools


def _message(value: Any) -> dict[str, Any]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return {"role": value[0], "content": value[1]}
    if isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"expected a role and what is said, got {str(value)[:80]}")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def prepare(model: Any, text: str, chat: bool, template: str | None = None) -> Prepared:
    """What the model is given.

    Args:
        model: whose tokenizer it is.
        text: a text, or a chat's JSON.
        chat: which of the two.
        template: what chats are written with; None for the tokenizer's own.

    Raises:
        InvalidInputError: it cannot be read, or there is no template.
    """
    if not chat:
        return Prepared(text, len(model.tokenize(text)), ())
    import torch

    from activations.chats import CONTENT_KINDS, ROLES

    wanted = chat_of(text)
    template = template or model.chat_template
    if template is None:
        raise InvalidInputError(
            f"The tokenizer of {model.name} has no chat template, so that nothing says how it would write turns (base "
            "models have none). Start the dashboard with --chat-template FILE, or switch to Text and type the prompt "
            "as the model should read it."
        )
    (found,) = model.encode_chats([wanted], template, answer=True)
    said = [
        Said(ROLES[role], CONTENT_KINDS[kind], int(message))
        for role, kind, message in zip(found.role, found.kind, found.message, strict=True)
    ]
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    ids = torch.from_numpy(np.concatenate([bos, found.token_id]).astype(np.int64))
    return Prepared(ids, len(ids), (*[Said("none", "markup", -1)] * len(bos), *said))


def words_of(said: Said) -> str:
    """What a token is, in words."""
    if said.role == "none":
        return "definition of a tool" if said.kind == "tool_definition" else "markup"
    more = WORDS.get(said.kind, "")
    return f"{said.role} · {more}" if more else said.role


def turns_of(said: Sequence[Said]) -> dict[int, str]:
    """Where each turn, and each part of one that is of another kind, begins, and what it is.

    Markup inside a turn goes with what follows it there, at its end with what is before it.
    """
    turns: dict[int, str] = {}
    now: tuple[int, str] | None = None
    for place, one in enumerate(said):
        if one.message < 0 and one.kind != "tool_definition":
            continue
        kind = one.kind
        if kind == "markup":
            rest = (other.kind for other in said[place:] if other.message == one.message and other.kind != "markup")
            kind = next(rest, now[1] if now and now[0] == one.message else "text")
        if (one.message, kind) != now:
            turns[place] = words_of(one._replace(kind=kind))
        now = (one.message, kind)
    return turns
