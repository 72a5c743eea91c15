"""Trainings: running and finished ones with their curves, as they grow, and how good all SAEs of the workspace are.

1. The address says which runs are drawn (`runs`, ids separated by commas), or which one alone (`/training/ID`), and
   over what (`x`: tokens, step, seconds). Choosing is following links.
2. An interval asks every few seconds whether a log has grown; only then is anything drawn anew.
"""

from itertools import pairwise
from typing import Any

from dash import ALL, Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate

from dashboards.components import jobs, states
from dashboards.components.charts import chart, theme_of_request
from dashboards.components.controls import define, icon, link_button, panel
from dashboards.components.stats import stat, stats
from dashboards.components.tables import stacking_table
from dashboards.context import Context
from dashboards.format import count, duration, exact, number, percent, plural
from dashboards.links import View, compare_link, features_link, training_link
from dashboards.pages import Page
from dashboards.queries import records
from dashboards.trainings import MAX_SHOWN, Trainings, qualities, settings_in_words
from scope.errors import UnknownNameError
from scope.figures import METRICS, Theme, metric_curve, pareto_scatter
from scope.training.runs import Run, RunState

__all__ = ["register", "render"]

POLL_MS = 2500
HEIGHT = 210
XS = (("tokens", "Tokens"), ("step", "Steps"), ("seconds", "Time"))
TERMS = {
    **{name: name for name in METRICS},
    "dead_share": "dead_in_training",
    "over_dense_share": "over_dense",
}
"""What each curve's "?" explains."""
ALWAYS = ("fvu", "l0", "dead_share", "grad_norm")
"""Curves that have a place before their first value."""
WORDS = {
    RunState.RUNNING: "running",
    RunState.FINISHED: "finished",
    RunState.STOPPED: "stopped",
    RunState.LOST: "lost",
}
COMMAND = "scope train STORE --hook NAME --d-sae 4096 --k 32 --out {}/saes/NAME"
LEFT_OUT = ("d_sae", "k", "arch")
TERMS_OF_TABLES = {"fvu": "fvu", "l0": "l0", "delta CE": "delta_ce", "Dead": "dead_in_training"}
FRONT = ("SAE", "Hook", "What it is", "l0", "fvu", "delta CE", "Dead", "Measured on", "")


def render(context: Context, view: View) -> Page:
    """All trainings, or the one that the address names."""
    trainings = _trainings_of(context)
    runs = trainings.runs()
    x = view.get("x") if view.get("x") in dict(XS) else "tokens"
    if view.target:
        one = next((run for run in runs if view.target in (run.id, run.name)), None)
        if one is None:
            raise UnknownNameError(
                "training",
                view.target,
                [name for run in runs for name in (run.id, run.name)],
                hint="A run that stops before its first checkpoint leaves nothing; all that there are: /training",
            )
        shown = [one]
    else:
        one, shown = None, trainings.chosen(runs, view.get("runs"))
    theme = theme_of_request()
    about = {"runs": view.get("runs"), "one": one.id if one else "", "x": x}
    parts: list[Any] = [_head(one, x, view)]
    if not runs:
        parts.append(_none(context))
    else:
        parts.append(html.Div(_top(trainings, runs, shown, one, view), id="training-runs"))
        parts.append(_curves(trainings, shown, x, theme))
    if one is None:
        parts.append(html.Div(_front(context, theme), id="training-front"))
    parts += [
        dcc.Store(id="training-about", data=about),
        dcc.Store(id="training-seen", data=_version(trainings, runs, theme)),
        dcc.Interval(id="training-poll", interval=POLL_MS),
    ]
    title = f"Training {one.name}" if one else "Training"
    return Page(html.Div(parts, className="training-page"), title, "training")


