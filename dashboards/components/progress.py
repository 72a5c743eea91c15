"""Progress of a job of the model worker: what it does, how far it is, a button that calls it off."""

from collections.abc import Callable
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.controls import button
from dashboards.format import duration, plural
from dashboards.worker import Job, JobState, ModelWorker
from scope.errors import ScopeError

__all__ = ["Asked", "progress_box", "progress_step", "register_progress"]

Asked = dict[str, Any]
"""What a page asked of the worker: the job's `id`, or the `problem` why there is none, and what the page needs to draw
its result."""
POLL_MS = 350


def progress_box(prefix: str, hidden: bool = True) -> html.Div:
    """Stands still while its content changes: a button that is drawn anew each time cannot be pressed. Its parts have
    the ids PREFIX-progress (`hidden`), PREFIX-share (`style`), PREFIX-step (`children`), PREFIX-cancel (`n_clicks`);
    PREFIX-job holds what was asked, PREFIX-poll asks again."""
    box = html.Div(
        id=f"{prefix}-progress",
        className="progress",
        role="status",
        hidden=hidden,
        children=[
            html.Div(html.I(id=f"{prefix}-share"), className="progress-track"),
            html.Span(id=f"{prefix}-step", className="small muted"),
            button("Cancel", id=f"{prefix}-cancel"),
        ],
    )
    poll = dcc.Interval(id=f"{prefix}-poll", interval=POLL_MS, disabled=True)
    return html.Div([box, poll, dcc.Store(id=f"{prefix}-job")])


def progress_step(worker: ModelWorker, job: Job) -> tuple[str, dict[str, Any]]:
    """What a job is doing, in words, and how far it is as the style of the bar."""
    ahead = worker.position(job)
    step = f"{plural(ahead, 'request')} before this one" if job.state is JobState.QUEUED and ahead else job.step
    style = {"width": f"{100 * job.done / job.total:.0f}%", "animation": "none", "left": "0"} if job.total else {}
    return f"{step[:1].upper()}{step[1:]} … {duration(job.seconds)}", style


def register_progress(
    app: Dash, worker: ModelWorker, prefix: str, draw: Callable[[Asked, Job], Any], failed: str
) -> None:
    """Watch the job in PREFIX-job, and put what `draw` makes of its result into PREFIX-result (`children`).

    Args:
        app: the dashboard.
        worker: runs the job.
        prefix: of the ids.
        draw: from what was asked and the job, done, to what is shown.
        failed: the request in words, as in "The text could not be run".
    """

    @app.callback(
        Output(f"{prefix}-progress", "hidden"),
        Output(f"{prefix}-step", "children"),
        Output(f"{prefix}-share", "style"),
        Output(f"{prefix}-result", "children"),
        Output(f"{prefix}-poll", "disabled"),
        Input(f"{prefix}-poll", "n_intervals"),
        Input(f"{prefix}-job", "data"),
        prevent_initial_call=True,
    )
    def watch(_: int | None, asked: Asked | None) -> tuple[Any, ...]:
        if not asked:
            raise PreventUpdate
        if asked.get("problem"):
            return True, "", None, states.error(ScopeError(asked["problem"]), failed), True
        job = worker.get(asked["id"])
        if job is not None and job.pending:
            return False, *progress_step(worker, job), no_update, False
        return True, "", None, _ended(asked, job, draw, failed), True

    @app.callback(
        Output(f"{prefix}-job", "data", allow_duplicate=True),
        Input(f"{prefix}-cancel", "n_clicks"),
        State(f"{prefix}-job", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, asked: Asked | None) -> Asked:
        if not clicks or not asked or "id" not in asked:
            raise PreventUpdate
        worker.cancel(asked["id"])
        return {**asked, "cancelled": clicks}


def _ended(asked: Asked, job: Job | None, draw: Callable[[Asked, Job], Any], failed: str) -> Any:
    if job is None:
        return states.error(ScopeError("The result is no longer kept. Ask again to compute it anew."), "Not kept")
    if job.state is JobState.CANCELLED:
        return html.P("Cancelled.", className="muted small", role="status")
    if job.error is not None:
        return states.error(job.error, failed)
    try:
        return draw(asked, job)
    except Exception as problem:
        return states.error(problem, failed)
