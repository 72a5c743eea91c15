"""A grid with tokens as columns, such as features by tokens or layers by tokens, or with experts.

Like a token strip it travels as JSON in one attribute and is drawn by assets/22_token_grid.js as a table, which screen
readers read and arrow keys walk over. Only this part of a page may scroll sideways.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from dash import html

from dashboards.components.controls import button
from dashboards.components.firings import choice
from dashboards.format import count

__all__ = ["COLUMNS", "Cells", "column_turner", "column_window", "grid_saves", "token_grid"]

Cells = Literal["activation", "effect"]
COLUMNS = 96
"""Tokens that are drawn at once."""


def column_window(n_tokens: int, start: int | None, at: int, size: int = COLUMNS) -> range:
    """The positions that are drawn: from `start`, or, where that is open, the block that holds `at`."""
    first = start if start is not None and start < n_tokens else at // size * size
    return range(first, min(n_tokens, first + size))


def column_turner(shown: range, n_tokens: int, size: int = COLUMNS) -> html.Div | None:
    """Buttons that turn to the tokens before and after; None where all are drawn."""
    if len(shown) == n_tokens:
        return None
    before, after = max(0, shown.start - size), shown.stop
    return html.Div(
        className="turner small muted",
        children=[
            choice("← earlier", {"from": before}, False, disabled=shown.start == 0),
            html.Span(f"tokens {count(shown.start)} to {count(shown.stop - 1)} of {count(n_tokens)}"),
            choice("later →", {"from": after}, False, disabled=shown.stop >= n_tokens),
        ],
    )


def grid_saves() -> html.Div:
    """Buttons that save the grid of the same panel (assets/23_save_grid.js)."""
    kinds = ("png", "svg")
    saves = [
        button(kind.upper(), label=f"Save this figure as {kind.upper()}", className="save", **{"data-save-grid": kind})
        for kind in kinds
    ]
    return html.Div(saves, className="grid-saves")


def token_grid(
    tokens: Sequence[str],
    positions: Sequence[int],
    rows: Sequence[dict[str, Any]],
    *,
    what: str,
    column: str = "token",
    near: str = "after",
    corner: str,
    caption: str,
    scale: float,
    kind: Cells = "activation",
    at: int | None = None,
    row: int | None = None,
    pinned_tokens: Sequence[int] = (),
    pins: Sequence[int] | None = None,
    special: Sequence[int] = (),
    said: Sequence[str] = (),
    text: bool = False,
    plain: bool = False,
    value: str = "",
    id: str | None = None,
) -> html.Div:
    """The grid.

    Args:
        tokens: display strings of the columns.
        positions: what position each column is.
        rows: id, name, v (one value per column), and where there are any href, pin, mark, w (the words of the cells),
            h (what the card says besides).
        what: what a row is, and what a chosen one is called in the address.
        column: what a column is, and what a chosen one is called in the address.
        near: how the words of the cells stand to their column ("after" a token, "of" one).
        corner: heading of the rows' names.
        caption: the whole in words, for screen readers.
        scale: the value with the full colour.
        kind: one hue, or blue negative and orange positive.
        at: the selected position.
        row: the selected row.
        pinned_tokens: positions that are marked.
        pins: pinned rows, where rows can be pinned.
        special: positions of BOS and the like.
        said: of a chat, what each column is ("assistant · call"); "" or nothing for plain text.
        text: cells show their words.
        plain: those words are numbers, not tokens.
        value: what the numbers are, for the card.
    """
    marked, apart = set(pinned_tokens), set(special)
    spec = {
        "what": what,
        "token": column,
        "near": near,
        "corner": corner,
        "caption": caption,
        "cols": [
            {"t": token, "n": int(place), "pin": place in marked, "special": place in apart, "said": what_it_is}
            for token, place, what_it_is in zip(tokens, positions, said or [""] * len(tokens), strict=True)
        ],
        "rows": [{**one, "v": [float(f"{number:.4g}") for number in one["v"]]} for one in rows],
        "m": float(scale),
        "k": kind,
        "at": at,
        "row": row,
        "pins": None if pins is None else list(pins),
        "text": text,
        "plain": plain,
        "value": value,
    }
    return html.Div(
        **({"id": id} if id else {}),
        className="token-grid",
        role="region",
        tabIndex=0,
        **{"data-grid": json.dumps(spec, ensure_ascii=False), "aria-label": caption},
    )
