"""Progress of a job of the model worker: what it does, how far it is, a button that calls it off."""

from collections.abc import Callable
from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.jobs import one_at_a_time, standing
from dashboards.components.waiting import progress_bar
from dashboards.worker import Job, JobState, ModelWorker
from scope.errors import ScopeError

__all__ = ["Asked", "progress_box", "register_demand", "register_progress"]

Asked = dict[str, Any]
"""What a page asked of the worker: the job's `id`, or the `problem` why there is none, and what the page needs to draw
its result."""
POLL_MS = 350


def progress_box(prefix: str) -> html.Div:
    """The bar (`waiting.progress_bar`), PREFIX-job, which holds what was asked, and PREFIX-poll, which asks again."""
    poll = dcc.Interval(id=f"{prefix}-poll", interval=POLL_MS, disabled=True)
    return html.Div([progress_bar(prefix), poll, dcc.Store(id=f"{prefix}-job")])


def register_demand(
    app: Dash,
    worker: ModelWorker,
    prefix: str,
    ask: str,
    submit: Callable[[str, int], Job],
    draw: Callable[[Any], Any],
    failed: str,
) -> None:
    """What a feature's page computes when it is asked for: a click on PREFIX-ask fills PREFIX-request (as the address
    does that asks for it), which submits the job, watched as by `register_progress`.

    Args:
        app: the dashboard.
        worker: runs the job.
        prefix: of the ids.
        ask: the clientside function from clicks to a request, which notes it in the address.
        submit: from the index's id and the feature to the job.
        draw: from the job's result to what is shown.
        failed: the request in words.
    """
    app.clientside_callback(
        ClientsideFunction("scope", ask),
        Output(f"{prefix}-request", "data"),
        Input(f"{prefix}-ask", "n_clicks"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output(f"{prefix}-job", "data"),
        Output(f"{prefix}-result", "children", allow_duplicate=True),
        Input(f"{prefix}-request", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call="initial_duplicate",
    )
    def start(asked: Asked | None, about: Asked) -> tuple[Asked, Any]:
        if not asked:
            raise PreventUpdate
        try:
            return {**about, "id": submit(about["index"], int(about["feature"])).id}, []
        except ScopeError as problem:
            return {**about, "problem": str(problem)}, []

    register_progress(app, worker, prefix, lambda asked, job: draw(job.result), failed)


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
        running=one_at_a_time(f"{prefix}-poll", POLL_MS),
    )
    def watch(_: int | None, asked: Asked | None) -> tuple[Any, ...]:
        if not asked:
            raise PreventUpdate
        if asked.get("problem"):
            return True, "", None, states.error(ScopeError(asked["problem"]), failed), True
        job = worker.get(asked["id"])
        if job is not None and job.pending:
            return False, *standing(worker, job), no_update, False
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
