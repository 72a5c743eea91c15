"""Chats as tokens, each with whose turn it belongs to, which message, and what kind of content it is.

A chat template is a program: what it writes around messages follows from the messages. What a token is, is found
without reading that program, and without looking for what was said in what was written:

1. The template writes the chat, as `apply_chat_template` does, and writes it again with marks in the chat's words
   (`scope.models.chat_marks`). Marks travel with the words, whatever the template does around them, and it is checked
   that they changed nothing else; where they do in every way that is tried, the chat is refused.
2. *Kind*: between its marks stands what a message says, thinks, calls or answers for a tool, or the definition of a
   tool. Everything else is markup.
3. *Turn*: a message's words, all that is between them, pairs of tags right around its calls or its answer, and the
   special token that closes it, such as an end of turn (with whitespace before it; after a call also brackets and
   closing tags). The assistant's turn begins where the markup ends that the template writes to ask for an answer. All
   other markup, and definitions of tools, are of no turn.
4. A token belongs to what it has a character of; of two, to the later one.

The role is the message's own, also where the template writes it under another heading: Gemma 3's writes the system's
words in the user's turn. `apply_chat_template(return_assistant_tokens_mask=True)`, which wants templates that are
marked for it, says the same of the assistant's turns (tested).

What can't be told: words that a template cuts, counts or compares (the chat is refused); a thought that stands inside
a content, in tags of its own, is text like the rest; where a call is neither JSON, Python nor in tags, it is what its
own words reach from and to.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from activations.chats import CONTENT_KINDS, ROLES, Chat, ChatTokens, role_code
from scope.errors import InvalidInputError
from scope.models.chat_marks import Words, mark, wrapped

__all__ = ["WrittenChat", "chat_tokens", "encode_chats", "own_template", "write_chat", "written_prompt"]

ALWAYS = datetime(2000, 1, 1)
"""The date for templates that write today's (Llama 3.2's do): a capture that is resumed tomorrow must read the same."""
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
BLANK, BRACKETS = re.compile(r"\s*"), re.compile(r"[\s\])}]*")
CLOSING_TAG = re.compile(r"</[^<>\n]*>|\[/[^\[\]\n]*\]")
NO_PLACEHOLDERS: Mapping[str, str] = MappingProxyType({})
CALL, ANSWER = CONTENT_KINDS.index("tool_call"), CONTENT_KINDS.index("tool_response")


class Turn(NamedTuple):
    """What of the text belongs to a message."""

    start: int
    stop: int
    message: int


class WrittenChat(NamedTuple):
    """A chat as its template writes it."""

    text: str
    words: Sequence[Words]
    turns: Sequence[Turn]
    media: Sequence[tuple[int, int]] = ()
    """Where the placeholders of its media stand, in order."""


def own_template(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer; of several the default one."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def encode_chats(
    tokenizer: Any, special_ids: frozenset[int], chats: Sequence[Chat], template: str, answer: bool = False
) -> list[ChatTokens]:
    """Token ids of chats and what each is; see `activations.source.HookedModel.encode_chats`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        special_ids: ids of its special tokens.
        chats: the conversations.
        template: a Jinja template.
        answer: add the markup that the assistant's next turn begins with.

    Raises:
        InvalidInputError: the template fails, or what a token is can't be told.
    """
    written = [write_chat(tokenizer, special_ids, chat, template, answer) for chat in chats]
    encodings = tokenizer.backend_tokenizer.encode_batch([one.text for one in written], add_special_tokens=False)
    return [
        chat_tokens(tokenizer.bos_token_id, encoding, one, chat)
        for encoding, one, chat in zip(encodings, written, chats, strict=True)
    ]


def written_prompt(tokenizer: Any, messages: Sequence[Any], template: str) -> str:
    """What a template writes of messages and to ask for the assistant's next turn; the same text as in a capture.

    Raises:
        InvalidInputError: the template fails.
    """
    return _rendered(tokenizer, messages, (), _dated(template), True)


def _dated(template: str) -> str:
    return TODAY.sub(lambda call: repr(ALWAYS.strftime(call[2])), template)


def chat_tokens(bos: int | None, encoding: Any, written: WrittenChat, chat: Chat) -> ChatTokens:
    """Step 4, without the BOS that the template writes.

    Args:
        bos: id of the tokenizer's BOS.
        encoding: the tokenizer's encoding of the text, with offsets.
        written: the text, and what of it is what.
        chat: the conversation.
    """
    tokens = np.asarray(encoding.ids, np.int32)
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    role, kind = np.zeros(len(tokens), np.uint8), np.zeros(len(tokens), np.uint8)
    message = np.full(len(tokens), -1, np.int32)
    for turn in written.turns:
        own = (offsets[:, 1] > turn.start) & (offsets[:, 0] < turn.stop)
        role[own], message[own] = role_code(chat.messages[turn.message].role), turn.message
    for words in written.words:
        kind[(offsets[:, 1] > words.start) & (offsets[:, 0] < words.stop)] = words.kind
    n_bos = int(len(tokens) > 0 and tokens[0] == bos)  # every window begins with one anyway
    return ChatTokens(tokens[n_bos:], role[n_bos:], kind[n_bos:], message[n_bos:])


def write_chat(
    tokenizer: Any,
    special_ids: frozenset[int],
    chat: Chat,
    template: str,
    answer: bool = False,
    placeholders: Mapping[str, str] = NO_PLACEHOLDERS,
) -> WrittenChat:
    """Steps 1 to 3; `placeholders` is what the template writes for an image and for a sound.

    Raises:
        InvalidInputError: as of `encode_chats`; or the template writes other media than the chat has.
    """
    template = _dated(template)
    specials = sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids)), key=len, reverse=True)
    messages = [message.as_dict for message in chat.messages]
    text = _rendered(tokenizer, messages, chat.tools, template, answer)
    words = None
    for marked in mark(chat):
        try:
            again = _rendered(tokenizer, marked.messages, marked.tools, template, answer)
        except InvalidInputError:
            continue
        words = marked.found(again, text)
        if words is not None:
            break
    if words is None:
        raise InvalidInputError(
            f"The chat template changes what messages say, so that it cannot be told what a token is: in the chat that "
            f"begins with {_beginning(messages)!r}. Give another with --chat-template."
        )
    asked = text if answer else _rendered(tokenizer, messages, chat.tools, template, True)
    plain = _rendered(tokenizer, messages, chat.tools, template, False) if answer else text
    heading = asked[len(plain) :] if asked.startswith(plain) else ""
    media = _media_in(text, chat, placeholders)
    words = sorted([*words, *media])
    spans = [(one.start, one.stop) for one in media]
    return WrittenChat(text, words, _turns(text, words, chat, heading, specials), spans)


def _media_in(text: str, chat: Chat, placeholders: Mapping[str, str]) -> list[Words]:
    """Where the template writes what stands for the chat's media; they belong to what the message says."""
    wanted = [
        (part.kind, number) for number, one in enumerate(chat.messages) for part in one.parts if part.kind != "text"
    ]
    kinds = {mark: kind for kind, mark in placeholders.items()}
    found = list(re.finditer("|".join(map(re.escape, kinds)), text)) if wanted and kinds else []
    if [kinds[mark[0]] for mark in found] != [kind for kind, _ in wanted]:
        own = ", ".join(kind for kind, _ in wanted) or "none"
        messages = [message.as_dict for message in chat.messages]
        raise InvalidInputError(
            f"The chat that begins with {_beginning(messages)!r} has the media {own}, and "
            f"what its template writes has the marks {', '.join(mark[0] for mark in found) or 'of none'}. Give a "
            "template that writes media, and none of its marks in what messages say."
        )
    return [
        Words(*mark.span(), CONTENT_KINDS.index("text"), number, item)
        for item, (mark, (_, number)) in enumerate(zip(found, wanted, strict=True))
    ]


