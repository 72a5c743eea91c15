"""Waiting for the model: how far a job is, a way to call it off, and what became of it."""

from collections.abc import Iterable
from typing import Any

from dash import html

from dashboards.components import states
from dashboards.components.controls import button
from dashboards.context import Context
from dashboards.format import duration, plural
from dashboards.worker import Job, JobState
from scope.errors import ScopeError

__all__ = ["progress_bar", "step_of", "trouble_of"]


def progress_bar(prefix: str) -> html.Div:
    """Stands still while its content changes: a button that is drawn anew each time cannot be pressed. Its parts are
    called PREFIX-progress, PREFIX-share, PREFIX-step, PREFIX-cancel."""
    return html.Div(
        id=f"{prefix}-progress",
        className="progress",
        role="status",
        hidden=True,
        children=[
            html.Div(html.I(id=f"{prefix}-share"), className="progress-track"),
            html.Span(id=f"{prefix}-step", className="small muted"),
            button("Cancel", id=f"{prefix}-cancel"),
        ],
    )


def step_of(context: Context, job: Job) -> tuple[str, dict[str, str]]:
    """What a job is doing, in words, and how far it is as the style of the bar."""
    ahead = context.worker.position(job)
    step = f"{plural(ahead, 'request')} before this one" if job.state is JobState.QUEUED and ahead else job.step
    style = {"width": f"{100 * job.done / job.total:.0f}%", "animation": "none", "left": "0"} if job.total else {}
    return f"{step[:1].upper()}{step[1:]} … {duration(job.seconds)}", style


def trouble_of(jobs: Iterable[Job | None], failed: str) -> Any:
    """What went wrong with the first job that has not come to a result; None where all have.

    Args:
        jobs: None stands for one that is no longer kept.
        failed: the request in words, as in "The prompt could not be run".
    """
    for job in jobs:
        if job is None:
            return states.error(ScopeError("The result is no longer kept. Press Run to compute it again."), "Not kept")
        if job.state is JobState.CANCELLED:
            return html.P("Cancelled. Run starts it again.", className="muted")
        if job.error is not None:
            return states.error(job.error, failed)
    return None
