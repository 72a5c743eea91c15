"""Tables of a few columns: lines on a desk; on a phone each line is a block, names of columns before what they say."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dash import html

from dashboards.components.controls import define

__all__ = ["stacking_table"]


def stacking_table(
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numeric: Collection[int] = (),
    terms: Mapping[str, str] | None = None,
    className: str = "",
) -> html.Div:
    """A table that scrolls within itself where it is too wide.

    Args:
        title: what a screen reader calls it.
        names: of the columns.
        rows: what stands in their cells: content, or an `html.Td` that has properties of its own.
        numeric: columns of numbers, which end in line.
        terms: name of a column to the term of the glossary that its "?" explains.
        className: of the table.
    """
    numbers = ["number" if place in numeric else "" for place in range(len(names))]
    known = terms or {}
    heads = [[name, " ", define(known[name])] if name in known else name for name in names]
    head = html.Tr([html.Th(words, className=kind) for words, kind in zip(heads, numbers, strict=True)])
    body = [html.Tr([_cell(*cell) for cell in zip(names, row, numbers, strict=True)]) for row in rows]
    table = html.Table([html.Thead(head), html.Tbody(body)], className=f"table stacking {className}".strip())
    return html.Div(table, className="scroll", tabIndex=0, role="region", **{"aria-label": title})


def _cell(name: str, content: Any, kind: str) -> html.Td:
    given = content if isinstance(content, html.Td) else html.Td(content)
    kept = {key: getattr(given, key) for key in ("title", "id") if getattr(given, key, None) is not None}
    inside = given.children if hasattr(given, "children") else None
    return html.Td(html.Div(inside, className=kind), className=kind, **{"data-name": name}, **kept)
