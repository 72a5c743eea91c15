"""`Condition`: which rows of an index are meant, as a text that can be typed.

    language:de                    rows of documents in this language
    source:python-docs             rows of documents from this source
    role:assistant                 of chats: rows of the turns of one role
    kind:tool_call                 of chats: rows of one kind of content (text, tool_call, tool_response, markup, …)
    state:masked                   of denoising: rows of tokens of one state (prompt, masked, committing, committed)
    modality:image                 of texts with media: soft tokens of images, or of sounds (audio), or text
    document:17                    rows of one document
    token: cat                     rows of this token; spaces count
    regex:^\\d+$                    rows whose token's text has a match (RE2 syntax; \\p{L} is any letter)
    feature:123                    rows on which this feature fires
    language:de & regex:^[A-Z]     rows of which all of these hold

A value that begins or ends with a space, or that holds `&`, may be written as a JSON string: `token:" & "`,
`token:"\\n"`. `str(condition)` writes it so where it must.
"""

import json
import re
from dataclasses import dataclass
from typing import Final

from scope.errors import InvalidInputError, UnknownNameError

__all__ = ["KINDS", "Condition", "Term"]

KINDS: Final = ("language", "source", "role", "kind", "modality", "state", "document", "token", "regex", "feature")
NUMBERED: Final = ("document", "feature")
EXAMPLE = "Write it as kind:value, such as language:de, or several joined by &."

_KIND = re.compile(rf"\s*({'|'.join(KINDS)}):")
_NEXT = re.compile(rf"\s+&\s*(?=(?:{'|'.join(KINDS)}):)")
_JOIN = re.compile(r"\s*&")


@dataclass(frozen=True)
class Term:
    """One part of a condition.

    Raises:
        UnknownNameError: there is no such kind.
        InvalidInputError: the value is empty, or no number where it must be one.
    """

    kind: str
    """One of `KINDS`."""
    value: str | int
    """A number for `document` and `feature`, a text for the others."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("kind of condition", self.kind, KINDS)
        whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        if self.kind in NUMBERED and not (whole and int(self.value) >= 0):
            raise InvalidInputError(f"{self.kind}:{self.value} needs a whole number, such as {self.kind}:12.")
        if self.kind not in NUMBERED and not (isinstance(self.value, str) and self.value):
            raise InvalidInputError(f"The condition {self.kind}:{self.value} has no text after the colon. {EXAMPLE}")

    def __str__(self) -> str:
        value = str(self.value)
        plain = value.strip() == value and value.isprintable() and not value.startswith('"') and "&" not in value
        return f"{self.kind}:{value if plain else json.dumps(value, ensure_ascii=False)}"


@dataclass(frozen=True)
class Condition:
    """Rows of an index of which all terms hold; see the module for how it is written."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise InvalidInputError(f"The condition is empty. {EXAMPLE}")

    @classmethod
    def parse(cls, text: "str | Condition") -> "Condition":
        """The condition that a text stands for; a condition is taken as it is.

        Raises:
            UnknownNameError: there is no such kind of condition; near ones are suggested.
            InvalidInputError: the text cannot be read.
        """
        if isinstance(text, Condition):
            return text
        terms: list[Term] = []
        place = 0
        while True:
            found = _KIND.match(text, place)
            if found is None:
                raise _unreadable(text, place)
            value, place = _value(text, found.end())
            kind = found.group(1)
            terms.append(Term(kind, _number(kind, value) if kind in NUMBERED else _text(kind, value)))
            if place >= len(text):
                return cls(tuple(terms))

    def __and__(self, other: "Condition | str") -> "Condition":
        return Condition(self.terms + Condition.parse(other).terms)

    def __str__(self) -> str:
        return " & ".join(map(str, self.terms))

    def values(self, kind: str) -> tuple[str | int, ...]:
        """The values of all terms of one kind."""
        return tuple(term.value for term in self.terms if term.kind == kind)

    @property
    def features(self) -> tuple[int, ...]:
        """The features that it names."""
        return tuple(int(value) for value in self.values("feature"))


def _value(text: str, start: int) -> tuple[str, int]:
    """The value that starts there, and where the next term starts."""
    quoted = re.compile(r'\s*(?=")').match(text, start)
    if quoted is not None:
        try:
            value, end = json.JSONDecoder().raw_decode(text, quoted.end())
        except ValueError:
            pass  # a plain value that begins with a quotation mark
        else:
            rest = text[end:]
            if not rest.strip():
                return value, len(text)
            join = _JOIN.match(rest)
            if join is not None:
                return value, end + join.end()
    following = _NEXT.search(text, start)
    if following is None:
        return text[start:], len(text)
    return text[start : following.start()], following.end()


def _text(kind: str, value: str) -> str:
    return value if kind in ("token", "regex") else value.strip()


def _number(kind: str, value: str) -> int:
    stripped = value.strip()
    if not (stripped.isascii() and stripped.isdigit()):
        raise InvalidInputError(f"{kind}:{value} needs a whole number, such as {kind}:12.")
    return int(stripped)


def _unreadable(text: str, place: int) -> InvalidInputError:
    rest = text[place:].strip()
    kind, colon, _ = rest.partition(":")
    if colon and kind.strip().isidentifier():
        return UnknownNameError("kind of condition", kind.strip(), KINDS)
    return InvalidInputError(f"The condition {text!r} cannot be read from {rest!r} on. {EXAMPLE}")
