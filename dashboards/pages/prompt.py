"""The prompt page: text or a chat goes in, the features that fire on each token come out, and how they push a next
token; or two prompts beside each other.

1. What to run is in `#prompt-request`; `start` hands it to the model worker and keeps the jobs' ids.
2. `watch` polls them while they are pending: progress, cancel, errors; it bumps `#prompt-ready` when there is news.
3. `draw` shows what is known for the current selection (tokens, features, target, order, pins), which is part of the
   address like the prompts themselves.
"""

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import prompt_files, states
from dashboards.components.jobs import one_at_a_time, standing
from dashboards.components.prompt_form import invitation, prompt_form, prompt_stores
from dashboards.components.prompt_pair import PairView, draw_pair, selected_pair
from dashboards.components.prompt_state import PromptView, Selection
from dashboards.components.prompt_view import draw_prompt
from dashboards.components.waiting import progress_bar, trouble_of
from dashboards.context import Context
from dashboards.links import View, prompt_link
from dashboards.pages import Page
from dashboards.prompts import Asked, PromptJobs, prompt_jobs
from dashboards.pushes import PushJobs
from dashboards.uploads import uploads_of
from dashboards.worker import Job, JobState
from scope.errors import ScopeError

__all__ = ["register", "render"]

Record = dict[str, Any]

POLL_MS = 400
TYPED_TIMEOUT = 60.0
"""Seconds to wait for a typed token to be looked up."""
SKELETON = (30, 56, 16, 28, 28, 28, 28)
"""Heights of what will stand there."""
FAILED = "The prompt could not be run"
INVITATION = "Which features fire on each token, and which next token do they push? Type a text, or start with:"
SAMPLES: tuple[str | tuple[str, str], ...] = (
    "The opposite of hot is",
    "def area(radius):\n    return math.pi *",
    "Once upon a time there was a king who",
    "東京は日本の",
    ("The capital of France is", "The capital of Japan is"),
)


def render(context: Context, view: View) -> Page:
    """The page, with the prompts and the selection of its address."""
    entry = context.entry(view)
    first, second = Asked.of(view.query), Asked.of(view.query, "2")
    takes_files = bool(context.index(entry.id).modalities)
    files = uploads_of(context).named(first.media) if takes_files else None
    content = html.Div(
        id="selection-box",
        className="prompt-page",
        **{"data-store": "prompt-selection"},
        children=[
            html.Header(className="page-head", children=[html.H1("Prompt")]),
            prompt_form(first, second, files=files),
            progress_bar("prompt"),
            html.Div(id="prompt-status"),
            html.Div(states.skeleton(*SKELETON) if not first.empty else _invitation(), id="prompt-result"),
            *prompt_stores("prompt", entry.id, view.query, POLL_MS, "jobs", "ready", "drawn", "sent", "typed"),
        ],
    )
    return Page(content, "Prompt", "prompt", "" if view.index else prompt_link(entry.id, **view.query))


def _invitation() -> html.Div:
    return invitation(INVITATION, SAMPLES)


def register(app: Dash, context: Context) -> None:
    """Running, watching, drawing, and typing a next token."""
    jobs = prompt_jobs(context)
    pushes = PushJobs(context)
    _register_running(app, jobs, pushes)
    _register_watching(app, context, jobs)
    _register_drawing(app, context, jobs, pushes)
    _register_typed(app, context, jobs)
    prompt_files.register(app, context)


def _register_running(app: Dash, jobs: PromptJobs, pushes: PushJobs) -> None:
    """From the prompts to jobs of the worker."""
    app.clientside_callback(
        ClientsideFunction("scope", "runPrompt"),
        Output("prompt-request", "data"),
        Output("prompt-selection", "data"),
        Input("prompt-run", "n_clicks"),
        State("prompt-request", "data"),
        State("prompt-files", "data", allow_optional=True),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("prompt-jobs", "data"),
        Output("prompt-poll", "disabled"),
        Input("prompt-request", "data"),
        Input("prompt-selection", "data"),
        State("prompt-jobs", "data"),
    )
    def start(asked: Record | None, query: Record | None, now: Record | None) -> tuple[Any, Any]:
        first, second = Asked.of(asked), Asked.of(asked, "2")
        if not asked or first.empty:
            return {"asked": None}, True
        index, selection = asked["index"], Selection.of(query)
        looked_at = [*(selection.push or [])] if second.empty else [selection.token, selection.token2]
        wanted: Record = {"asked": asked, "looked_at": looked_at}
        if now and {name: now.get(name) for name in wanted} == wanted:
            raise PreventUpdate
        try:
            known = {"analysis": jobs.submit_analysis(index, first)}
            if not second.empty:
                known["second"] = jobs.submit_analysis(index, second)
            elif selection.push is not None:
                known["push"] = pushes.submit(index, first, selection.push)
            wanted["ids"] = {name: job.id for name, job in known.items()}
        except ScopeError as problem:
            wanted["problem"] = str(problem)
        return wanted, False


def _next_job(jobs: PromptJobs, now: Record) -> Job | None:
    """What comes next after the places that are looked at, of two prompts that have both been run."""
    asked = now["asked"]
    first, second = Asked.of(asked), Asked.of(asked, "2")
    a, b = jobs.analysis(asked["index"], first), jobs.analysis(asked["index"], second)
    if second.empty or a is None or b is None:
        return None
    token, token2 = now["looked_at"]
    pairs = jobs.comparison(a, b).pairs
    places = selected_pair(Selection(token=token, token2=token2), pairs, a.n_tokens, b.n_tokens)
    return jobs.submit_distributions(asked["index"], first, places[0], second, places[1])


