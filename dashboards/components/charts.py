"""Plotly figures as Dash components, all with the one configuration."""

from typing import Any

import numpy as np
from dash import dcc, html
from flask import request

from dashboards.components.controls import button
from scope.figures import CONFIG, Theme, activation_colour, activation_histogram, histogram_frame

__all__ = ["HISTOGRAM_HEIGHT", "LOGITS_HEIGHT", "chart", "strength_histogram", "theme_of_request"]

HISTOGRAM_HEIGHT = 232
LOGITS_HEIGHT = 190


def theme_of_request() -> Theme:
    """The theme that the browser shows, from the cookie of assets/theme.js."""
    return "dark" if request.cookies.get("scope_theme") == "dark" else "light"


def strength_histogram(edges: np.ndarray, counts: np.ndarray, theme: Theme) -> Any:
    """`FeatureIndex.histogram` as a figure. Each bar gets its colour by name: Plotly's browser half warns about every
    bar whose colour is a number on a scale."""
    middles = (edges[:-1] + edges[1:]) / 2
    colours = [activation_colour(middle, float(edges[-1]), theme) for middle in middles.tolist()]
    figure = activation_histogram(histogram_frame(edges, counts), theme=theme, colours=colours)
    return figure.update_layout(height=HISTOGRAM_HEIGHT)


def chart(figure: Any, *, id: str | dict[str, str], height: int, words: str) -> html.Div:
    """A figure of fixed height, so that nothing jumps when it arrives, with buttons that save it; `words` is what a
    screen reader says."""
    figure.update_layout(height=height)
    graph = dcc.Graph(
        id=id,
        figure=figure,
        config=CONFIG,
        className="chart",
        style={"height": height},
        responsive=True,
        **_label(words),
    )
    name = id if isinstance(id, str) else "-".join(id.values())
    saves = [
        button(
            kind.upper(), label=f"Save this figure as {kind.upper()}", className="save", **{"data-save-figure": kind}
        )
        for kind in ("png", "svg")
    ]
    return html.Div([graph, html.Div(saves, className="saves")], className="figure", **{"data-name": name})


def _label(words: str) -> dict[str, str]:
    return {"aria-label": words} if "aria-" in getattr(dcc.Graph, "_valid_wildcard_attributes", []) else {}
