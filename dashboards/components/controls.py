"""Buttons, links, lists to choose from, icons, definitions, code to copy."""

from collections.abc import Iterable
from typing import Any

import dash_mantine_components as dmc
from dash import html

from dashboards.glossary import GLOSSARY

__all__ = ["button", "choice", "code", "define", "icon", "link_button", "panel"]


def icon(name: str) -> html.Span:
    """One of assets/icons, in the colour of the text around it."""
    return html.Span(className=f"icon icon-{name}", **{"aria-hidden": "true"})


def button(*children: Any, label: str | None = None, className: str = "", **properties: Any) -> html.Button:
    """A plain button; `label` names one that has only an icon."""
    named = {"aria-label": label, "title": label} if label else {}
    return html.Button(list(children), type="button", className=f"button {className}".strip(), **named, **properties)


def link_button(*children: Any, href: str, label: str | None = None, className: str = "", **properties: Any) -> html.A:
    """A link that looks like a button."""
    named = {"aria-label": label, "title": label} if label else {}
    return html.A(list(children), href=href, className=f"button {className}".strip(), **named, **properties)


def define(term: str) -> html.Button:
    """The "?" beside a term; a click shows its definition, formula included."""
    entry = GLOSSARY[term]
    return html.Button(
        "?",
        type="button",
        className="define",
        **{
            "aria-label": f"What is {entry.name}?",
            "data-term": entry.name[:1].upper() + entry.name[1:],
            "data-define": entry.definition,
            "data-formula": entry.formula,
        },
    )


def code(text: str) -> html.Div:
    """A block of code or a command, with a button that copies it."""
    copy = button(icon("copy"), label="Copy", className="icon-only tiny copy", **{"data-copy": text})
    return html.Div(className="code", children=[html.Pre(text), copy])


def panel(title: str, *children: Any, term: str | None = None, unit: str = "", end: Any = None) -> html.Section:
    """A titled part of a page."""
    head: list[Any] = [html.H2(title)]
    if term:
        head.append(define(term))
    if unit:
        head.append(html.Span(unit, className="unit"))
    if end is not None:
        head.append(html.Span(end, style={"marginInlineStart": "auto"}))
    return html.Section(className="panel", children=[html.Header(head), *children])


def choice(
    id: str, title: str, values: Iterable[Any], value: str | None, size: str = "sm", *, shown: bool = True
) -> dmc.Select:
    """A searchable, clearable list.

    Args:
        id: of the component.
        title: what stands there while nothing is chosen, and its accessible name.
        values: to choose from.
        value: the one that is chosen.
        size: as Mantine has it.
        shown: whether there is something to choose; what callbacks read stays on the page all the same.
    """
    return dmc.Select(
        id=id,
        data=[{"value": str(option), "label": str(option)} for option in values],
        value=value,
        placeholder=title,
        clearable=True,
        searchable=True,
        size=size,
        className="filter",
        comboboxProps={"shadow": "md"},
        **({} if shown else {"display": "none"}),
        **{"aria-label": title},
    )
