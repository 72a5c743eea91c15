"""What the tokens of a text read, given the bytes that each stands for. No torch: an index shows text without it.

Mostly a token's bytes are whole characters; where a character is spread over several tokens, each of them shows the
whole character and which share of it the token is: "é" spread over two tokens reads "é ¹⁄₂", "é ²⁄₂".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BYTE_TOKEN", "TokenText", "characters_of", "texts_of"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a byte that is no text is spelled out."""
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class TokenText:
    """A token as it stands in a text. The `new_text`s of a text's tokens, joined, are the text."""

    id: int
    text: str
    """All characters that the token has a byte of, spaces kept. Bytes that are no text are shown as <0x9C>."""
    new_text: str
    """The characters that begin in this token."""
    part: tuple[int, int] | None
    """(k, n): the token is the k-th of n tokens that share a character. None where all its characters are whole."""
    special: bool
    """A special token, such as <bos>."""

    @property
    def display(self) -> str:
        """The text, followed by the share of a character where the token is one: "é ¹⁄₂"."""
        if self.part is None:
            return self.text
        k, n = self.part
        return f"{self.text} {str(k).translate(SUPERSCRIPT)}⁄{str(n).translate(SUBSCRIPT)}"


def texts_of(ids: Sequence[int], pieces: Sequence[bytes], special_ids: frozenset[int]) -> list[TokenText]:
    """The tokens of a text, given the bytes that each stands for."""
    characters = characters_of(b"".join(pieces))
    owners = [owner for owner, piece in enumerate(pieces) for _ in piece]
    texts: list[list[str]] = [[] for _ in pieces]
    new: list[list[str]] = [[] for _ in pieces]
    parts: dict[int, tuple[int, int]] = {}
    for start, stop, character in characters:
        sharers = sorted(set(owners[start:stop]))
        new[sharers[0]].append(character)
        for k, owner in enumerate(sharers, start=1):
            texts[owner].append(character)
            if len(sharers) > 1:
                parts.setdefault(owner, (k, len(sharers)))
    return [
        TokenText(token, "".join(text), "".join(begun), parts.get(i), token in special_ids)
        for i, (token, text, begun) in enumerate(zip(map(int, ids), texts, new, strict=True))
    ]


def characters_of(content: bytes) -> list[tuple[int, int, str]]:
    """(start, stop, character) of each character of some bytes; a byte that is no part of one stands alone."""
    characters = []
    at = 0
    while at < len(content):
        width = _utf8_width(content[at])
        try:
            characters.append((at, at + width, content[at : at + width].decode()))
        except UnicodeDecodeError:
            width = 1
            characters.append((at, at + 1, f"<0x{content[at]:02X}>"))
        at += width
    return characters


def _utf8_width(first: int) -> int:
    if first >= 0xF0:
        return 4
    if first >= 0xE0:
        return 3
    return 2 if first >= 0xC0 else 1
