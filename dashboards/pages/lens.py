"""The logit lens: what the model would say next after each layer, at each token.

1. What to run is in `#lens-request`, as on the prompt page; `start` hands it to the model worker: the lens at all
   positions, then, once that is known, the followed tokens at the selected position, and at all positions the token
   whose probability or rank the cells show.
2. `watch` polls the jobs, and `draw` shows what is known for the current selection, which is part of the address.
"""

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.charts import theme_of_request
from dashboards.components.controls import define
from dashboards.components.jobs import one_at_a_time, standing
from dashboards.components.lens_view import LensSelection, LensView, draw_lens
from dashboards.components.prompt_form import invitation, prompt_form, prompt_stores
from dashboards.components.waiting import progress_bar, trouble_of
from dashboards.context import Context
from dashboards.links import View, lens_link
from dashboards.pages import Page
from dashboards.prompts import MAX_LENS_TOKENS, Asked, PromptJobs, prompt_jobs
from dashboards.worker import Job, JobState
from scope.errors import ScopeError

__all__ = ["register", "render"]

Record = dict[str, Any]

POLL_MS = 400
TYPED_TIMEOUT = 60.0
"""Seconds to wait for a typed token to be looked up."""
SKELETON = (30, 420, 30, 320)
FAILED = "The logit lens could not be run"
INVITATION = (
    "At which layer does the model know what comes next? Each layer's residual stream is read as if it were the last. "
    f"Type a text of up to {MAX_LENS_TOKENS} tokens, or start with:"
)
SAMPLES = ("The opposite of hot is", "def area(radius):\n    return math.pi *", "東京は日本の")


def render(context: Context, view: View) -> Page:
    """The page, with the prompt and the selection of its address."""
    entry = context.entry(view)
    asked = Asked.of(view.query)
    content = html.Div(
        id="selection-box",
        className="prompt-page lens-page",
        **{"data-store": "lens-selection"},
        children=[
            html.Header(className="page-head", children=[html.H1("Logit lens"), define("lens")]),
            prompt_form(asked, run="lens-run"),
            progress_bar("lens"),
            html.Div(id="lens-status"),
            html.Div(states.skeleton(*SKELETON) if not asked.empty else _invitation(), id="lens-result"),
            *prompt_stores("lens", entry.id, view.query, POLL_MS, "jobs", "ready", "drawn", "sent", "typed"),
        ],
    )
    return Page(content, "Logit lens", "lens", "" if view.index else lens_link(entry.id, **view.query))


def _invitation() -> html.Div:
    return invitation(INVITATION, SAMPLES)


def register(app: Dash, context: Context) -> None:
    """Running, watching, drawing, and typing a token to follow."""
    jobs = prompt_jobs(context)
    _register_running(app, jobs)
    _register_watching(app, context, jobs)
    _register_drawing(app, context, jobs)
    _register_typed(app, context, jobs)


