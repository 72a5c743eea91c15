"""The prompt page: text goes in, the features that fire on each token come out, and how they push a next token.

1. A text to run is in `#prompt-request`; `start` hands it to the model worker and keeps the jobs' ids.
2. `watch` polls them while they are pending: progress, cancel, errors; it bumps `#prompt-ready` when there is news.
3. `draw` shows what is known for the current selection (token, feature, target, order, colour), which is part of the
   address like the text itself.
"""

from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.controls import button
from dashboards.components.prompt_view import PromptView, Selection, draw_prompt
from dashboards.context import Context
from dashboards.format import duration, plural
from dashboards.links import View, prompt_link
from dashboards.pages import Page
from dashboards.prompts import PromptJobs, prompt_jobs
from dashboards.worker import Job, JobState
from scope.errors import ScopeError

__all__ = ["register", "render"]

Record = dict[str, Any]

POLL_MS = 400
TYPED_TIMEOUT = 20.0
"""Seconds to wait for a typed token to be looked up."""
SKELETON = (30, 56, 16, 28, 28, 28, 28)
"""Heights of what will stand there."""
FAILED = "The prompt could not be run"
SAMPLES = (
    "The opposite of hot is",
    "def area(radius):\n    return math.pi *",
    "Once upon a time there was a king who",
    "東京は日本の",
)


def render(context: Context, view: View) -> Page:
    """The page, with the text and the selection of its address."""
    entry = context.entry(view)
    text = view.get("text")
    content = html.Div(
        id="selection-box",
        className="prompt-page",
        children=[
            html.Header(className="page-head", children=[html.H1("Prompt")]),
            html.Div(
                className="prompt-form",
                children=[
                    dmc.Textarea(
                        id="prompt-text",
                        value=text,
                        placeholder="Type a text to run through the model",
                        autosize=True,
                        minRows=2,
                        maxRows=10,
                        attributes={"input": {"aria-label": "Prompt", "data-focus": "prompt", "spellcheck": "false"}},
                    ),
                    html.Div(
                        className="chips",
                        children=[
                            button("Run", id="prompt-run", className="main-action", **{"data-run": "true"}),
                            html.Span([html.Kbd("Ctrl"), " ", html.Kbd("Enter")], className="muted small keys-hint"),
                        ],
                    ),
                ],
            ),
            _progress(),
            html.Div(id="prompt-status"),
            html.Div(states.skeleton(*SKELETON) if text else _invitation(), id="prompt-result"),
            dcc.Store(id="prompt-request", data={"index": entry.id, "text": text}),
            dcc.Store(id="prompt-selection", data=view.query),
            dcc.Store(id="prompt-jobs"),
            dcc.Store(id="prompt-ready"),
            dcc.Store(id="prompt-typed"),
            dcc.Interval(id="prompt-poll", interval=POLL_MS, disabled=True),
        ],
    )
    return Page(content, "Prompt", "prompt", "" if view.index else prompt_link(entry.id, **view.query))


def _invitation() -> html.Div:
    return html.Div(
        className="state",
        children=[
            html.P(
                "Which features fire on each token, and which next token do they push? Type a text, or start with:",
                className="muted",
            ),
            html.Div(
                [button(sample.replace("\n", " ⏎ "), **{"data-sample": sample}) for sample in SAMPLES],
                className="chips",
            ),
        ],
    )


def register(app: Dash, context: Context) -> None:
    """Running, watching, drawing, and typing a next token."""
    jobs = prompt_jobs(context)
    _register_running(app, jobs)
    _register_watching(app, context)
    _register_drawing(app, context, jobs)
    _register_typed(app, context, jobs)