def register(app: Dash, context: Context) -> None:
    """What grows while one looks."""

    @app.callback(
        Output("training-runs", "children"),
        Output({"type": "training-curve", "metric": ALL}, "figure"),
        Output("training-seen", "data"),
        Input("training-poll", "n_intervals"),
        Input("theme-now", "data"),
        State("training-about", "data"),
        State("training-seen", "data"),
        State({"type": "training-curve", "metric": ALL}, "id"),
        prevent_initial_call=True,
        running=jobs.one_at_a_time("training-poll", POLL_MS),
    )
    def grow(_: int, theme: str, about: dict[str, str] | None, seen: Any, ids: list[dict[str, str]]) -> Any:
        if not about or not ids:
            raise PreventUpdate
        trainings = _trainings_of(context)
        runs = trainings.runs()
        version = _version(trainings, runs, theme)
        if version == seen:
            raise PreventUpdate
        view = View("training", query={"runs": about["runs"], "x": about["x"]}, target=about["one"])
        one = next((run for run in runs if run.id == about["one"]), None) if about["one"] else None
        if about["one"] and one is None:
            gone = UnknownNameError("training", about["one"], hint="It ended before its first checkpoint.")
            return states.error(gone, "This training is no longer there"), [{}] * len(ids), version
        shown = [one] if one else trainings.chosen(runs, about["runs"])
        frames = {run.name: trainings.frame(run) for run in shown}
        colour: Theme = "dark" if theme == "dark" else "light"
        figures = [
            metric_curve(frames, wanted["metric"], x=about["x"], theme=colour).update_layout(height=HEIGHT)
            for wanted in ids
        ]
        return _top(trainings, runs, shown, one, view), figures, version

    @app.callback(
        Output("training-front", "children"),
        Input("theme-now", "data"),
        Input("training-seen", "data"),
        prevent_initial_call=True,
    )
    def front(theme: str, _: Any) -> Any:
        return _front(context, "dark" if theme == "dark" else "light")


def _trainings_of(context: Context) -> Trainings:
    """One reader of logs a dashboard."""
    return context.once("trainings", lambda: Trainings(context))


def _version(trainings: Trainings, runs: list[Run], theme: str) -> list[Any]:
    return [theme, *trainings.version(runs)]


def _head(one: Run | None, x: str, view: View) -> html.Header:
    def over(name: str, words: str) -> html.A:
        query = {"runs": view.get("runs"), "x": None if name == "tokens" else name}
        href = training_link(one.id if one else "", **query)
        return html.A(
            words,
            href=href,
            className="chip",
            **{"aria-current": "true" if name == x else "false", "data-stay": "true"},
        )

    title: list[Any] = [html.A("Training", href=training_link()), " / ", html.Bdi(one.name)] if one else ["Training"]
    return html.Header(
        className="page-head training-head",
        children=[
            html.H1(title),
            html.Div(
                [html.Span("Over", className="muted small"), *(over(*each) for each in XS)],
                className="chips",
                role="group",
                **{"aria-label": "What the curves are drawn over"},
            ),
        ],
    )


def _none(context: Context) -> html.Div:
    return states.empty(
        "No training yet",
        "A training shows here while it runs, and afterwards, where its SAE lies in this workspace.",
        command=COMMAND.format(context.workspace.path),
    )


def _top(trainings: Trainings, runs: list[Run], shown: list[Run], one: Run | None, view: View) -> Any:
    return _one(trainings, one) if one else _list(trainings, runs, shown, view)


# --- one run ------------------------------------------------------------------------------------------------------


def _one(trainings: Trainings, run: Run) -> html.Div:
    last = trainings.last(run)
    parts: list[Any] = [
        html.P([_badge(run), " ", html.Code(run.hook), " · ", settings_in_words(run.settings)], className="muted"),
        _progress(run, last),
        stats(_facts(run, last)),
    ]
    if run.problem:
        parts.append(
            html.Div(
                className="state error",
                role="alert",
                children=[
                    html.H2("It did not reach its end"),
                    html.P(run.problem, style={"overflowWrap": "anywhere"}),
                    html.P(_going_on(run)),
                ],
            )
        )
    if run.sae:
        parts.append(html.Div([link_button("Compare", href=compare_link(a=run.sae))], className="chips"))
    parts += _births(run)
    settings = [
        (name.replace("_", " "), html.Code(str(value)))
        for name, value in run.settings.items()
        if value is not None and name not in LEFT_OUT
    ]
    if settings:
        parts.append(
            html.Details(
                className="provenance",
                children=[
                    html.Summary("Settings", className="small muted"),
                    html.Dl([part for name, value in settings for part in (html.Dt(name), html.Dd(value))]),
                ],
            )
        )
    return html.Div(parts, className="training-one")


