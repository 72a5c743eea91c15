"""The steering page: features are pushed while the model writes, beside the model by itself and beside a random
direction of the same norm.

1. The address says what is pushed (`push`, or `named` for interventions that the workspace keeps) and how the model
   writes; `#steer-selection` holds it, the sliders and buttons change it, and `controls` draws them where more than a
   slider's value has changed.
2. Run puts the prompt into `#steer-request`; `start` hands both to the model worker.
3. `watch` polls the job: the texts as far as they are written, then the result.
"""

from typing import Any

from dash import ALL, ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.controls import define
from dashboards.components.jobs import one_at_a_time, standing
from dashboards.components.prompt_form import invitation, prompt_form, prompt_stores
from dashboards.components.steer_view import draw_controls, draw_result, draw_writing, suggestions
from dashboards.components.waiting import progress_bar
from dashboards.context import Context
from dashboards.links import View, steer_link
from dashboards.listing import FeatureQuery, listing
from dashboards.pages import Page
from dashboards.prompts import Asked
from dashboards.steering import MAX_PUSHED, Push, Steer, SteerJobs, pushes_text, suggested
from dashboards.worker import JobState
from scope.errors import ScopeError

__all__ = ["register", "render"]

Record = dict[str, Any]

POLL_MS = 300
SUGGESTED = 6
FAILED = "The model could not be steered"
GONE = "The result is no longer kept. Press Run to compute it again."
INVITATION = (
    "What does the model write when a feature is pushed? Add a feature, move its slider, and give a text to go on "
    "from, or take one of these:"
)
SAMPLES = ("I think that", "The weather today is", "Once upon a time there was a king who", "My favourite food is")


def render(context: Context, view: View) -> Page:
    """The page, with the prompt and what its address asks for."""
    entry = context.entry(view)
    asked = Asked.of(view.query)
    content = html.Div(
        id="selection-box",
        className="prompt-page steer-page",
        **{"data-store": "steer-selection"},
        children=[
            html.Header(className="page-head", children=[html.H1("Steer"), define("steering")]),
            html.Div(
                className="steer-top",
                children=[
                    prompt_form(asked, run="steer-run"),
                    html.Aside(
                        _controls(context, entry.id, view.query), id="steer-controls", **{"aria-label": "What is done"}
                    ),
                    html.Div(
                        className="steer-out",
                        children=[
                            progress_bar("steer"),
                            html.Div(id="steer-status"),
                            html.Div(_invitation() if asked.empty else [], id="steer-result"),
                        ],
                    ),
                ],
            ),
            *prompt_stores("steer", entry.id, view.query, POLL_MS, "job", "kept", "sent", "added", "name-sent"),
            dcc.Store(id="steer-drawn", data=_signature(view.query)),
        ],
    )
    return Page(content, "Steer", "steer", "" if view.index else steer_link(entry.id, **view.query))


def _invitation() -> html.Div:
    return invitation(INVITATION, SAMPLES)


def register(app: Dash, context: Context) -> None:
    """Sliders and settings, running, watching, keeping."""
    jobs = SteerJobs(context)
    _register_controls(app, context, jobs)
    _register_running(app, context, jobs)
    _register_watching(app, context)
    _register_adding(app, context)
    _register_saving(app, jobs)


def _signature(query: Record | None) -> Record:
    """What of an address the controls are drawn anew for: everything but where a slider stands."""
    wanted = Steer.of(query)
    return {
        "features": [push.feature for push in wanted.pushes],
        "rest": [wanted.named, wanted.n_tokens, wanted.temperature, wanted.during, wanted.freeze],
    }


def _controls(context: Context, index: str, query: Record | None) -> html.Div:
    wanted, jobs = Steer.of(query), SteerJobs(context)
    spec, problem = None, ""
    if wanted.named:
        try:
            spec = jobs.spec(index, wanted)
        except ScopeError as trouble:
            problem = str(trouble)
    return draw_controls(context.index(index), wanted, jobs.kept(), spec, problem)


