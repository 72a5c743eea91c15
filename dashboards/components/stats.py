"""Statistics: a name with its "?", a value, and what belongs under it."""

from collections.abc import Callable, Sequence
from typing import Any

from dash import html

from dashboards.components.controls import define
from dashboards.format import exact, number

__all__ = ["interval", "stat", "stats"]


def stat(name: str, value: str, *, term: str | None = None, note: Any = None, title: str | None = None) -> html.Div:
    """One statistic. `title` is the exact value, shown when pointed at."""
    return html.Div(
        className="stat",
        children=[
            html.Dt([name, *([define(term)] if term else [])]),
            html.Dd(value, title=title, className="number"),
            *([html.Dd(note)] if note is not None else []),
        ],
    )


def stats(items: Sequence[html.Div]) -> html.Dl:
    """A row of statistics."""
    return html.Dl(list(items), className="stats")


def interval(low: float, value: float, high: float, form: Callable[[float], str] = number) -> html.Div:
    """A 95% interval, drawn: the bar is the interval, the tick the estimate; the axis starts at 0. `form` writes its
    ends for a reader who cannot see it."""
    end = high * 1.25 or 1.0
    return html.Div(
        className="interval",
        role="img",
        title=f"95% interval: {exact(low)} to {exact(high)}",
        **{"aria-label": f"95% interval from {form(low)} to {form(high)}"},
        children=[
            html.I(style={"left": f"{100 * low / end:.2f}%", "width": f"{100 * (high - low) / end:.2f}%"}),
            html.B(style={"left": f"{100 * value / end:.2f}%"}),
        ],
    )
