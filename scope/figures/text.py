"""Words and numbers as they are shown: three significant digits, "1 in 2,400", tokens with their blanks visible."""

import html
import math

__all__ = ["as_label", "one_in", "short_number", "visible_token"]

_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def visible_token(token: str) -> str:
    """A token for a place where its blanks would be lost: line breaks drawn, blanks at either end as ␣."""
    drawn = "".join(_MARKS.get(character, character) for character in token)
    inner = drawn.strip(" ")
    if not inner:
        return "␣" * len(drawn)
    left = len(drawn) - len(drawn.lstrip(" "))
    right = len(drawn) - len(drawn.rstrip(" "))
    return "␣" * left + inner + "␣" * right


def as_label(text: str, length: int = 40) -> str:
    """Text for a Plotly label, which reads markup: escaped, cut to `length` characters."""
    drawn = visible_token(text)
    if len(drawn) > length:
        drawn = drawn[: length - 1] + "…"
    return html.escape(drawn, quote=False)


def short_number(value: float | None) -> str:
    """Three significant digits; thousands separated; powers of ten below 0.001 and from 10 million."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    mantissa, power = f"{value:.2e}".split("e")
    exponent = int(power)
    if exponent < -3 or exponent >= 7:
        text = f"{mantissa}e{exponent}"
    elif exponent >= 3:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{2 - exponent}f}"
    return text.replace("-", "−")


def one_in(density: float | None) -> str:
    """A density in words: "1 in 2,400"; "never" for 0."""
    if density is None or not math.isfinite(density):
        return "–"
    if density <= 0:
        return "never"
    return f"1 in {short_number(1 / density)}"
