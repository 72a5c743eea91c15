"""Compare."""

from dash import Dash, html

from dashboards.context import Context
from dashboards.links import View
from dashboards.pages import Page

__all__ = ["register", "render"]


def render(context: Context, view: View) -> Page:
    """The page."""
    return Page(html.Div(html.H1("Compare")), "Compare", "compare")


def register(app: Dash, context: Context) -> None:
    """What changes within the page."""