def _register_running(app: Dash, jobs: PromptJobs) -> None:
    app.clientside_callback(
        ClientsideFunction("scope", "runPrompt"),
        Output("lens-request", "data"),
        Output("lens-selection", "data"),
        Input("lens-run", "n_clicks"),
        State("lens-request", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("lens-jobs", "data"),
        Output("lens-poll", "disabled"),
        Input("lens-request", "data"),
        Input("lens-selection", "data"),
        State("lens-jobs", "data"),
    )
    def start(asked: Record | None, query: Record | None, now: Record | None) -> tuple[Any, Any]:
        prompt, selection = Asked.of(asked), LensSelection.of_query(query)
        if not asked or prompt.empty:
            return {"asked": None}, True
        names = ("sae", "token", "follow", "show", "of")
        wanted: Record = {"asked": asked, "looked_at": {name: (query or {}).get(name) for name in names}}
        if now and {name: now.get(name) for name in wanted} == wanted:
            raise PreventUpdate
        try:
            wanted["id"] = jobs.submit_lens(asked["index"], prompt, selection.mode).id
        except ScopeError as problem:
            wanted["problem"] = str(problem)
        return wanted, False


def _further(jobs: PromptJobs, now: Record) -> list[Job]:
    """What is wanted besides the lens itself, once that is known: the followed tokens at the selected position, and
    everywhere the one whose probability or rank the cells show."""
    index, asked, selection = now["asked"]["index"], Asked.of(now["asked"]), LensSelection.of_query(now["looked_at"])
    lens = jobs.lens(index, asked, selection.mode)
    if lens is None:
        return []
    position = selection.position(len(lens.tokens))
    followed = selection.followed(lens)
    wanted: list[tuple[Any, tuple[int, ...], int | None]] = [(selection.mode, followed, position)]
    if selection.mode:
        wanted.append(("", followed, position))
    shown = selection.shown_token(lens)
    if shown is not None:
        wanted.append((selection.mode, (shown,), None))
    return [jobs.submit_lens(index, asked, *one) for one in wanted]


def _register_watching(app: Dash, context: Context, jobs: PromptJobs) -> None:
    @app.callback(
        Output("lens-progress", "hidden"),
        Output("lens-step", "children"),
        Output("lens-share", "style"),
        Output("lens-status", "children"),
        Output("lens-ready", "data"),
        Output("lens-poll", "disabled", allow_duplicate=True),
        Input("lens-poll", "n_intervals"),
        Input("lens-jobs", "data"),
        State("lens-ready", "data"),
        prevent_initial_call=True,
        running=one_at_a_time("lens-poll", POLL_MS),
    )
    def watch(_: int | None, now: Record | None, ready: Record | None) -> tuple[Any, ...]:
        if not now:
            raise PreventUpdate
        if now.get("problem"):
            return True, "", None, states.error(ScopeError(now["problem"]), FAILED), no_update, True
        known = [context.worker.get(id) for id in _ids(now)]
        further = (ready or {}).get("further") or {}
        if further and further.get("looked_at") == now.get("looked_at") and further.get("id") == now.get("id"):
            known += [context.worker.get(id) for id in further["ids"]]
        elif all(job is not None and job.state is JobState.DONE for job in known):
            more = _further(jobs, now)
            further = {"looked_at": now.get("looked_at"), "id": now.get("id"), "ids": [job.id for job in more]}
            known += more
        news = {"id": now.get("id"), "states": [job.state if job else "gone" for job in known], "further": further}
        changed = news if news != ready else no_update
        waiting = [job for job in known if job is not None and job.pending]
        if waiting:
            return False, *standing(context.worker, waiting[0]), None, changed, False
        return True, "", None, trouble_of(known, FAILED), changed, True

    @app.callback(
        Output("lens-jobs", "data", allow_duplicate=True),
        Input("lens-cancel", "n_clicks"),
        State("lens-jobs", "data"),
        State("lens-ready", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, now: Record | None, ready: Record | None) -> Any:
        if not clicks or not now:
            raise PreventUpdate
        for id in [*_ids(now), *((ready or {}).get("further") or {}).get("ids", [])]:
            context.worker.cancel(id)
        return {**now, "cancelled": True}


def _register_drawing(app: Dash, context: Context, jobs: PromptJobs) -> None:
    """What is known, for what is selected; drawn anew only where there is more to show, as on the prompt page."""

    @app.callback(
        Output("lens-result", "children"),
        Output("lens-drawn", "data"),
        Input("lens-ready", "data"),
        Input("lens-selection", "data"),
        Input("theme-now", "data"),
        State("lens-request", "data"),
        State("lens-jobs", "data"),
        State("lens-drawn", "data"),
        prevent_initial_call=True,
    )
    def draw(
        _: Any, query: Record | None, theme: str, asked: Record | None, now: Record | None, drawn: Any
    ) -> tuple[Any, Any]:
        prompt, selection = Asked.of(asked), LensSelection.of_query(query)
        if not asked or prompt.empty:
            return _invitation(), None
        try:
            lens = jobs.lens(asked["index"], prompt, selection.mode)
            view = _view(jobs, asked["index"], prompt, selection, lens) if lens is not None else None
            failed = view is None and _over([context.worker.get(id) for id in _ids(now)])
            parts = [one is not None for one in (view.followed, view.plain, view.tracked)] if view else None
            shown = [asked, query, theme, parts, failed]
            if shown != drawn:
                waiting = [] if failed else states.skeleton(*SKELETON)
                return waiting if view is None else draw_lens(view), shown
        except Exception as problem:
            return states.error(problem, "The logit lens could not be shown"), None
        raise PreventUpdate


def _ids(now: Record | None) -> list[str]:
    return [now["id"]] if now and now.get("id") else []


def _over(known: list[Job | None]) -> bool:
    return any(job is None or job.state in (JobState.FAILED, JobState.CANCELLED) for job in known)


def _view(jobs: PromptJobs, index: str, asked: Asked, selection: LensSelection, lens: Any) -> LensView:
    position, followed = selection.position(len(lens.tokens)), selection.followed(lens)
    shown = selection.shown_token(lens)
    return LensView(
        lens=lens,
        followed=jobs.lens(index, asked, selection.mode, followed, position),
        plain=jobs.lens(index, asked, "", followed, position) if selection.mode else None,
        tracked=None if shown is None else jobs.lens(index, asked, selection.mode, (shown,)),
        selection=selection,
        d_vocab=jobs.d_vocab(index),
        theme=theme_of_request(),
        said=jobs.lens_said(index, asked, selection.mode),
    )


def _register_typed(app: Dash, context: Context, jobs: PromptJobs) -> None:
    @app.callback(
        Output("lens-typed", "data"),
        Output("lens-typed-answer", "children"),
        Input("lens-sent", "data"),
        State("lens-request", "data"),
        State("lens-selection", "data"),
        prevent_initial_call=True,
    )
    def typed(sent: Record | None, asked: Record, query: Record | None) -> tuple[Any, Any]:
        if not sent or not sent["text"]:
            raise PreventUpdate
        job = jobs.submit_typed(asked["index"], str(sent["text"]))
        context.worker.wait(job, TYPED_TIMEOUT)
        if job.state is not JobState.DONE:
            problem = job.error or TimeoutError("The model is busy with another request. Try again in a moment.")
            return no_update, html.Span(str(problem), className="small", role="alert")
        selection = LensSelection.of_query(query)
        lens = jobs.lens(asked["index"], Asked.of(asked), selection.mode)
        now = selection.followed(lens) if lens is not None else selection.follow
        new = job.result.choices[0][0]
        return {"follow": ",".join(map(str, [*(one for one in now if one != new), new][-8:]))}, ""

    app.clientside_callback(
        ClientsideFunction("scope", "chooseTyped"),
        Output("lens-typed", "storage_type"),
        Input("lens-typed", "data"),
        prevent_initial_call=True,
    )
