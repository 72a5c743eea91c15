"""The model of an index: how many parameters it has, how many a token uses, and where they lie."""

from typing import Any

from dash import Dash, html

from dashboards.components.controls import define
from dashboards.components.model_view import draw_model, model_nav
from dashboards.components.states import skeleton
from dashboards.components.watching import Shown, register_watched, watched, watched_stores
from dashboards.context import Context
from dashboards.links import View, model_link
from dashboards.models import ModelJobs
from dashboards.pages import Page

__all__ = ["register", "render"]

HEIGHTS = (20, 60, 200, 90)


def render(context: Context, view: View) -> Page:
    """The page; its figures come from the model, which is loaded for them."""
    entry = context.entry(view)
    name = str(context.index(entry.id).model_info["name"])
    content = html.Div(
        id="selection-box",
        className="model-page",
        **{"data-store": "model-selection"},
        children=[
            html.Header([html.H1(html.Bdi(name)), define("parameters")], className="page-head"),
            model_nav(entry.id, "model"),
            *watched("model", *HEIGHTS),
            *watched_stores("model", query=view.query, index=entry.id),
        ],
    )
    return Page(content, name, "model", "" if view.index else model_link(entry.id, **view.query))


def register(app: Dash, context: Context) -> None:
    """Counting, watching, drawing."""
    jobs = ModelJobs(context)

    def draw(shown: Shown) -> Any:
        facts = shown.found.get("facts")
        return skeleton(*HEIGHTS) if facts is None else draw_model(facts)

    register_watched(
        app,
        context,
        "model",
        lambda request, query: {"facts": jobs.submit_facts(request["index"])},
        draw,
        "The model could not be looked into",
    )
