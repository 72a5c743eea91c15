"""How far a job of a worker is: a bar, what it is doing, a button that calls it off."""

from typing import Any

from dash import Output, html

from dashboards.components.controls import button
from dashboards.format import duration, plural
from dashboards.worker import Job, JobState, ModelWorker

__all__ = ["one_at_a_time", "progress", "standing"]

NOT_NOW = 3_600_000
"""Milliseconds."""


def one_at_a_time(poll: str, interval: int) -> list[Any]:
    """What `running` of a callback has to be that a `dcc.Interval` drives: it waits until the answer is there. Dash
    drops the answer to a request that another has followed: a busy server would be asked again and again in vain."""
    return [(Output(poll, "interval"), NOT_NOW, interval)]


def progress(id: Any, share: Any, step: Any, cancel: Any, *, hidden: bool) -> html.Div:
    """The bar with its parts under these ids. It stands still while its content changes: a button that is drawn anew
    each time cannot be pressed."""
    return html.Div(
        id=id,
        className="progress",
        role="status",
        hidden=hidden,
        children=[
            html.Div(html.I(id=share), className="progress-track"),
            html.Span(id=step, className="small muted"),
            button("Cancel", id=cancel),
        ],
    )


def standing(worker: ModelWorker, job: Job) -> tuple[str, dict[str, str]]:
    """What a job is doing, in words, and how far it is as the style of the bar."""
    ahead = worker.position(job)
    step = f"{plural(ahead, 'request')} before this one" if job.state is JobState.QUEUED and ahead else job.step
    style = {"width": f"{100 * job.done / job.total:.0f}%", "animation": "none", "left": "0"} if job.total else {}
    return f"{step[:1].upper()}{step[1:]} … {duration(job.seconds)}", style
