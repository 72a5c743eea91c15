"""Verifying on demand: each artefact of the workspace page has a button, a bar, and what was found.

A click starts the verification and goes through `#verify-asked`, so that `watch` looks once more: its answer of just
before would end the polling.
"""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html
from dash.exceptions import PreventUpdate

from dashboards.components import jobs
from dashboards.components.controls import button
from dashboards.context import Context
from dashboards.format import plural
from dashboards.verifications import Checked, Verifier
from dashboards.worker import Job, JobState

if TYPE_CHECKING:
    from scope.workspace import Entry

__all__ = ["register", "verifier_of", "verify_box", "verify_poll"]

POLL_MS = 500
VERIFY = "Read every byte and compare it with what was recorded when it was written"


def verifier_of(context: Context) -> Verifier:
    """The verifications of a dashboard."""
    return context.once("verifier", lambda: Verifier(context))


def verify_poll(verifier: Verifier, entries: "Iterable[Entry]") -> html.Div:
    """What asks for news of the verifications of these artefacts."""
    known = [verifier.job(entry.id) for entry in entries]
    pending = any(job is not None and job.pending for job in known)
    return html.Div(
        [dcc.Interval(id="verify-poll", interval=POLL_MS, disabled=not pending), dcc.Store(id="verify-asked")]
    )


def verify_box(verifier: Verifier, entry: "Entry") -> html.Div:
    """Of one artefact: the button that verifies, the bar while it does, and what it found."""
    id = entry.id
    hidden, words, style, found = _standing(verifier, verifier.job(id))

    def named(part: str) -> dict[str, str]:
        return {"type": part, "id": id}

    bar = jobs.progress(
        named("verify-bar"), named("verify-share"), named("verify-step"), named("verify-cancel"), hidden=hidden
    )
    bar.children[0].children.style = style
    bar.children[1].children = words
    label = f"Verify {entry.name}"
    return html.Div(
        className="verify",
        children=[
            button("Verify", id=named("verify"), className="tiny", **{"aria-label": label, "title": VERIFY}),
            bar,
            html.Div(found, id=named("verify-found"), role="status"),
        ],
    )


def register(app: Dash, context: Context) -> None:
    """Starting, calling off, watching."""
    verifier = verifier_of(context)

    @app.callback(
        Output("verify-asked", "data"),
        Input({"type": "verify", "id": ALL}, "n_clicks"),
        prevent_initial_call=True,
    )
    def start(clicks: list[int | None]) -> Any:
        if not ctx.triggered_id or not any(clicks) or not ctx.triggered[0]["value"]:
            raise PreventUpdate
        verifier.start(str(ctx.triggered_id["id"]))
        return time.time()

    @app.callback(
        Output("verify-asked", "data", allow_duplicate=True),
        Input({"type": "verify-cancel", "id": ALL}, "n_clicks"),
        prevent_initial_call=True,
    )
    def cancel(clicks: list[int | None]) -> Any:
        if not ctx.triggered_id or not any(clicks) or not ctx.triggered[0]["value"]:
            raise PreventUpdate
        verifier.cancel(str(ctx.triggered_id["id"]))
        return time.time()

    @app.callback(
        Output({"type": "verify-bar", "id": ALL}, "hidden"),
        Output({"type": "verify-step", "id": ALL}, "children"),
        Output({"type": "verify-share", "id": ALL}, "style"),
        Output({"type": "verify-found", "id": ALL}, "children"),
        Output("verify-poll", "disabled"),
        Input("verify-poll", "n_intervals"),
        Input("verify-asked", "data"),
        State({"type": "verify-bar", "id": ALL}, "id"),
        prevent_initial_call=True,
        running=jobs.one_at_a_time("verify-poll", POLL_MS),
    )
    def watch(_: int | None, asked: float | None, ids: list[dict[str, str]]) -> tuple[Any, ...]:
        jobs_of = [verifier.job(one["id"]) for one in ids]
        drawn = [_standing(verifier, job) for job in jobs_of]
        columns = [list(column) for column in zip(*drawn, strict=True)] if drawn else [[], [], [], []]
        return *columns, not any(job is not None and job.pending for job in jobs_of)


def _standing(verifier: Verifier, job: Job | None) -> tuple[bool, str, dict[str, str], Any]:
    """Of a verification: whether its bar is hidden, what it does, how far it is, and what it found."""
    if job is None:
        return True, "", {}, None
    if job.pending:
        return False, *jobs.standing(verifier.worker, job), None
    return True, "", {}, _found(job)


def _found(job: Job) -> Any:
    if job.state is JobState.CANCELLED:
        return html.Span("Cancelled", className="muted small")
    if job.error is not None:
        return html.Span(str(job.error), className="health bad wrapping", role="alert")
    checked: Checked = job.result
    when = time.strftime("%H:%M", time.localtime(checked.at))
    if not checked.n_faults:
        return html.Span(f"as it was written, read at {when}", className="health good")
    return html.Div(
        role="alert",
        children=[
            html.Span(f"{plural(checked.n_faults, 'fault')}, read at {when}", className="health bad"),
            html.Ul([html.Li(html.Code(fault)) for fault in checked.faults], className="small faults"),
        ],
    )