def _register_watching(app: Dash, context: Context, jobs: PromptJobs) -> None:
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
        running=one_at_a_time("prompt-poll", POLL_MS),
    )
    def watch(_: int | None, now: Record | None, ready: Record | None) -> tuple[Any, ...]:
        if not now:
            raise PreventUpdate
        if now.get("problem"):
            return True, "", None, states.error(ScopeError(now["problem"]), FAILED), no_update, True
        known = {name: context.worker.get(id) for name, id in now.get("ids", {}).items()}
        further = (ready or {}).get("further") if (ready or {}).get("ids") == now.get("ids") else None
        looked_at = now.get("looked_at")
        if further and further["looked_at"] == looked_at:
            known["next"] = context.worker.get(further["id"])
        elif known and all(job is not None and job.state is JobState.DONE for job in known.values()):
            job = _next_job(jobs, now)
            further = None if job is None else {"looked_at": looked_at, "id": job.id}
            known |= {} if job is None else {"next": job}
        news = {
            "ids": now.get("ids"),
            "states": {name: job.state if job else "gone" for name, job in known.items()},
            "further": further,
        }
        changed = news if news != ready else no_update
        waiting = [job for job in known.values() if job is not None and job.pending]
        if waiting:
            return False, *standing(context.worker, waiting[0]), None, changed, False
        return True, "", None, trouble_of(known.values(), FAILED), changed, True

    @app.callback(
        Output("prompt-jobs", "data", allow_duplicate=True),
        Input("prompt-cancel", "n_clicks"),
        State("prompt-jobs", "data"),
        State("prompt-ready", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, now: Record | None, ready: Record | None) -> Any:
        if not clicks or not now:
            raise PreventUpdate
        further = ((ready or {}).get("further") or {}).get("id")
        for id in [*now.get("ids", {}).values(), *([further] if further else [])]:
            context.worker.cancel(id)
        return {**now, "cancelled": True}


def _register_drawing(app: Dash, context: Context, jobs: PromptJobs, pushes: PushJobs) -> None:
    """What is known, for what is selected; drawn anew only where there is more to show, since what is drawn anew cannot
    be clicked or typed into meanwhile."""

    @app.callback(
        Output("prompt-result", "children"),
        Output("prompt-drawn", "data"),
        Input("prompt-ready", "data"),
        Input("prompt-selection", "data"),
        State("prompt-request", "data"),
        State("prompt-jobs", "data"),
        State("prompt-drawn", "data"),
        prevent_initial_call=True,
    )
    def draw(_: Any, query: Record | None, asked: Record | None, now: Record | None, drawn: Any) -> tuple[Any, Any]:
        first, second = Asked.of(asked), Asked.of(asked, "2")
        if not asked or first.empty:
            return _invitation(), None
        try:
            view = _view(context, jobs, pushes, asked["index"], first, second, Selection.of(query))
            known = [context.worker.get(id) for id in ((now or {}).get("ids") or {}).values()]
            failed = view is None and any(
                job is None or job.state in (JobState.FAILED, JobState.CANCELLED) for job in known
            )
            more = view.distributions if isinstance(view, PairView) else view.push if view is not None else None
            shown = [asked, query, view is not None, more is not None, failed]
            if shown != drawn:
                return _drawn(view, failed), shown
        except Exception as problem:
            return states.error(problem, "This prompt could not be shown"), None
        raise PreventUpdate


def _drawn(view: PromptView | PairView | None, failed: bool) -> Any:
    if view is None:
        return [] if failed else states.skeleton(*SKELETON)
    return draw_pair(view) if isinstance(view, PairView) else draw_prompt(view)


def _view(
    context: Context,
    jobs: PromptJobs,
    pushes: PushJobs,
    index: str,
    first: Asked,
    second: Asked,
    selection: Selection,
) -> PromptView | PairView | None:
    """What is known of the result; None where that is too little to show."""
    a = jobs.analysis(index, first)
    opened = context.index(index)
    if a is None:
        return None
    if second.empty:
        return PromptView(opened, a, pushes.found(index, first, selection.push), selection)
    b = jobs.analysis(index, second)
    if b is None:
        return None
    sides = (PromptView(opened, a, None, selection), PromptView(opened, b, None, selection))
    view = PairView(*sides, jobs.comparison(a, b), None)
    known = jobs.distributions(index, first, view.places[0], second, view.places[1])
    return PairView(*sides, view.comparison, known)


def _register_typed(app: Dash, context: Context, jobs: PromptJobs) -> None:
    """A typed next token becomes the target."""

    @app.callback(
        Output("prompt-typed", "data"),
        Output("prompt-typed-answer", "children"),
        Input("prompt-sent", "data"),
        State("prompt-request", "data"),
        prevent_initial_call=True,
    )
    def typed(sent: Record | None, asked: Record) -> tuple[Any, Any]:
        if not sent or not sent["text"]:
            raise PreventUpdate
        job = jobs.submit_typed(asked["index"], str(sent["text"]))
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
