"""Progress of a job of the model worker: what it does, how far it is, a button that calls it off."""

from typing import Any

from dash import html

from dashboards.components.controls import button
from dashboards.format import duration, plural
from dashboards.worker import Job, JobState, ModelWorker

__all__ = ["HIDDEN", "progress_box", "progress_step"]

HIDDEN = ("", None)
"""Step and bar of a box with nothing to say."""


def progress_box(prefix: str, hidden: bool = True) -> html.Div:
    """Stands still while its content changes: a button that is drawn anew each time cannot be pressed. Its parts have
    the ids PREFIX-progress (`hidden`), PREFIX-share (`style`), PREFIX-step (`children`), PREFIX-cancel (`n_clicks`)."""
    return html.Div(
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


def progress_step(worker: ModelWorker, job: Job) -> tuple[str, dict[str, Any]]:
    """What a job is doing, in words, and how far it is as the style of the bar."""
    ahead = worker.position(job)
    step = f"{plural(ahead, 'request')} before this one" if job.state is JobState.QUEUED and ahead else job.step
    style = {"width": f"{100 * job.done / job.total:.0f}%", "animation": "none", "left": "0"} if job.total else {}
    return f"{step[:1].upper()}{step[1:]} … {duration(job.seconds)}", style