def _register_controls(app: Dash, context: Context, jobs: SteerJobs) -> None:
    app.clientside_callback(
        ClientsideFunction("scope", "pushed"),
        Output({"type": "steer-times", "feature": ALL}, "children"),
        Input({"type": "steer-push", "feature": ALL}, "value"),
        State({"type": "steer-push", "feature": ALL}, "id"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("steer-controls", "children"),
        Output("steer-drawn", "data"),
        Input("steer-selection", "data"),
        Input("steer-kept", "data"),
        State("steer-drawn", "data"),
        State("steer-request", "data"),
        prevent_initial_call=True,
    )
    def controls(query: Record | None, kept: Record | None, drawn: Record | None, asked: Record) -> tuple[Any, Any]:
        now = {**_signature(query), "kept": (kept or {}).get("at")}
        if now == {"kept": None, **(drawn or {})}:
            raise PreventUpdate
        return _controls(context, asked["index"], query), now


def _register_running(app: Dash, context: Context, jobs: SteerJobs) -> None:
    app.clientside_callback(
        ClientsideFunction("scope", "runPrompt"),
        Output("steer-request", "data"),
        Output("steer-selection", "data"),
        Input("steer-run", "n_clicks"),
        State("steer-request", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("steer-job", "data"),
        Input("steer-request", "data"),
        State("steer-selection", "data"),
    )
    def start(asked: Record | None, query: Record | None) -> Record | None:
        prompt, wanted = Asked.of(asked), Steer.of(query)
        if not asked or prompt.empty:
            raise PreventUpdate
        shown = {"prompt": "" if prompt.chat else prompt.text}
        if wanted.empty and not asked.get("run"):
            raise PreventUpdate
        try:
            return {**shown, "id": jobs.submit(asked["index"], prompt, wanted).id}
        except ScopeError as problem:
            return {**shown, "problem": str(problem)}


def _register_watching(app: Dash, context: Context) -> None:
    @app.callback(
        Output("steer-progress", "hidden"),
        Output("steer-step", "children"),
        Output("steer-share", "style"),
        Output("steer-status", "children"),
        Output("steer-result", "children"),
        Output("steer-poll", "disabled"),
        Input("steer-poll", "n_intervals"),
        Input("steer-job", "data"),
        prevent_initial_call=True,
        running=one_at_a_time("steer-poll", POLL_MS),
    )
    def watch(_: int | None, now: Record | None) -> tuple[Any, ...]:
        if not now:
            raise PreventUpdate
        if now.get("problem"):
            return True, "", None, states.error(ScopeError(now["problem"]), FAILED), no_update, True
        job = context.worker.get(now["id"])
        if job is None:
            return True, "", None, states.error(ScopeError(GONE), "Not kept"), no_update, True
        if job.pending:
            written = draw_writing(now["prompt"], job.partial) if job.partial else states.skeleton(24, 150)
            return False, *standing(context.worker, job), None, written, False
        if job.state is JobState.CANCELLED:
            words = html.P("Cancelled. Run starts it again.", className="muted")
            return True, "", None, words, draw_writing(now["prompt"], job.partial or {}, stopped=True), True
        if job.error is not None:
            return True, "", None, states.error(job.error, FAILED), [], True
        try:
            drawn = draw_result(now["prompt"], job.result)
        except Exception as problem:
            return True, "", None, states.error(problem, "The result could not be shown"), [], True
        return True, "", None, None, drawn, True

    @app.callback(
        Output("steer-job", "data", allow_duplicate=True),
        Input("steer-cancel", "n_clicks"),
        State("steer-job", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, now: Record | None) -> Record:
        if not clicks or not now or "id" not in now:
            raise PreventUpdate
        context.worker.cancel(now["id"])
        return {**now, "cancelled": clicks}


def _register_adding(app: Dash, context: Context) -> None:
    @app.callback(
        Output("steer-added", "data"),
        Output("steer-answer", "children"),
        Input("steer-sent", "data"),
        State("steer-request", "data"),
        State("steer-selection", "data"),
        prevent_initial_call=True,
    )
    def add(sent: Record | None, asked: Record, query: Record | None) -> tuple[Any, Any]:
        text, wanted = str((sent or {}).get("text", "")).strip(), Steer.of(query)
        if not text:
            raise PreventUpdate
        index = context.index(asked["index"])
        if len(wanted.pushes) >= MAX_PUSHED:
            return no_update, html.Span(f"At most {MAX_PUSHED} features at once.", className="small", role="alert")
        try:
            if text.isascii() and text.isdigit():
                SteerJobs(context).maximum(index.id, int(text[:9]))
                pushes = (*wanted.pushes, Push(int(text), 1.0))
                return {"push": pushes_text(tuple({one.feature: one for one in pushes}.values())), "named": None}, ""
            found = suggested(index, [int(one) for one in listing(index, FeatureQuery.of({"q": text})).ids], text)
        except ScopeError as problem:
            return no_update, html.Span(str(problem), className="small", role="alert")
        if not found:
            return no_update, html.Span("No feature is called that or fires on it.", className="small", role="alert")
        return no_update, suggestions(index, found[:SUGGESTED])

    app.clientside_callback(
        ClientsideFunction("scope", "chooseTyped"),
        Output("steer-added", "storage_type"),
        Input("steer-added", "data"),
        prevent_initial_call=True,
    )


def _register_saving(app: Dash, jobs: SteerJobs) -> None:
    @app.callback(
        Output("steer-kept", "data"),
        Output("steer-saved", "children"),
        Input("steer-name-sent", "data"),
        State("steer-request", "data"),
        State("steer-selection", "data"),
        State("steer-kept", "data"),
        prevent_initial_call=True,
    )
    def save(sent: Record | None, asked: Record, query: Record | None, before: Record | None) -> tuple[Any, Any]:
        if not sent:
            raise PreventUpdate
        try:
            spec = jobs.save(asked["index"], Steer.of(query), str(sent["text"]))
        except (ScopeError, OSError) as problem:
            return no_update, html.Span(str(problem), role="alert")
        return {"at": (before or {}).get("at", 0) + 1, "name": spec.name}, no_update
