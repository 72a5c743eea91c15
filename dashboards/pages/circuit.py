"""Circuit graphs: all of a workspace and the form that makes one, or one of them, drawn.

1. Without a graph in its address the page lists them. `#circuit-make-run` hands what stands in the form to the model
   worker; when the graph is there its page opens.
2. With one (`graph`), assets/49_circuit_page.js fetches it at the thresholds of the address and draws it; what is
   pinned and hidden is in the address, supernodes go into the workspace (`#circuit-groups`).
3. Verifying, which heads carry an edge or write what a node reads, and which layers a node writes (`#circuit-edge`,
   with two ends, a target alone or a source alone), and why a head looked where it did
   (`#circuit-head`), and testing an edge in the model (`#circuit-test-run`), are jobs of the same worker.
"""

import re
from typing import Any

from dash import Dash, Input, Output, State, html
from dash.exceptions import PreventUpdate

from dashboards.circuit_jobs import HeadPlace, MakeRequest, circuit_jobs
from dashboards.circuits import circuits, thresholds_of
from dashboards.components import states
from dashboards.components.charts import theme_of_request
from dashboards.components.circuit_attention import heads, pairs
from dashboards.components.circuit_edge import tested
from dashboards.components.circuit_view import (
    PAGE_FEATURES,
    graph_table,
    graph_view,
    make_form,
    missing_part,
    verification,
)
from dashboards.components.circuit_writes import writes
from dashboards.components.controls import define, link_button
from dashboards.components.progress import Asked, register_progress
from dashboards.context import Context
from dashboards.dictionaries import dictionaries
from dashboards.links import View, circuit_link
from dashboards.pages import Page
from dashboards.steering import SteerJobs
from dashboards.worker import Job
from scope.errors import ScopeError

__all__ = ["register", "render"]

WHAT = (
    "A graph of what the model computed on the way to its next token: which features of which layers were read off the "
    "tokens, and which raised or lowered which, as exact effects in a copy of the model that is linear."
)


def render(context: Context, view: View) -> Page:
    """The page of one graph, or of all."""
    known = circuits(context)
    id = view.get("graph")
    if not id:
        return Page(_overview(context), "Circuits", "circuit")
    entry = known.entry(id)
    if entry.problem is not None:
        raise ScopeError(entry.problem)
    graph = known.graph(entry.id)
    thresholds = thresholds_of(view.query, known.default(entry.id))
    missing = missing_part(known.missing(graph), len(graph.transcoders), str(context.workspace.path))
    content = graph_view(entry, graph, thresholds, _verified(context, entry.id), missing)
    return Page(content, entry.name, "circuit", "" if id == entry.id else circuit_link(entry.id, **_rest(view)))


def _rest(view: View) -> dict[str, str]:
    return {name: value for name, value in view.query.items() if name != "graph"}


def _overview(context: Context) -> html.Div:
    known = circuits(context)
    entries = known.entries()
    verified = {entry.id for entry in entries if context.workspace.verification_path(entry.id).is_file()}
    return html.Div(
        className="circuit-page",
        children=[
            html.Header([html.H1("Circuits"), define("circuit_graph")], className="page-head"),
            html.P(WHAT, className="muted circuit-words"),
            graph_table(entries, verified) if entries else html.P("There is no graph yet.", className="muted"),
            make_form(dictionaries(context), str(context.workspace.path), SteerJobs(context).kept()),
        ],
    )


def _verified(context: Context, id: str) -> Any:
    """What verifying a graph has found, where someone has."""
    try:
        found, judged = circuits(context).verification(id), circuits(context).verdicts(id)
    except ScopeError as problem:
        return states.error(problem, "The verification could not be read")
    if found is None or judged is None:
        return None
    return verification(found, judged, theme_of_request())


def register(app: Dash, context: Context) -> None:
    """Making, verifying, grouping, and what explains attention."""
    _register_making(app, context)
    _register_verifying(app, context)
    _register_heads(app, context)
    _register_pairs(app, context)
    _register_testing(app, context)

    @app.callback(Output("circuit-saved", "data"), Input("circuit-groups", "data"), prevent_initial_call=True)
    def group(asked: Asked | None) -> Any:
        if not asked:
            raise PreventUpdate
        circuits(context).group(asked["graph"], asked["supernodes"])
        return asked["at"]


def _register_making(app: Dash, context: Context) -> None:
    @app.callback(
        Output("circuit-make-job", "data"),
        Input("circuit-make-run", "n_clicks"),
        State("circuit-prompt", "value"),
        State("circuit-transcoders", "value"),
        State("circuit-targets", "value"),
        State("circuit-max-features", "value"),
        State("circuit-interventions", "value"),
        prevent_initial_call=True,
    )
    def make(
        clicks: int | None,
        prompt: str | None,
        chosen: list[str] | None,
        targets: str | None,
        most: Any,
        interventions: str | None,
    ) -> Asked:
        if not clicks:
            raise PreventUpdate
        wanted = tuple(part for part in re.split(r",(?=\S|\s+\S)", targets or "") if part.strip())
        features = int(most) if isinstance(most, int | float) else PAGE_FEATURES
        try:
            request = MakeRequest(prompt or "", tuple(chosen or ()), wanted, features, interventions or "")
            job = circuit_jobs(context).submit_make(request)
        except ScopeError as problem:
            return {"problem": str(problem), "run": clicks}
        return {"id": job.id, "run": clicks}

    def made(asked: Asked, job: Job) -> Any:
        address = circuit_link(job.result)
        words = ["The graph is made. ", link_button("Open it", href=address)]
        return html.P(words, **{"data-go": address})

    register_progress(app, context.worker, "circuit-make", made, "The graph could not be made")


