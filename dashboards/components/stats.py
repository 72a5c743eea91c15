"""Statistics: a name with its "?", a value, and what belongs under it."""

from collections.abc import Sequence
from typing import Any

from dash import html

from dashboards.components.controls import define
from dashboards.format import density, exact

__all__ = ["density_interval", "stat", "stats"]


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


def density_interval(low: float, value: float, high: float) -> html.Div:
    """The interval of a density, drawn: the bar is the interval, the tick the estimate; the axis starts at 0."""
    end = high * 1.25 or 1.0
    return html.Div(
        className="interval",
        role="img",
        title=f"95% interval: {exact(low)} to {exact(high)}",
        **{"aria-label": f"95% interval from {density(low)} to {density(high)}"},
        children=[
            html.I(style={"left": f"{100 * low / end:.2f}%", "width": f"{100 * (high - low) / end:.2f}%"}),
            html.B(style={"left": f"{100 * value / end:.2f}%"}),
        ],
    )
