"""A page that shows what the model worker finds for its address: jobs submitted, watched, and drawn as they come.

1. PREFIX-request holds what to run (the index, the prompt), PREFIX-selection the address's query; a change of either
   makes `start` submit what is wanted, where it is not known yet.
2. `watch` asks how the jobs stand, and draws whenever more is known, another thing is selected, or the theme changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.charts import theme_of_request
from dashboards.components.jobs import one_at_a_time, standing
from dashboards.components.waiting import progress_bar, trouble_of
from dashboards.context import Context
from dashboards.worker import Job, JobState
from scope.errors import ScopeError
from scope.figures import Theme

__all__ = ["Shown", "register_watched", "watched", "watched_stores"]

Record = dict[str, Any]

POLL_MS = 350
AGAIN = "Reloading the page starts it again."


@dataclass(frozen=True)
class Shown:
    """What there is to draw."""

    index: str
    """Id of the index."""
    request: Mapping[str, Any]
    query: Mapping[str, Any]
    found: Mapping[str, Any]
    """By name of a job what it has found, as far as it is done."""
    waiting: frozenset[str]
    """Names of the jobs that are not."""
    theme: Theme

    def words(self, name: str) -> str:
        """A value of the address."""
        return str(self.query.get(name) or "")


def watched(prefix: str, *heights: int) -> list[Any]:
    """Where progress, troubles and results stand: PREFIX-status, PREFIX-result. `heights`: of the skeleton."""
    return [
        progress_bar(prefix),
        html.Div(id=f"{prefix}-status"),
        html.Div(states.skeleton(*heights), id=f"{prefix}-result"),
    ]


def watched_stores(prefix: str, *, query: Mapping[str, str] | None = None, index: str = "") -> list[Any]:
    """What a page keeps: beside PREFIX-jobs and PREFIX-drawn, where a `query` is given (a page without a prompt's
    form), PREFIX-request, PREFIX-selection and PREFIX-poll."""
    own = [dcc.Store(id=f"{prefix}-jobs"), dcc.Store(id=f"{prefix}-drawn")]
    if query is None:
        return own
    return [
        *own,
        dcc.Store(id=f"{prefix}-request", data={"index": index}),
        dcc.Store(id=f"{prefix}-selection", data=dict(query)),
        dcc.Interval(id=f"{prefix}-poll", interval=POLL_MS, disabled=True),
    ]


def register_watched(
    app: Dash,
    context: Context,
    prefix: str,
    submit: Callable[[Record, Record], Mapping[str, Job]],
    draw: Callable[[Shown], Any],
    failed: str,
) -> None:
    """From a request and a selection to jobs, and from these to what PREFIX-result shows.

    Args:
        app: the dashboard.
        context: its worker runs the jobs.
        prefix: of the ids.
        submit: from the request and the query to jobs by name.
        draw: from what is known to what is shown.
        failed: the request in words, as in "The prompt could not be run".
    """

    @app.callback(
        Output(f"{prefix}-jobs", "data"),
        Input(f"{prefix}-request", "data"),
        Input(f"{prefix}-selection", "data"),
    )
    def start(request: Record | None, query: Record | None) -> Record:
        if not request:
            raise PreventUpdate
        wanted: Record = {"request": request, "query": query or {}, "ids": {}}
        try:
            wanted["ids"] = {name: job.id for name, job in submit(request, wanted["query"]).items()}
        except ScopeError as problem:
            wanted["problem"] = str(problem)
        return wanted

    @app.callback(
        Output(f"{prefix}-progress", "hidden"),
        Output(f"{prefix}-step", "children"),
        Output(f"{prefix}-share", "style"),
        Output(f"{prefix}-status", "children"),
        Output(f"{prefix}-result", "children"),
        Output(f"{prefix}-drawn", "data"),
        Output(f"{prefix}-poll", "disabled"),
        Input(f"{prefix}-poll", "n_intervals"),
        Input(f"{prefix}-jobs", "data"),
        Input("theme-now", "data"),
        State(f"{prefix}-drawn", "data"),
        prevent_initial_call=True,
        running=one_at_a_time(f"{prefix}-poll", POLL_MS),
    )
    def watch(_: int | None, now: Record | None, theme: str, drawn: Record | None) -> tuple[Any, ...]:
        if not now:
            raise PreventUpdate
        if now.get("problem"):
            return True, "", None, states.error(ScopeError(now["problem"]), failed), [], None, True
        known = {name: context.worker.get(id) for name, id in now["ids"].items()}
        news = {**now, "theme": theme, "states": [job.state if job else "gone" for job in known.values()]}
        waiting = [job for job in known.values() if job is not None and job.pending]
        trouble = None if waiting else trouble_of(known.values(), failed, AGAIN)
        result, kept = no_update, no_update
        if news != drawn:
            result, kept = _drawn(now, known, draw, failed), news
        if waiting:
            return False, *standing(context.worker, waiting[0]), trouble, result, kept, False
        return True, "", None, trouble, result, kept, True

    @app.callback(
        Output(f"{prefix}-jobs", "data", allow_duplicate=True),
        Input(f"{prefix}-cancel", "n_clicks"),
        State(f"{prefix}-jobs", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, now: Record | None) -> Record:
        if not clicks or not now:
            raise PreventUpdate
        for id in now["ids"].values():
            context.worker.cancel(id)
        return {**now, "cancelled": clicks}


def _drawn(now: Record, known: Mapping[str, Job | None], draw: Callable[[Shown], Any], failed: str) -> Any:
    done = {name: job.result for name, job in known.items() if job is not None and job.state is JobState.DONE}
    waiting = frozenset(name for name, job in known.items() if job is not None and job.pending)
    ended = known.keys() - done.keys() - waiting
    if ended and not done and not waiting:
        return []
    try:
        index = str(now["request"].get("index", ""))
        return draw(Shown(index, now["request"], now["query"], done, waiting, theme_of_request()))
    except Exception as problem:
        return states.error(problem, failed)
