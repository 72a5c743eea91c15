"""Chats as tokens, each with the role of the turn that it belongs to.

A chat template is a program: what it writes around messages follows from the messages. Whose turn a token belongs to is
found without reading that program:

1. The chat is written twice: as it is, and with a mark in the place of each message's content.
2. What stands between the marks is markup. Markup and contents, put together, must be the chat as it is (a template may
   strip whitespace off contents); then it is known where each content stands. If they are not, because the template
   changes contents in another way, roles can't be told and the chat is refused.
3. A turn is the content and the special token right behind it, such as an end of turn, with whitespace between them.
   All other markup belongs to nobody.
4. A token belongs to the turn that it has a character of.

`apply_chat_template(return_assistant_tokens_mask=True)` of transformers, which wants templates that are marked for it,
says the same of the assistant's turns (tested).
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from activations.source import ROLES, ChatTokens, Message
from scope.errors import InvalidInputError

__all__ = ["encode_chats", "own_template"]

ALWAYS = datetime(2000, 1, 1)
"""The date for templates that write today's (Llama 3.2's do): a capture that is resumed tomorrow must read the same."""
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
MARK = "\ue000{}\ue001"
MARKED = re.compile("\ue000(\\d+)\ue001")


class _Turn(NamedTuple):
    start: int
    stop: int
    role: int


def own_template(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer; of several the default one."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def encode_chats(
    tokenizer: Any, special_ids: frozenset[int], chats: Sequence[Sequence[Message]], template: str, answer: bool = False
) -> list[ChatTokens]:
    """Token ids and roles of chats; see `activations.source.HookedModel.encode_chats`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        special_ids: ids of its special tokens.
        chats: the messages of each.
        template: a Jinja template.
        answer: add the markup that the assistant's next turn begins with.
    """
    template = TODAY.sub(lambda call: repr(ALWAYS.strftime(call[2])), template)
    specials = sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids)), key=len, reverse=True)
    written = [_write(tokenizer, chat, template, specials, answer) for chat in chats]
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in written], add_special_tokens=False)
    encoded = []
    for encoding, (_, turns) in zip(encodings, written, strict=True):
        tokens = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        roles = np.zeros(len(tokens), np.uint8)
        for turn in turns:
            roles[(offsets[:, 1] > turn.start) & (offsets[:, 0] < turn.stop)] = turn.role
        n_bos = int(len(tokens) > 0 and tokens[0] == tokenizer.bos_token_id)  # every window begins with one anyway
        encoded.append(ChatTokens(tokens[n_bos:], roles[n_bos:]))
    return encoded


def _write(
    tokenizer: Any, chat: Sequence[Message], template: str, specials: Sequence[str], answer: bool
) -> tuple[str, list[_Turn]]:
    """Steps 1 to 3."""
    text = _rendered(tokenizer, chat, template, answer)
    marked = [
        message._replace(content=MARK.format(number)) if message.content.strip() else message
        for number, message in enumerate(chat)
    ]
    pieces = MARKED.split(_rendered(tokenizer, marked, template, answer))
    markup, numbers = pieces[::2], list(map(int, pieces[1::2]))
    expected = [number for number, message in enumerate(chat) if message.content.strip()]
    turns = _turns(text, markup, [chat[number] for number in numbers]) if numbers == expected else None
    if turns is None:
        raise InvalidInputError(
            f"The chat template changes what messages say, so that it cannot be told whose turn a token belongs to: in "
            f"the chat that begins with {chat[0].content[:60]!r}. Give another with --chat-template."
        )
    return text, [turn._replace(stop=_closed(text, turn.stop, specials)) for turn in turns]


def _turns(text: str, markup: Sequence[str], messages: Sequence[Message]) -> list[_Turn] | None:
    """Where each message's content stands, if the text is made of this markup and these contents."""
    if not text.startswith(markup[0]):
        return None
    place = len(markup[0])
    turns = []
    for message, following in zip(messages, markup[1:], strict=True):
        said = message.content
        for content in (said, said.strip(), said.rstrip(), said.lstrip()):
            if text.startswith(content + following, place):
                break
        else:
            return None
        role = message.role if message.role in ROLES else "other"
        turns.append(_Turn(place, place + len(content), ROLES.index(role)))
        place += len(content) + len(following)
    return turns if place == len(text) else None


def _closed(text: str, stop: int, specials: Sequence[str]) -> int:
    """The end of a turn whose content ends at `stop`."""
    behind = stop + len(text[stop:]) - len(text[stop:].lstrip())
    for special in specials:
        if text.startswith(special, behind):
            return behind + len(special)
    return stop


def _rendered(tokenizer: Any, chat: Sequence[Message], template: str, answer: bool) -> str:
    from jinja2 import TemplateError

    messages = [message._asdict() for message in chat]
    try:
        written = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answer
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InvalidInputError(
            f"The chat template fails on the chat that begins with {chat[0].content[:60]!r}: {error}"
        ) from error
    return str(written)
