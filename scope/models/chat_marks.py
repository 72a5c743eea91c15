"""Marks that a chat's own words carry through its template, so that it shows where it writes them.

1. Each text that a chat gives to its template (what messages say and think, names and arguments of calls, names and
   descriptions of tools) gets a mark before its first and one after its last character: rare ideographs that the chat
   does not use, each of them once. They are letters, so that nothing strips or escapes them.
2. The template writes the marked chat. Without its marks the result must be what it writes of the chat itself: then
   the marks changed nothing, and where they stand in it is where the words stand.
3. A template may look at how a content begins or split it at tags, as some do at `</think>`; then step 2 fails, and the
   parts between tags are marked instead of the whole, and after that all but names, which a template may compare.
4. The words of a call or a tool are some of what the template writes for it. The rest is what belongs together around
   them: the outermost `{…}` that holds them and no other words, a name's own `(…)`, or a pair of tags.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from activations.chats import CONTENT_KINDS, REASONING, Chat, Message
from scope.errors import InvalidInputError

__all__ = ["ATTEMPTS", "Attempt", "MarkedChat", "Words", "mark", "wrapped"]

FIRST_MARK, LAST_MARK = 0x20000, 0x2A6DF
"""CJK Unified Ideographs Extension B."""
_MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(LAST_MARK)}])")
_TAG = re.compile(r"(<[^<>\n]*>)")
_OPENING = re.compile(r"<([\w|.:=-]+)[^<>\n]*>")
TEXT, THOUGHT, CALL, ANSWER, TOOL = map(CONTENT_KINDS.index, CONTENT_KINDS[1:])
ANSWERING = ("tool", "function", "ipython")
CLOSING = {"{": "}", "[": "]", "(": ")"}


class Attempt(NamedTuple):
    """What is marked."""

    parts: bool
    """The parts of a content between its tags; else it as a whole."""
    names: bool
    """Names of functions, too."""


ATTEMPTS = (Attempt(False, True), Attempt(True, True), Attempt(False, False), Attempt(True, False))


class Words(NamedTuple):
    """Where some words of a chat stand in what its template writes."""

    start: int
    stop: int
    kind: int
    """Code in `CONTENT_KINDS`."""
    message: int
    """Number of the message; -1 of a tool."""
    item: int
    """Number of the call, of the tool, or of the part of a content."""


class _Owner(NamedTuple):
    kind: int
    message: int
    item: int


class MarkedChat:
    """A chat with marks; what its template writes of it tells where the words stand.

    Raises:
        InvalidInputError: there are more words than marks.
    """

    def __init__(self, chat: Chat, attempt: Attempt) -> None:
        self._chat, self._attempt = chat, attempt
        taken = set(_MARK.findall(str(chat)))
        self._free = (mark for mark in map(chr, range(FIRST_MARK, LAST_MARK + 1)) if mark not in taken)
        self._owners: dict[str, tuple[_Owner, str]] = {}
        self._parts: dict[int, list[tuple[int, int]]] = {}
        """Of messages that are marked in parts: where in the content each stands."""
        self.messages = [self._message(number, message) for number, message in enumerate(chat.messages)]
        self.tools = [self._tool(number, tool) for number, tool in enumerate(chat.tools)]

    @property
    def tells_all(self) -> bool:
        """Whether each call and each tool has a mark."""
        owners = {owner for owner, _ in self._owners.values()}
        calls = {
            _Owner(CALL, n, item) for n, one in enumerate(self._chat.messages) for item in range(len(one.tool_calls))
        }
        return calls | {_Owner(TOOL, -1, number) for number in range(len(self._chat.tools))} <= owners

    def found(self, marked: str, plain: str) -> list[Words] | None:
        """Where the words stand in `plain`, what the template writes without marks, by place; None where `marked` is
        something else."""
        pieces = _MARK.split(marked)
        written: list[str] = []
        opened: dict[str, int] = {}
        place = 0
        spans: dict[_Owner, list[list[int]]] = {}
        for piece in pieces:
            known = self._owners.get(piece)
            if known is None:
                written.append(piece)
                place += len(piece)
            elif piece in opened:
                owner, start = known[0], opened.pop(piece)
                spans.setdefault(owner, []).append([start, place])
            else:
                opened[known[1]] = place
        if opened or "".join(written) != plain:
            return None
        return self._settled(spans, plain)

    # --- marking -----------------------------------------------------------------------------------------------

    def _around(self, text: str, owner: _Owner) -> str:
        core = text.strip()
        if not core:
            return text
        try:
            first, last = next(self._free), next(self._free)
        except StopIteration as error:
            raise InvalidInputError("The chat has too many messages to be told apart; split it.") from error
        self._owners[first], self._owners[last] = (owner, last), (owner, first)
        start = text.index(core)
        return f"{text[:start]}{first}{core}{last}{text[start + len(core) :]}"

    def _message(self, number: int, message: Message) -> dict[str, Any]:
        kind = ANSWER if message.role in ANSWERING else TEXT
        marked = message.as_dict
        if message.parts:
            marked["content"] = [
                {**part.as_dict, "text": self._around(part.value, _Owner(kind, number, item))}
                if part.kind == "text"
                else part.as_dict
                for item, part in enumerate(message.parts)
            ]
        else:
            marked["content"] = self._content(number, message.content, kind)
        for name in REASONING:
            if name in marked:
                marked[name] = self._around(marked[name], _Owner(THOUGHT, number, 0))
        if message.tool_calls:
            marked["tool_calls"] = [
                self._called(call, _Owner(CALL, number, item)) for item, call in enumerate(message.tool_calls)
            ]
        return marked

    def _content(self, number: int, content: str, kind: int) -> str:
        pieces = _TAG.split(content) if self._attempt.parts else [content]
        if not any(piece.strip() for piece in pieces[::2]):
            pieces = [content]
        parts: list[tuple[int, int]] = []
        marked: list[str] = []
        place = 0
        for n, piece in enumerate(pieces):
            core = "" if n % 2 else piece.strip()  # every other one is a tag
            if core:
                start = place + piece.index(core)
                marked.append(self._around(piece, _Owner(kind, number, len(parts))))
                parts.append((start, start + len(core)))
            else:
                marked.append(piece)
            place += len(piece)
        self._parts[number] = parts
        return "".join(marked)

    def _called(self, call: Mapping[str, Any], owner: _Owner) -> dict[str, Any]:
        function = dict(call["function"])
        if self._attempt.names:
            function["name"] = self._around(function["name"], owner)
        function["arguments"] = self._values(function["arguments"], owner)
        return {**call, "function": function}

    def _values(self, value: Any, owner: _Owner) -> Any:
        if isinstance(value, Mapping):
            return {name: self._values(one, owner) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._values(one, owner) for one in value]
        return self._around(value, owner) if isinstance(value, str) else value

    def _tool(self, number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
        owner = _Owner(TOOL, -1, number)
        marked = dict(tool)
        function = dict(tool["function"]) if isinstance(tool.get("function"), Mapping) else marked
        for name in ("name", "description") if self._attempt.names else ("description",):
            if isinstance(function.get(name), str):
                function[name] = self._around(function[name], owner)
        if "function" in tool:
            marked["function"] = function
        return marked

    # --- finding -----------------------------------------------------------------------------------------------

    def _settled(self, spans: Mapping[_Owner, list[list[int]]], text: str) -> list[Words]:
        """Words as they stand, with what belongs to calls and tools around them."""
        words = []
        for owner, own in spans.items():
            if owner.kind in (CALL, TOOL):
                words.append(Words(min(start for start, _ in own), max(stop for _, stop in own), *owner))
            else:
                words += [Words(start, stop, *owner) for start, stop in own]
        words = self._joined(sorted(words), text)
        settled: list[Words] = []
        for number, one in enumerate(words):
            low = settled[-1].stop if settled else 0
            high = words[number + 1].start if number + 1 < len(words) else len(text)
            settled.append(_whole(one, text, low, high) if one.kind in (CALL, TOOL) else one)
        return settled

    def _joined(self, words: Sequence[Words], text: str) -> list[Words]:
        """Parts of one content as one, where the template writes what is between them as it is."""
        joined: list[Words] = []
        for one in words:
            parts = self._parts.get(one.message, []) if one.kind in (TEXT, ANSWER) else []
            content = self._chat.messages[one.message].content if parts else ""
            low = joined[-1].stop if joined else 0
            if len(parts) > 1 or (parts and content.strip() != content[slice(*parts[0])]):
                first, last = parts[one.item]
                before = content[:first].lstrip() if one.item == 0 else content[parts[one.item - 1][1] : first]
                after = content[last:].rstrip() if one.item == len(parts) - 1 else ""
                previous = joined[-1] if joined else None
                if previous is not None and previous[2:] == (one.kind, one.message, one.item - 1):
                    if text[low : one.start] == before:
                        joined[-1] = previous._replace(stop=one.stop, item=one.item)
                        one = joined.pop()
                elif (
                    one.item == 0
                    and before
                    and text.startswith(before, one.start - len(before))
                    and one.start - len(before) >= low
                ):
                    one = one._replace(start=one.start - len(before))
                if after and text.startswith(after, one.stop):
                    one = one._replace(stop=one.stop + len(after))
            joined.append(one)
        return joined


def mark(chat: Chat) -> Iterator[MarkedChat]:
    """The chat with marks, in the ways of step 3."""
    for attempt in ATTEMPTS:
        marked = MarkedChat(chat, attempt)
        if marked.tells_all:
            yield marked


def wrapped(text: str, start: int, stop: int, low: int, high: int) -> tuple[int, int]:
    """A stretch of text with the quotes and the pairs of tags right around it, `<x>…</x>` or `[x]…[/x]`, between `low`
    and `high`."""
    if low < start and stop < high and text[start - 1] == text[stop] == '"':
        start, stop = start - 1, stop + 1
    while True:
        before = re.search(r"(?:<([^<>/\n][^<>\n]*)>|\[([^\[\]/\n][^\[\]\n]*)\])\s*$", text[low:start])
        if before is None:
            return start, stop
        close = f"</{before[1]}>" if before[1] else f"[/{before[2]}]"
        after = re.match(r"\s*" + re.escape(close), text[stop:high])
        if after is None:
            return start, stop
        start, stop = low + before.start(), stop + after.end()


def _whole(words: Words, text: str, low: int, high: int) -> Words:
    """Step 4, for a call's or a tool's words between `low` and `high`."""
    for opening in re.finditer(r"\{", text[low : words.start]):
        stop = _match(text, low + opening.start(), high)
        if stop is not None and stop >= words.stop:
            return words._replace(start=low + opening.start(), stop=stop)
    bracket = text.find("(", words.start, high)
    if bracket >= 0 and text[words.start : bracket].replace("_", "").replace(".", "").isalnum():
        stop = _match(text, bracket, high)
        if stop is not None and stop >= words.stop:
            return words._replace(stop=stop)
    for tag in reversed(list(_OPENING.finditer(text, low, high))):
        name = re.split(r"[=\s]", tag[1])[0]
        close = text.find(f"</{name}>", words.stop, high)
        if tag.start() < words.start and close >= 0:
            if tag.end() > words.start:  # the name is part of the tag, as in <function=name>
                return words._replace(start=tag.start(), stop=close + len(name) + 3)
            inner = text[tag.end() : close]
            start = tag.end() + len(inner) - len(inner.lstrip())
            return words._replace(start=start, stop=start + len(inner.strip()))
    return words


def _match(text: str, start: int, high: int) -> int | None:
    """Where the bracket at `start` is closed, one past it; brackets in "…" do not count."""
    expected: list[str] = []
    quoted = False
    place = start
    while place < high:
        character = text[place]
        if quoted:
            place += character == "\\"
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character in CLOSING:
            expected.append(CLOSING[character])
        elif character in CLOSING.values():
            if expected.pop() != character:
                return None
            if not expected:
                return place + 1
        place += 1
    return None