def _births(run: Run) -> list[Any]:
    """Links to what came, went and split between the decoders that were kept along the way."""
    kept = [(f"step {one.steps:,}", f"{run.id}-{one.steps}") for one in run.snapshots]
    kept += [("the end", run.sae)] if run.sae else []
    if len(kept) < 2:
        return []
    pairs = [*pairwise(kept), *([(kept[0], kept[-1])] if len(kept) > 2 else [])]
    links = [
        html.A(f"{first[0]} → {second[0]}", href=compare_link(a=first[1], b=second[1]), className="chip")
        for first, second in pairs
    ]
    words = html.Span("Births and splits, from", className="muted small")
    return [html.Nav([words, *links], className="chips births", **{"aria-label": "Births and splits"})]


def _going_on(run: Run) -> str:
    if run.checkpoint is None:
        return "It left no checkpoint that can be read."
    return (
        f"Its last good checkpoint is of step {run.checkpoint.steps:,} ({run.checkpoint.tokens:,} tokens). The same "
        "scope train command goes on from there."
    )


def _facts(run: Run, last: dict[str, Any]) -> list[html.Div]:
    shown = [stat("tokens", count(last.get("tokens", 0)), note=_of_total(run))]
    for name, term in (("fvu", "fvu"), ("l0", "l0"), ("loss", "loss"), ("tokens_per_s", "tokens_per_s")):
        if last.get(name) is not None:
            shown.append(
                stat(name.replace("_per_s", " a second"), number(last[name]), term=term, title=exact(last[name]))
            )
    if last.get("dead_share") is not None:
        shown.append(stat("dead", percent(last["dead_share"]), term="dead_in_training"))
    return shown


def _of_total(run: Run) -> str | None:
    return f"of {count(run.total_tokens)}" if run.total_tokens else None


def _progress(run: Run, last: dict[str, Any]) -> Any:
    if run.state is not RunState.RUNNING:
        return None
    share = min(1.0, last.get("tokens", 0) / run.total_tokens) if run.total_tokens else 0.0
    left = ""
    if share and last.get("tokens_per_s"):
        left = f" · {duration((run.total_tokens - last['tokens']) / last['tokens_per_s'])} to go"
    return html.Div(
        className="progress",
        role="status",
        children=[
            html.Div(
                html.I(style={"width": f"{100 * share:.1f}%", "animation": "none", "left": 0}),
                className="progress-track",
            ),
            html.Span(f"{percent(share)}{left}" if last else "Starting …", className="small muted"),
        ],
    )


def _badge(run: Run) -> html.Span:
    kind = {RunState.RUNNING: "running", RunState.FINISHED: "good"}.get(run.state, "bad")
    return html.Span(WORDS[run.state], className=f"health {kind}", title=run.problem)


# --- the list ---------------------------------------------------------------------------------------------------


def _list(trainings: Trainings, runs: list[Run], shown: list[Run], view: View) -> html.Div:
    colours = {run.id: number for number, run in enumerate(shown, start=1)}
    rows = [_row(trainings, run, colours.get(run.id), shown, view) for run in runs]
    names = ("", "Run", "State", "What it is", "Tokens", "fvu", "l0", "Tokens a second")
    return stacking_table("Trainings", names, rows, numeric=range(4, 8), terms=TERMS_OF_TABLES, className="runs-table")


