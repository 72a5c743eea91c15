"""Waiting for the model: the bar of a page, and what became of its jobs."""

from collections.abc import Iterable
from typing import Any

from dash import html

from dashboards.components import jobs, states
from dashboards.worker import Job, JobState
from scope.errors import ScopeError

__all__ = ["progress_bar", "trouble_of"]


def progress_bar(prefix: str) -> html.Div:
    """A bar whose parts are called PREFIX-progress, PREFIX-share, PREFIX-step, PREFIX-cancel."""
    return jobs.progress(*(f"{prefix}-{part}" for part in ("progress", "share", "step", "cancel")), hidden=True)


def trouble_of(ended: Iterable[Job | None], failed: str, again: str = "Run starts it again.") -> Any:
    """What went wrong with the first job that has not come to a result; None where all have.

    Args:
        ended: None stands for one that is no longer kept.
        failed: the request in words, as in "The prompt could not be run".
        again: how a request that was cancelled, or is no longer known, is made anew.
    """
    for job in ended:
        if job is None:
            return states.error(ScopeError(f"The result is no longer kept. {again}"), "Not kept")
        if job.state is JobState.CANCELLED:
            return html.P(f"Cancelled. {again}", className="muted")
        if job.error is not None:
            return states.error(job.error, failed)
    return None
