"""Per-layer embeddings: what each layer's own table wrote for each token of a prompt, and along which features."""

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, html

from dashboards.components.controls import define
from dashboards.components.embeddings_view import EmbeddingsSelection, draw_embeddings
from dashboards.components.model_view import model_nav, no_tables
from dashboards.components.prompt_form import invitation, prompt_form, prompt_stores
from dashboards.components.states import skeleton
from dashboards.components.watching import POLL_MS, Shown, register_watched, watched, watched_stores
from dashboards.context import Context
from dashboards.links import View, embeddings_link
from dashboards.models import ModelJobs
from dashboards.pages import Page
from dashboards.prompts import MAX_LENS_TOKENS, Asked

__all__ = ["register", "render"]

HEIGHTS = (30, 300, 320)
INVITATION = (
    "What does each layer's own table say of a token, beside what the model computes? Type a text of up to "
    f"{MAX_LENS_TOKENS} tokens, or start with:"
)
SAMPLES = ("The opposite of hot is", "def area(radius):\n    return math.pi *", "東京は日本の")


def render(context: Context, view: View) -> Page:
    """The page, with the prompt and the selection of its address."""
    entry = context.entry(view)
    content = html.Div(
        id="selection-box",
        className="prompt-page lens-page",
        **{"data-store": "embeddings-selection"},
        children=[
            html.Header([html.H1("Per-layer embeddings"), define("per_layer")], className="page-head"),
            model_nav(entry.id, "embeddings"),
            prompt_form(Asked.of(view.query), run="embeddings-run"),
            *watched("embeddings", *HEIGHTS),
            *prompt_stores("embeddings", entry.id, view.query, POLL_MS),
            *watched_stores("embeddings"),
        ],
    )
    address = "" if view.index else embeddings_link(entry.id, **view.query)
    return Page(content, "Per-layer embeddings", "model", address)


def register(app: Dash, context: Context) -> None:
    """Running, watching, drawing."""
    jobs = ModelJobs(context)
    app.clientside_callback(
        ClientsideFunction("scope", "runPrompt"),
        Output("embeddings-request", "data"),
        Output("embeddings-selection", "data"),
        Input("embeddings-run", "n_clicks"),
        State("embeddings-request", "data"),
        prevent_initial_call=True,
    )

    def submit(request: dict[str, Any], query: dict[str, Any]) -> dict[str, Any]:
        asked = Asked.of(request)
        if asked.empty:
            return {"facts": jobs.submit_facts(request["index"])}
        wanted = {"written": jobs.submit_written(request["index"], asked)}
        target = EmbeddingsSelection.of(query).target
        if target is not None:
            wanted["effects"] = jobs.submit_effects(request["index"], asked, target)
        return wanted

    def draw(shown: Shown) -> Any:
        written = shown.found.get("written")
        facts = written.facts if written is not None else shown.found.get("facts")
        if facts is None:
            return skeleton(*HEIGHTS)
        if not facts.d_per_layer:
            return no_tables(facts)
        if written is None:
            return invitation(INVITATION, SAMPLES)
        effects, waiting = shown.found.get("effects"), "effects" in shown.waiting
        return draw_embeddings(written, shown.query, context.index(shown.index), shown.theme, effects, waiting)

    register_watched(app, context, "embeddings", submit, draw, "The prompt could not be run")
