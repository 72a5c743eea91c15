"""What stands where there is nothing to show yet: empty, error, skeleton."""

import logging
from typing import Any

from dash import html

from dashboards.components.controls import code
from dashboards.context import NoIndexError
from scope.errors import ScopeError

__all__ = ["empty", "error", "no_index", "skeleton"]

LOG = logging.getLogger("dashboards")


def empty(title: str, *what_next: Any, command: str | None = None) -> html.Div:
    """An empty state: what is missing, what to do next, and the command to copy."""
    return html.Div(
        className="state",
        children=[
            html.H2(title),
            *(html.P(line, className="muted") for line in what_next),
            *([code(command)] if command else []),
        ],
    )


def no_index() -> html.Div:
    """The workspace has no index."""
    return empty(
        "There is no feature index yet",
        "An index holds every firing of an SAE's features over a text. The demo makes one of Gemma 3 270M in a few "
        "minutes; with a store and an SAE at hand, scope index makes it from those.",
        command="scope demo",
    )


def error(problem: Exception, doing: str, *, way_out: Any = None) -> html.Div:
    """What happened to this request and what to do. What was raised on purpose speaks for itself; anything else is
    a fault of the workbench: its kind is shown, its trace goes to the log.

    Args:
        problem: what was raised.
        doing: the request in words, as in "The feature could not be shown".
        way_out: a link or button.
    """
    if isinstance(problem, NoIndexError):
        return no_index()
    if isinstance(problem, ScopeError | TimeoutError):
        text = str(problem)
    else:
        LOG.error("%s", doing, exc_info=problem)
        text = (
            f"Something in the workbench went wrong ({type(problem).__name__}: {problem}). Nothing of yours is lost; "
            "the details are in the log of scope serve. Reloading the page tries again."
        )
    return html.Div(
        className="state error",
        role="alert",
        children=[
            html.H2(doing),
            html.P(text, style={"overflowWrap": "anywhere"}),
            *([way_out] if way_out is not None else []),
        ],
    )


def skeleton(*heights: int, gap: int = 12) -> html.Div:
    """Grey bars where content will stand, of its height in pixels."""
    return html.Div(
        **{"aria-hidden": "true"},
        style={"display": "grid", "gap": gap},
        children=[html.Div(className="skeleton", style={"height": height}) for height in heights],
    )
