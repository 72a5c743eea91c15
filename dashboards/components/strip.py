"""The token strip: tokens in a proportional face, activation as background colour.

The strip's content travels as JSON in one attribute and is drawn by assets/20_strips.js, which only ever creates text
nodes: a page with thousands of tokens costs Dash one component per strip, and markup in a token stays text.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dash import html

from dashboards.format import number

__all__ = ["Kind", "legend", "token", "token_strip"]

Kind = Literal["activation", "effect", "count"]


def token_strip(
    tokens: Sequence[str],
    values: Iterable[float],
    *,
    scale: float,
    kind: Kind = "activation",
    centre: int | None = None,
    selected: int | None = None,
    label: str = "Tokens",
    pick: bool = False,
    special: Sequence[int] = (),
    extra: Mapping[str, Any] | None = None,
    id: str | None = None,
) -> html.Div:
    """A strip of tokens.

    Args:
        tokens: display strings, blanks and line breaks as they are.
        values: one number per token; 0 leaves the token uncoloured.
        scale: the value with the full colour, the same for all strips that are compared.
        kind: "activation" (one hue), "effect" (blue negative, orange positive) or "count" (one hue, not a firing).
        centre: the token that the strip is about, drawn bold.
        selected: the token that is selected, where tokens can be picked.
        label: what a screen reader calls the strip.
        pick: whether a click selects a token.
        special: positions of special tokens such as BOS.
        extra: further entries for the hover card: r (row of the first token), f (feature), i (index), p (position of
            the centre), from (provenance).
    """
    spec = {
        "t": list(tokens),
        "v": [float(f"{value:.5g}") for value in values],
        "m": float(scale),
        "k": kind,
        "c": centre,
        "s": selected,
        "pick": pick,
        "special": list(special),
        **(extra or {}),
    }
    return html.Div(
        **({"id": id} if id else {}),
        className="strip pick" if pick else "strip",
        role="listbox" if pick else "group",
        tabIndex=0,
        **{"data-strip": json.dumps(spec, ensure_ascii=False), "aria-label": label},
    )


def legend(scale: float, kind: Kind = "activation", words: str = "firing strength") -> html.Div:
    """What the colours of the strips mean."""
    low = number(-scale) if kind == "effect" else "0"
    high = f"+{number(scale)}" if kind == "effect" else number(scale)
    return html.Div(
        className="legend",
        children=[
            html.Span(words),
            html.Span(low, className="number"),
            html.Span(className="scale diverging" if kind == "effect" else "scale"),
            html.Span(high, className="number"),
        ],
    )


INVISIBLE = {
    "\u00a0": "NBSP",
    "\u00ad": "SHY",
    "\u200b": "ZWSP",
    "\u200c": "ZWNJ",
    "\u200d": "ZWJ",
    "\u200e": "LRM",
    "\u200f": "RLM",
    "\u2028": "LS",
    "\u2060": "WJ",
    "\u3000": "␣",
    "\ufe0e": "VS15",
    "\ufe0f": "VS16",
    "\ufeff": "BOM",
}
"""What stands for a character that shows nothing, in a token that has nothing else; assets/00_core.js has the same."""


BEARER = "◌"
"""What bears a combining mark that stands by itself; without it the mark would fall on what comes before."""

SHARE = re.compile(r"(.*?)( [⁰¹²³⁴⁵⁶⁷⁸⁹]+⁄[₀₁₂₃₄₅₆₇₈₉]+)?", re.DOTALL)
"""A token's text, and its share of a character where it is a part of one."""


def token(text: str) -> html.Span:
    """A token by itself, its blanks at either end and its line breaks drawn faintly; one that shows nothing at all,
    such as the joiner inside an emoji, as the names of its characters; a combining mark that begins it on a circle."""
    shown, share = SHARE.fullmatch(text).groups("")  # type: ignore[union-attr]  # it matches anything
    if shown.strip(" ") and all(character in INVISIBLE for character in shown.strip(" ")):
        names = "".join("␣" if character == " " else INVISIBLE[character] for character in shown) + share
        return html.Span(html.Span(names, className="blank"), className="token-text", dir="auto")
    stripped = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if stripped else len(text)
    right = len(text) - len(text.rstrip(" ")) if stripped else 0
    drawn: list[Any] = []
    if left:
        drawn.append(html.Span("␣" * left, className="blank"))
    marks = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
    plain = ""
    for character in stripped:
        if character in marks:
            drawn += [plain] if plain else []
            drawn.append(html.Span(marks[character], className="blank"))
            plain = ""
        else:
            alone = not plain and unicodedata.category(character).startswith("M")
            plain += BEARER + character if alone else character
    drawn += [plain] if plain else []
    if right:
        drawn.append(html.Span("␣" * right, className="blank"))
    return html.Span(drawn, className="token-text", dir="auto")