def _row(trainings: Trainings, run: Run, colour: int | None, shown: list[Run], view: View) -> list[Any]:
    last = trainings.last(run)
    others = [one.id for one in shown if one is not run]
    wanted = others if colour else [*others, run.id]
    full = colour is None and len(shown) >= MAX_SHOWN
    toggle = html.A(
        html.Span(className="swatch", style={"--swatch": f"var(--scope-category-{colour})"} if colour else {}),
        href=training_link(runs=",".join(wanted[-MAX_SHOWN:]), x=view.get("x")),
        className="swatch-link",
        title=f"{MAX_SHOWN} runs are drawn at most" if full else None,
        **{
            "aria-label": f"{'Leave out' if colour else 'Draw'} {run.name}",
            "aria-current": "true" if colour else "false",
            "data-stay": "true",
        },
    )
    done = last.get("tokens")
    share = percent(min(1.0, done / run.total_tokens)) if done and run.total_tokens else None
    state: list[Any] = [_badge(run)]
    if run.state is RunState.RUNNING and share:
        state.append(html.Span(f" {share}", className="small muted"))
    if run.problem:
        state.append(html.Div([run.problem, " ", _going_on(run)], className="small muted run-problem"))
    return [
        toggle,
        html.A(html.Bdi(run.name), href=training_link(run.id)),
        state,
        [html.Code(run.hook), " ", settings_in_words(run.settings)],
        html.Td(count(done) if done is not None else "–", title=_of_total(run)),
        *(
            html.Td(number(last.get(name)), title=exact(last[name]) if last.get(name) is not None else None)
            for name in ("fvu", "l0", "tokens_per_s")
        ),
    ]


# --- charts --------------------------------------------------------------------------------------------------------


def _curves(trainings: Trainings, shown: list[Run], x: str, theme: Any) -> html.Div:
    frames = {run.name: trainings.frame(run) for run in shown}
    drawn = []
    for metric, words in METRICS.items():
        if all(metric not in frame or frame[metric].isna().all() for frame in frames.values()) and metric not in ALWAYS:
            continue
        title: list[Any] = [html.H2(words[:1].upper() + words[1:]), define(TERMS[metric])]
        figure = metric_curve(frames, metric, x=x, theme=theme)
        graph = chart(figure, id={"type": "training-curve", "metric": metric}, height=HEIGHT, words=words)
        drawn.append(html.Section([html.Header(title), graph], className="panel"))
    return html.Div(drawn, className="curves")


def _front(context: Context, theme: Any) -> Any:
    frame = qualities(context.workspace)
    if frame.empty:
        return None
    graph = chart(
        pareto_scatter(frame, theme=theme), id="training-pareto", height=340, words="FVU against L0 of all SAEs"
    )
    indexes = {parent: entry.id for entry in context.indexes() for parent in entry.manifest.get("parents", ())}
    by_id = {fingerprint[:12]: index for fingerprint, index in indexes.items()}
    alike = frame["held_out"].all()
    words = (
        "Measured on held-out text." if alike else "Filled: on held-out text. Open: on training rows, for want of it."
    )
    return panel(
        "How much is explained with how few features",
        html.P(f"{plural(len(frame), 'SAE')}. {words} The dotted line joins those of a hook that none beats in both."
               , className="small muted"),
        graph,
        stacking_table("All SAEs", FRONT, [_front_row(row, by_id) for row in records(frame)], numeric=range(3, 7),
                       terms=TERMS_OF_TABLES),
        term="pareto",
    )  # fmt: skip


def _front_row(row: dict[str, Any], indexes: dict[str, str]) -> list[Any]:
    index = indexes.get(row["id"])
    name = html.A(row["name"], href=features_link(index)) if index else row["name"]
    delta, dead = row["delta_ce"], row["dead_share"]
    return [
        [html.Strong(name), *([" ", html.Span("on the front", className="small muted")] if row["front"] else [])],
        html.Code(row["hook"]),
        row["what"],
        html.Td(number(row["l0"]), title=exact(row["l0"])),
        html.Td(number(row["fvu"]), title=exact(row["fvu"])),
        "–" if delta is None or delta != delta else number(delta),
        "–" if dead is None else percent(dead),
        "held-out text" if row["held_out"] else "training rows",
        html.A([icon("compare"), "Compare"], href=compare_link(a=row["id"]), className="small with-icon"),
    ]
