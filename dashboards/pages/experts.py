"""The experts of a model: their load and what they are for, the features that fire on their tokens, and where a
prompt's tokens go, with edits of that. `view` in the address says which; the rest of it, what is selected.

1. Load and features are counted on a store of the workspace that has the router's choices (`hook_experts`).
2. A prompt runs in the model of the index; an edit runs as soon as the address says it whole.
"""

import shlex
from typing import TYPE_CHECKING, Any

from dash import ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components.controls import define
from dashboards.components.experts_view import ExpertSelection, draw_load, draw_pairs, store_chips
from dashboards.components.model_view import model_nav, no_experts
from dashboards.components.prompt_form import invitation, prompt_form, prompt_stores
from dashboards.components.prompt_state import whole_number
from dashboards.components.routing_view import draw_routing
from dashboards.components.states import empty, skeleton
from dashboards.components.watching import POLL_MS, Shown, register_watched, watched, watched_stores
from dashboards.context import Context
from dashboards.experts import ExpertEdit, ExpertJobs
from dashboards.links import View, experts_link
from dashboards.models import ModelFacts, ModelJobs
from dashboards.pages import Page
from dashboards.prompts import MAX_LENS_TOKENS, Asked
from scope.errors import ScopeError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["register", "render"]

Record = dict[str, Any]

HEIGHTS = (30, 240, 320)
VIEWS = {"": "Load", "features": "Features", "prompt": "A prompt"}
CARRIED = "text chat store layer expert feature do other at token"
FIELDS = ("feature", "expert", "other")
INVITATION = (
    "Which experts does each token go to, and what if it went elsewhere? Type a text of up to "
    f"{MAX_LENS_TOKENS} tokens, or start with:"
)
SAMPLES = ("The opposite of hot is", "def area(radius):\n    return math.pi *", "東京は日本の")


def render(context: Context, view: View) -> Page:
    """The page, with the view and the selection of its address."""
    entry = context.entry(view)
    shown = view.get("view") if view.get("view") in VIEWS else ""
    views = [
        html.A(
            words,
            href=experts_link(entry.id, view=name),
            className="chip",
            **{"aria-current": "page" if name == shown else "false", "data-carry": CARRIED},
        )
        for name, words in VIEWS.items()
    ]
    head = [html.H1("Experts"), define("experts")]
    parts: list[Any] = [
        html.Header(head, className="page-head"),
        model_nav(entry.id, "experts"),
        html.Nav(views, className="chips model-nav", **{"aria-label": "What is shown of the experts"}),
    ]
    if shown == "prompt":
        parts.append(prompt_form(Asked.of(view.query), run="experts-run"))
    parts += [*watched("experts", *HEIGHTS), html.Div(id="experts-typed-answer")]
    if shown == "prompt":
        parts += [*prompt_stores("experts", entry.id, view.query, POLL_MS), *watched_stores("experts")]
    else:
        parts += watched_stores("experts", query=view.query, index=entry.id)
    parts += [dcc.Store(id=f"experts-{name}-sent") for name in FIELDS]
    parts.append(dcc.Store(id="experts-typed"))
    content = html.Div(
        parts, id="selection-box", className="prompt-page lens-page", **{"data-store": "experts-selection"}
    )
    return Page(content, "Experts", "model", "" if view.index else experts_link(entry.id, **view.query))


def register(app: Dash, context: Context) -> None:
    """Running, watching, drawing, and typing a number."""
    jobs, models = ExpertJobs(context), ModelJobs(context)
    app.clientside_callback(
        ClientsideFunction("scope", "runPrompt"),
        Output("experts-request", "data"),
        Output("experts-selection", "data"),
        Input("experts-run", "n_clicks"),
        State("experts-request", "data"),
        prevent_initial_call=True,
    )

    def submit(request: Record, query: Record) -> Record:
        index = request["index"]
        if query.get("view") == "prompt":
            asked, edit = Asked.of(request), ExpertEdit.of(query)
            if asked.empty:
                return {"facts": models.submit_facts(index)}
            wanted = {"routed": jobs.submit_routing(index, asked)}
            if edit is not None:
                wanted["effects"] = jobs.submit_effects(index, asked, edit, whole_number(query, "token"))
            return wanted
        store = jobs.store(index, str(query.get("store") or ""))
        if store is None:
            return {"facts": models.submit_facts(index)}
        selection = ExpertSelection.read(query)
        layer = store.layer(selection.layer)
        if query.get("view") == "features":
            reads = context.index(index).hook_name
            return {"pairs": jobs.submit_pairs(store, index, layer)} if reads in store.hooks else {}
        return {"load": jobs.submit_load(store), "groups": jobs.submit_groups(store, layer, selection.by)}

    register_watched(
        app, context, "experts", submit, lambda shown: _draw(context, jobs, shown), "The experts could not be shown"
    )
    _register_typed(app, context)