def _register_running(app: Dash, jobs: PromptJobs) -> None:
    """From the text to jobs of the worker."""
    app.clientside_callback(
        ClientsideFunction("scope", "runPrompt"),
        Output("prompt-request", "data"),
        Output("prompt-selection", "data"),
        Input("prompt-run", "n_clicks"),
        State("prompt-request", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("prompt-jobs", "data"),
        Output("prompt-poll", "disabled"),
        Input("prompt-request", "data"),
        Input("prompt-selection", "data"),
        State("prompt-jobs", "data"),
    )
    def start(asked: Record | None, query: dict[str, str] | None, now: Record | None) -> tuple[Any, Any]:
        if not asked or not (asked.get("text") or "").strip():
            return {"text": ""}, True
        index, text, target = asked["index"], asked["text"], Selection.of(query).target
        wanted: Record = {"index": index, "text": text, "target": target, "run": asked.get("run", 0)}
        if now and {name: now.get(name) for name in wanted} == wanted:
            raise PreventUpdate
        try:
            wanted["analysis"] = jobs.submit_analysis(index, text).id
            wanted["push"] = jobs.submit_push(index, text, target).id if target is not None else None
        except ScopeError as problem:
            wanted["problem"] = str(problem)
        return wanted, False


def _register_watching(app: Dash, context: Context) -> None:
    """Progress and cancel, while there is something to wait for."""

    @app.callback(
        Output("prompt-progress", "hidden"),
        Output("prompt-step", "children"),
        Output("prompt-share", "style"),
        Output("prompt-status", "children"),
        Output("prompt-ready", "data"),
        Output("prompt-poll", "disabled", allow_duplicate=True),
        Input("prompt-poll", "n_intervals"),
        Input("prompt-jobs", "data"),
        State("prompt-ready", "data"),
        prevent_initial_call=True,
    )
    def watch(_: int | None, asked: Record | None, ready: Record | None) -> tuple[Any, ...]:
        if not asked:
            raise PreventUpdate
        if asked.get("problem"):
            return True, "", None, states.error(ScopeError(asked["problem"]), FAILED), no_update, True
        known = {name: context.worker.get(asked[name]) for name in ("analysis", "push") if asked.get(name)}
        news = {"text": asked["text"], "states": {name: job.state if job else "gone" for name, job in known.items()}}
        changed = news if news != ready else no_update
        waiting = [job for job in known.values() if job is not None and job.pending]
        if waiting:
            return False, *_step(context, waiting[0]), None, changed, False
        return True, "", None, _trouble(list(known.values())), changed, True

    @app.callback(
        Output("prompt-jobs", "data", allow_duplicate=True),
        Input("prompt-cancel", "n_clicks"),
        State("prompt-jobs", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, asked: Record | None) -> Any:
        if not clicks or not asked:
            raise PreventUpdate
        for name in ("analysis", "push"):
            if asked.get(name):
                context.worker.cancel(asked[name])
        return {**asked, "cancelled": True}


def _register_drawing(app: Dash, context: Context, jobs: PromptJobs) -> None:
    """What is known, for what is selected."""

    @app.callback(
        Output("prompt-result", "children"),
        Input("prompt-ready", "data"),
        Input("prompt-selection", "data"),
        State("prompt-request", "data"),
        State("prompt-jobs", "data"),
        prevent_initial_call=True,
    )
    def draw(_: Any, query: dict[str, str] | None, asked: Record | None, now: Record | None) -> Any:
        if not asked or not (asked.get("text") or "").strip():
            return _invitation()
        index, text, selection = asked["index"], asked["text"], Selection.of(query)
        analysis = jobs.analysis(index, text)
        if analysis is None:
            job = context.worker.get((now or {}).get("analysis", ""))
            return states.skeleton(*SKELETON) if job is not None and job.pending else []
        try:
            push = jobs.push(index, text, selection.target)
            return draw_prompt(PromptView(context.index(index), analysis, push, selection))
        except Exception as problem:
            return states.error(problem, "This prompt could not be shown")


def _register_typed(app: Dash, context: Context, jobs: PromptJobs) -> None:
    """A typed next token becomes the target."""

    @app.callback(
        Output("prompt-typed", "data"),
        Output("prompt-typed-answer", "children"),
        Input("prompt-target-text", "n_submit"),
        State("prompt-target-text", "value"),
        State("prompt-request", "data"),
        prevent_initial_call=True,
    )
    def typed(submits: int | None, value: str | None, asked: Record) -> tuple[Any, Any]:
        if not submits or not value:
            raise PreventUpdate
        job = jobs.submit_typed(asked["index"], value)
        context.worker.wait(job, TYPED_TIMEOUT)
        if job.state is not JobState.DONE:
            problem = job.error or TimeoutError("The model is busy with another request. Try again in a moment.")
            return no_update, html.Span(str(problem), className="small", role="alert")
        return {"target": job.result.choices[0][0]}, ""

    app.clientside_callback(
        ClientsideFunction("scope", "chooseTyped"),
        Output("prompt-typed", "storage_type"),
        Input("prompt-typed", "data"),
        prevent_initial_call=True,
    )


def _progress() -> html.Div:
    """Stands still while its content changes: a button that is drawn anew each time cannot be pressed."""
    return html.Div(
        id="prompt-progress",
        className="progress",
        role="status",
        hidden=True,
        children=[
            html.Div(html.I(id="prompt-share"), className="progress-track"),
            html.Span(id="prompt-step", className="small muted"),
            button("Cancel", id="prompt-cancel"),
        ],
    )


def _step(context: Context, job: Job) -> tuple[str, dict[str, str]]:
    """What a job is doing, in words, and how far it is as the style of the bar."""
    ahead = context.worker.position(job)
    step = f"{plural(ahead, 'request')} before this one" if job.state is JobState.QUEUED and ahead else job.step
    style = {"width": f"{100 * job.done / job.total:.0f}%", "animation": "none", "left": "0"} if job.total else {}
    return f"{step[:1].upper()}{step[1:]} … {duration(job.seconds)}", style


def _trouble(known: list[Job | None]) -> Any:
    for job in known:
        if job is None:
            return states.error(ScopeError("The result is no longer kept. Press Run to compute it again."), "Not kept")
        if job.state is JobState.CANCELLED:
            return html.P("Cancelled. Run starts it again.", className="muted")
        if job.error is not None:
            return states.error(job.error, FAILED)
    return None
