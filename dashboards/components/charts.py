"""Plotly figures as Dash components, all with the one configuration."""

from typing import Any

from dash import dcc
from flask import request

from scope.figures import CONFIG, Theme

__all__ = ["chart", "theme_of_request"]


def theme_of_request() -> Theme:
    """The theme that the browser shows, from the cookie of assets/theme.js."""
    return "dark" if request.cookies.get("scope_theme") == "dark" else "light"


def chart(figure: Any, *, id: str, height: int, words: str) -> dcc.Graph:
    """A figure of fixed height, so that nothing jumps when it arrives; `words` is what a screen reader says."""
    figure.update_layout(height=height)
    return dcc.Graph(
        id=id,
        figure=figure,
        config=CONFIG,
        className="chart",
        style={"height": height},
        responsive=True,
        **_label(words),
    )


def _label(words: str) -> dict[str, str]:
    return {"aria-label": words} if "aria-" in getattr(dcc.Graph, "_valid_wildcard_attributes", []) else {}