def _turns(text: str, words: Sequence[Words], chat: Chat, heading: str, specials: Sequence[str]) -> list[Turn]:
    """Step 3; `heading` asks for the assistant's answer."""
    turns: list[Turn] = []
    last_kind: list[int] = []
    for number, one in enumerate(words):
        if one.message < 0:
            continue
        low = words[number - 1].stop if number else 0
        high = words[number + 1].start if number + 1 < len(words) else len(text)
        start, stop = one.start, one.stop
        if one.kind in (CALL, ANSWER):
            start, stop = wrapped(text, start, stop, low, high)
        if turns and turns[-1].message == one.message:
            turns[-1] = turns[-1]._replace(stop=stop)
            last_kind[-1] = one.kind
        else:
            if heading.strip() and role_code(chat.messages[one.message].role) == ROLES.index("assistant"):
                found = text.rfind(heading, low, start)
                start = start if found < 0 else found + len(heading)
            turns.append(Turn(start, stop, one.message))
            last_kind.append(one.kind)
    ends = [*(turn.start for turn in turns[1:]), len(text)][: len(turns)]
    return [
        turn._replace(stop=_closed(text, turn.stop, end, specials, called=kind == CALL))
        for turn, end, kind in zip(turns, ends, last_kind, strict=True)
    ]


def _closed(text: str, stop: int, end: int, specials: Sequence[str], called: bool) -> int:
    """The end of a turn whose words end at `stop`, before the next one's at `end`."""
    skipped = BRACKETS if called else BLANK
    place: int | None = stop
    while place is not None:
        blank = skipped.match(text, place, end)
        place = place if blank is None else blank.end()
        for special in specials:
            if text.startswith(special, place, end):
                return place + len(special)
        tag = CLOSING_TAG.match(text, place, end) if called else None
        place = None if tag is None else tag.end()
    return stop


def _beginning(messages: Sequence[Any]) -> str:
    """What tells a chat from others, in an error."""
    texts = (one.get("content") or one.get("tool_calls") for one in messages)
    return next((str(text) for text in texts if text), "")[:60]


def _rendered(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any], template: str, answer: bool) -> str:
    from jinja2 import TemplateError

    try:
        written = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answer,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InvalidInputError(
            f"The chat template fails on the chat that begins with {_beginning(messages)!r}: {error}"
        ) from error
    return str(written)
