"""Tables of a few columns: lines on a desk; on a phone each line is a block, names of columns before what they say."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dash import html

from dashboards.components.controls import define

__all__ = ["Sorting", "stacking_table"]


class Sorting(NamedTuple):
    """What a table is sorted by, which is part of the address: `sort=NAME`, or `sort=-NAME` for the largest first."""

    keys: Mapping[str, str]
    """By column that can be sorted by: its name in the address."""
    by: str
    descending: bool

    @classmethod
    def of(cls, text: str, keys: Mapping[str, str], default: str) -> "Sorting":
        """The sorting of an address, or `default`, written the same way, where it says none that is known."""
        chosen = text if text.removeprefix("-") in keys.values() else default
        return cls(keys, chosen.removeprefix("-"), chosen.startswith("-"))


def stacking_table(
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numeric: Collection[int] = (),
    terms: Mapping[str, str] | None = None,
    sorting: Sorting | None = None,
    className: str = "",
) -> html.Div:
    """A table that scrolls within itself where it is too wide.

    Args:
        title: what a screen reader calls it.
        names: of the columns.
        rows: what stands in their cells: content, or an `html.Td` that has properties of its own.
        numeric: columns of numbers, which end in line.
        terms: name of a column to the term of the glossary that its "?" explains.
        sorting: how the rows are sorted; heads of columns that others can be sorted by become buttons.
        className: of the table.
    """
    numbers = ["number" if place in numeric else "" for place in range(len(names))]
    known = terms or {}
    head = html.Tr(
        [
            html.Th(
                [_head(name, sorting), *([" ", define(known[name])] if name in known else [])],
                className=kind,
                **_order(name, sorting),
            )
            for name, kind in zip(names, numbers, strict=True)
        ]
    )
    body = [html.Tr([_cell(*cell) for cell in zip(names, row, numbers, strict=True)]) for row in rows]
    table = html.Table([html.Thead(head), html.Tbody(body)], className=f"table stacking {className}".strip())
    return html.Div(table, className="scroll", tabIndex=0, role="region", **{"aria-label": title})


def _head(name: str, sorting: Sorting | None) -> Any:
    """A column's name, where the table can be sorted by it a button: the largest first, at a second press the least."""
    if sorting is None or name not in sorting.keys:
        return name
    key = sorting.keys[name]
    again = sorting.by == key and sorting.descending
    change = json.dumps({"sort": key if again else f"-{key}"})
    return html.Button(name, type="button", className="sort", **{"data-select": change})


def _order(name: str, sorting: Sorting | None) -> dict[str, str]:
    if sorting is None or sorting.keys.get(name) != sorting.by:
        return {}
    return {"aria-sort": "descending" if sorting.descending else "ascending"}


def _cell(name: str, content: Any, kind: str) -> html.Td:
    given = content if isinstance(content, html.Td) else html.Td(content)
    kept = {key: getattr(given, key) for key in ("title", "id") if getattr(given, key, None) is not None}
    inside = given.children if hasattr(given, "children") else None
    return html.Td(html.Div(inside, className=kind), className=kind, **{"data-name": name}, **kept)