def _draw(context: Context, jobs: ExpertJobs, shown: Shown) -> Any:
    facts, routed = shown.found.get("facts"), shown.found.get("routed")
    if routed is not None:
        facts = routed.facts
    if facts is not None and not facts.experts:
        return no_experts(facts)
    index = context.index(shown.index)
    if shown.words("view") == "prompt":
        if routed is not None and routed.routing is not None:
            return draw_routing(routed, shown.found.get("effects"), "effects" in shown.waiting, shown.query, index)
        return invitation(INVITATION, SAMPLES) if facts is not None else skeleton(*HEIGHTS)
    store = jobs.store(shown.index, shown.words("store"))
    if store is None:
        return _no_store(context, facts, index) if facts is not None else skeleton(*HEIGHTS)
    chips = store_chips(jobs.stores(shown.index), store)
    if shown.words("view") == "features":
        if index.hook_name not in store.hooks:
            return html.Div([chips, _no_hook(store.entry.name, index.hook_name)])
        return html.Div(
            [chips, draw_pairs(shown.found.get("pairs"), store, shown.query, index)], className="lens-result"
        )
    found, groups = shown.found.get("load"), shown.found.get("groups")
    drawn = draw_load(found, groups, store, shown.query, shown.theme, shown.index)
    return html.Div([chips, drawn], className="lens-result")


def _no_store(context: Context, facts: ModelFacts, index: "FeatureIndex") -> html.Div:
    layer, model = next(iter(facts.experts)), str(index.model_info.get("load_name") or facts.name)
    out = str(context.workspace.path / "stores" / "experts.zarr")
    return empty(
        "No store has the router's choices yet",
        "Capture them for the layers that have experts, and the hook of the SAE into the same store. Experts are "
        "numbers: with more than 256 of them capture in float32.",
        command=f"scope capture --model {shlex.quote(model)} --data FILE --hook blocks.{layer}.moe.hook_experts "
        f"--hook blocks.{layer}.moe.hook_weights --hook {index.hook_name} --out {shlex.quote(out)}",
    )


def _no_hook(store: str, hook: str) -> html.Div:
    return empty(
        "The store has no activations for this SAE",
        f"The SAE of this index reads {hook}, which {store} does not have. Capture it into the same store:",
        command=f"scope capture --model MODEL --data FILE --hook {hook} --into STORE",
    )


def _register_typed(app: Dash, context: Context) -> None:
    @app.callback(
        Output("experts-typed", "data"),
        Output("experts-typed-answer", "children"),
        *(Input(f"experts-{name}-sent", "data") for name in FIELDS),
        State("experts-request", "data"),
        prevent_initial_call=True,
    )
    def typed(*sent: Any) -> tuple[Any, Any]:
        *texts, request = sent
        name = next((one for one in FIELDS if ctx.triggered_id == f"experts-{one}-sent"), "")
        said = texts[FIELDS.index(name)] if name else None
        if not said or not str(said["text"]).strip():
            raise PreventUpdate
        found = whole_number({"one": str(said["text"]).strip()}, "one")
        try:
            n = context.index(request["index"]).d_sae if name == "feature" else None
        except ScopeError as problem:
            return no_update, html.Span(str(problem), className="small", role="alert")
        if found is None or (n is not None and found >= n):
            words = (
                f"{said['text']!r} is no feature: they are 0 to {n - 1:,}."
                if n
                else f"{said['text']!r} is no expert's number."
            )
            return no_update, html.Span(words, className="small", role="alert")
        return {name: found}, ""

    app.clientside_callback(
        ClientsideFunction("scope", "chooseTyped"),
        Output("experts-typed", "storage_type"),
        Input("experts-typed", "data"),
        prevent_initial_call=True,
    )