def _register_verifying(app: Dash, context: Context) -> None:
    @app.callback(
        Output("circuit-verify-job", "data"),
        Input("circuit-verify-run", "n_clicks"),
        State("circuit-view", "data"),
        prevent_initial_call=True,
    )
    def start(clicks: int | None, view: Asked | None) -> Asked:
        if not clicks or not view:
            raise PreventUpdate
        try:
            job = circuit_jobs(context).submit_verify(view["graph"])
        except ScopeError as problem:
            return {"problem": str(problem), "run": clicks}
        return {"id": job.id, "run": clicks}

    register_progress(
        app,
        context.worker,
        "circuit-verify",
        lambda asked, job: html.Div(_verified(context, job.result), **{"data-verified": job.result}),
        "The graph could not be verified",
    )

    @app.callback(
        Output("circuit-verify-result", "children", allow_duplicate=True),
        Input("theme-now", "data"),
        State("circuit-view", "data"),
        prevent_initial_call=True,
    )
    def redraw(_: str | None, view: Asked | None) -> Any:
        drawn = _verified(context, view["graph"]) if view else None
        if drawn is None:
            raise PreventUpdate
        return drawn


def _register_heads(app: Dash, context: Context) -> None:
    @app.callback(Output("circuit-heads-job", "data"), Input("circuit-edge", "data"), prevent_initial_call=True)
    def start(asked: Asked | None) -> Asked:
        if not asked:
            raise PreventUpdate
        try:
            jobs = circuit_jobs(context)
            if asked["target"]:
                job = jobs.submit_heads(asked["graph"], asked["source"], asked["target"])
            else:
                job = jobs.submit_writes(asked["graph"], asked["source"])
        except ScopeError as problem:
            return {**asked, "problem": str(problem)}
        return {**asked, "id": job.id}

    def found(asked: Asked, job: Job) -> Any:
        graph = circuits(context).graph(asked["graph"])
        if not asked["target"]:
            logits = graph.nodes[graph.nodes["kind"] == "logit"]
            likeliest = str(logits["label"].iloc[int(logits["probability"].to_numpy().argmax())])
            return writes(job.result, str(asked.get("words", "")), likeliest)
        query = int(graph.nodes["position"].iloc[circuits(context).number(asked["graph"], asked["target"])])
        return heads(job.result, str(asked.get("words", "")), graph.tokens, query, of_edge=bool(asked["source"]))

    register_progress(app, context.worker, "circuit-heads", found, "What was asked of the node could not be found")


def _register_pairs(app: Dash, context: Context) -> None:
    @app.callback(Output("circuit-pairs-job", "data"), Input("circuit-head", "data"), prevent_initial_call=True)
    def start(asked: Asked | None) -> Asked:
        if not asked:
            raise PreventUpdate
        try:
            job = circuit_jobs(context).submit_pairs(asked["graph"], HeadPlace.parse(asked["head"]))
        except ScopeError as problem:
            return {**asked, "problem": str(problem)}
        return {**asked, "id": job.id}

    def found(asked: Asked, job: Job) -> Any:
        known = circuits(context)
        graph = known.graph(asked["graph"])
        table = job.result.table
        ends = {
            side: [
                (layer, feature) if kind == "feature" else None
                for kind, layer, feature in zip(
                    *(table[f"{side}_{name}"].tolist() for name in ("kind", "layer", "feature")), strict=True
                )
            ]
            for side in ("query", "key")
        }
        names = {side: known.names(graph, features) for side, features in ends.items()}
        indexes = {layer: index.id for layer, index in known.indexes(graph).items()}
        return pairs(job.result, HeadPlace.parse(asked["head"]), graph.tokens, names, indexes)

    register_progress(app, context.worker, "circuit-pairs", found, "Why the head looked there could not be found")


def _register_testing(app: Dash, context: Context) -> None:
    def drawn(edge: Asked) -> Any:
        """What testing an edge has shown, where someone has tested it."""
        known = circuits(context)
        try:
            found, judged = known.edge_tests(edge["graph"]), known.edge_verdicts(edge["graph"])
            ends = [known.number(edge["graph"], edge[name]) for name in ("source", "target")]
        except ScopeError as problem:
            return states.error(problem, "What was tested could not be read")
        return None if found is None or judged is None else tested(found, judged, *ends)

    @app.callback(
        Output("circuit-test-part", "hidden"),
        Output("circuit-test-result", "children", allow_duplicate=True),
        Input("circuit-edge", "data"),
        prevent_initial_call=True,
    )
    def chosen(edge: Asked | None) -> Any:
        if not edge or not edge["source"] or not edge["target"]:
            return True, None
        return False, drawn(edge)

    @app.callback(
        Output("circuit-test-job", "data"),
        Input("circuit-test-run", "n_clicks"),
        State("circuit-edge", "data"),
        prevent_initial_call=True,
    )
    def start(clicks: int | None, edge: Asked | None) -> Asked:
        if not clicks or not edge or not edge["source"] or not edge["target"]:
            raise PreventUpdate
        try:
            job = circuit_jobs(context).submit_test(edge["graph"], edge["source"])
        except ScopeError as problem:
            return {**edge, "problem": str(problem), "run": clicks}
        return {**edge, "id": job.id, "run": clicks}

    def done(asked: Asked, job: Job) -> Any:
        return html.Div(drawn(asked), **{"data-verified": job.result})

    register_progress(app, context.worker, "circuit-test", done, "The edge could not be tested")
