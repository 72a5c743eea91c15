"""Compare: two SAEs, or checkpoints of trainings: what both have, what only one has, what became several.

1. The address says which (`a`, `b`: ids) and which list is shown (`show`). Choosing one of the two is following a link.
2. Drawing the page hands the comparison to the model worker; `watch` polls it: progress, cancel, the result.
"""

from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.comparisons import Compared, Comparisons, Side
from dashboards.components import jobs, states
from dashboards.components.charts import chart, theme_of_request
from dashboards.components.controls import define, link_button, panel
from dashboards.components.diff_view import diff_list, diff_view
from dashboards.components.stats import stat, stats
from dashboards.context import Context
from dashboards.format import count, exact, number, percent
from dashboards.links import View, compare_link, feature_link
from dashboards.pages import Page
from dashboards.queries import records
from dashboards.worker import Job, JobState
from scope.errors import ScopeError
from scope.figures import cosine_histogram

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["register", "render"]

POLL_MS = 400
GROUPS = {"SAE": "SAEs", "snapshot": "Kept along trainings", "checkpoint": "Last checkpoints of trainings"}
ROWS = 100
"""Rows of a list that are shown."""
PARTS = 6
TERMS = {"cosine": "best_cosine", "correlation": "firing_correlation"}
"""Columns with a "?"."""
FAILED = "These two could not be compared"
SHOWS = ("matched", "only-a", "only-b", "splits", "merges")
SKELETON = (56, 260, 28, 28, 28, 28)


def render(context: Context, view: View) -> Page:
    """The comparison that the address asks for, or the choice of two."""
    comparisons = context.once("comparisons", lambda: Comparisons(context))
    sides = comparisons.sides()
    chosen = [comparisons.side(view.get(name)) if view.get(name) else None for name in ("a", "b")]
    a, b = chosen
    parts: list[Any] = [html.Header(html.H1("Compare"), className="page-head")]
    shown = view.get("diff")
    parts += diff_list(context, shown)
    if shown:
        parts += diff_view(context, shown, theme_of_request())
        return Page(html.Div(parts, className="compare-page"), "Two models", "compare")
    if len(sides) < 2:
        parts.append(
            states.empty(
                "There are not two SAEs to compare yet",
                "Two SAEs of one hook show which features both have found; a training under way can be compared by its "
                "last checkpoint.",
                command=f"scope train STORE --hook NAME --d-sae 4096 --k 32 --out {context.workspace.path}/saes/NAME",
            )
        )
        return Page(html.Div(parts, className="compare-page"), "Compare", "compare")
    parts.append(_form(sides, a, b))
    if a is None or b is None:
        parts.append(html.P("Choose two: the earlier or smaller one as A.", className="muted"))
    else:
        parts += _comparison(comparisons, a, b, _show(view.get("show")))
    title = f"{a.name} and {b.name}" if a and b else "Compare"
    return Page(html.Div(parts, className="compare-page"), title, "compare")


def _show(asked: str) -> str:
    return asked if asked in SHOWS else SHOWS[0]


def _form(sides: list[Side], a: Side | None, b: Side | None) -> html.Div:
    data = [
        {"group": group, "items": [{"value": side.id, "label": side.name} for side in sides if side.kind == kind]}
        for kind, group in GROUPS.items()
        if any(side.kind == kind for side in sides)
    ]

    def one(id: str, title: str, side: Side | None) -> dmc.Select:
        return dmc.Select(
            id=id,
            label=title,
            data=data,
            value=side.id if side else None,
            placeholder="Choose an SAE",
            searchable=True,
            allowDeselect=False,
            size="sm",
            comboboxProps={"shadow": "md"},
            className="compare-side",
        )

    swap = [link_button("Swap", href=compare_link(a=b.id, b=a.id))] if a and b else []
    return html.Div([one("compare-a", "A", a), one("compare-b", "B", b), *swap], className="compare-form")


def _comparison(comparisons: Comparisons, a: Side, b: Side, show: str) -> list[Any]:
    try:
        job = comparisons.submit(a, b)
    except ScopeError as problem:
        return [states.error(problem, FAILED)]
    worker = comparisons.context.worker
    worker.wait(job, 0.15)
    words, style = jobs.standing(worker, job)
    bar = jobs.progress("compare-progress", "compare-share", "compare-step", "compare-cancel", hidden=not job.pending)
    bar.children[0].children.style = style
    bar.children[1].children = words
    drawn = states.skeleton(*SKELETON) if job.pending else _result(comparisons, job, show, theme_of_request())
    return [
        bar,
        html.Div(drawn, id="compare-result"),
        dcc.Store(id="compare-about", data={"job": job.id, "a": a.id, "b": b.id, "show": show}),
        dcc.Interval(id="compare-poll", interval=POLL_MS, disabled=not job.pending),
    ]


def register(app: Dash, context: Context) -> None:
    """Choosing, watching, calling off."""
    comparisons = context.once("comparisons", lambda: Comparisons(context))
    app.clientside_callback(
        ClientsideFunction("scope", "compareSides"),
        Output("compare-a", "className"),
        Input("compare-a", "value"),
        Input("compare-b", "value"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("compare-progress", "hidden"),
        Output("compare-step", "children"),
        Output("compare-share", "style"),
        Output("compare-result", "children"),
        Output("compare-poll", "disabled"),
        Input("compare-poll", "n_intervals"),
        Input("theme-now", "data"),
        State("compare-about", "data"),
        prevent_initial_call=True,
        running=jobs.one_at_a_time("compare-poll", POLL_MS),
    )
    def watch(_: int | None, theme: str, about: dict[str, str] | None) -> tuple[Any, ...]:
        if not about:
            raise PreventUpdate
        job = context.worker.get(about["job"])
        if job is None:
            gone = ScopeError("The result is no longer kept. Reload the page to compute it again.")
            return True, "", None, states.error(gone, "Not kept"), True
        if job.pending:
            return False, *jobs.standing(context.worker, job), no_update, False
        drawn = _result(comparisons, job, about["show"], "dark" if theme == "dark" else "light")
        return True, "", None, drawn, True

    @app.callback(
        Output("compare-cancel", "className"),
        Input("compare-cancel", "n_clicks"),
        State("compare-about", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int | None, about: dict[str, str] | None) -> Any:
        if clicks and about:
            context.worker.cancel(about["job"])
        return no_update


def _result(comparisons: Comparisons, job: Job, show: str, theme: Any) -> Any:
    if job.state is JobState.CANCELLED:
        return html.P("Cancelled. Reloading the page starts it again.", className="muted")
    if job.error is not None:
        return states.error(job.error, FAILED)
    try:
        return _drawn(comparisons.context, job.result, show, theme)
    except Exception as problem:
        return states.error(problem, "This comparison could not be shown")


def _drawn(context: Context, found: Compared, show: str, theme: Any) -> html.Div:
    figures = found.match.to_dict()
    names = _names(found)
    lists = {
        "matched": (names["matched"], figures["matched"]),
        "only-a": (names["only-a"], figures["unique_a"]),
        "only-b": (names["only-b"], figures["unique_b"]),
        "splits": ("One of A, several of B", figures["splits"]),
        "merges": ("Several of A, one of B", figures["merges"]),
    }
    chips = [
        html.A(
            [words, html.Span(count(n), className="number muted")],
            href=compare_link(a=found.a.id, b=found.b.id, show=None if name == "matched" else name),
            className="chip",
            **{"aria-current": "true" if name == show else "false", "data-stay": "true"},
        )
        for name, (words, n) in lists.items()
    ]
    best = [
        (f"A: {found.a.name}", found.match.best_a["cosine"].to_numpy()),
        (f"B: {found.b.name}", found.match.best_b["cosine"].to_numpy()),
    ]
    figure = cosine_histogram(best, found.match.threshold, theme=theme)
    words = "How alike each feature's nearest one of the other is"
    return html.Div(
        className="compare-result",
        children=[
            *_warning(found),
            *_on_the_way(found),
            stats(_figures(figures, names)),
            panel(words, chart(figure, id="compare-histogram", height=260, words=words), term="best_cosine"),
            html.Nav(chips, className="chips", **{"aria-label": "Which features are listed"}),
            _table(context, found, show),
        ],
    )


def _warning(found: Compared) -> list[Any]:
    if found.a.hook and found.b.hook and found.a.hook != found.b.hook:
        return [
            html.P(
                [
                    "A was trained on ",
                    html.Code(found.a.hook),
                    ", B on ",
                    html.Code(found.b.hook),
                    ": equal directions need not mean the same there.",
                ],
                className="warning small",
            )
        ]
    return []


def _names(found: Compared) -> dict[str, str]:
    """What the lists are called: of one training, what is only in the later one was born, what is only in the earlier
    one is gone."""
    if not found.one_training:
        return {"matched": "In both", "only-a": "Only in A", "only-b": "Only in B"}
    return {"matched": "Kept", "only-a": "Gone since A (only in A)", "only-b": "Born by B (only in B)"}


def _on_the_way(found: Compared) -> list[Any]:
    """What the words stand for where a side is no SAE that was indexed."""
    early = [name for name, side, index in (("A", found.a, found.index_a), ("B", found.b, found.index_b))
             if side.kind != "SAE" and index]  # fmt: skip
    if not early:
        return []
    words = f"What features of {' and '.join(early)} fire on is what the same features came to fire on in the end."
    return [html.P(words, className="muted small")]


def _short(name: str) -> str:
    return name[:1].lower() + name[1:].split(" (")[0]


def _figures(figures: dict[str, Any], names: dict[str, str]) -> list[html.Div]:
    n_a, n_b = figures["n_a"], figures["n_b"]
    of_a, of_b = f"of {count(n_a)}", f"of {count(n_b)}"
    shown = [
        stat("matched", count(figures["matched"]), term="matched", note=f"{percent(figures['matched'] / n_a)} of A"),
        stat(_short(names["only-a"]), count(figures["unique_a"]), term="unique", note=of_a),
        stat(_short(names["only-b"]), count(figures["unique_b"]), term="unique", note=of_b),
        stat("splits", count(figures["splits"]), term="split"),
        stat("merges", count(figures["merges"]), term="split"),
        stat(
            "mean nearest cosine",
            number(figures["mean_best_cosine_a"]),
            term="best_cosine",
            note=f"from B {number(figures['mean_best_cosine_b'])}",
        ),
    ]
    if figures["mean_correlation"] is not None:
        shown.append(stat("mean firing correlation", number(figures["mean_correlation"]), term="firing_correlation"))
    return shown


def _table(context: Context, found: Compared, show: str) -> Any:
    a, b = _Linked(context, found.index_a), _Linked(context, found.index_b)
    match = found.match
    if show == "matched":
        frame = match.matched
        known = match.correlation is not None
        head = ["A", "fires on", "B", "fires on", "cosine", *(["correlation"] if known else [])]
        rows = [
            [a.link(row["a"]), a.words(row["a"]), b.link(row["b"]), b.words(row["b"]), _number(row["cosine"]),
             *([_number(row["correlation"])] if known else [])]
            for row in records(frame.head(ROWS))
        ]  # fmt: skip
    elif show in ("only-a", "only-b"):
        mine, other = (a, b) if show == "only-a" else (b, a)
        frame = match.unique_a if show == "only-a" else match.unique_b
        names = ("A", "B") if show == "only-a" else ("B", "A")
        head = [names[0], "fires on", f"nearest of {names[1]}", "fires on", "cosine"]
        rows = [
            [mine.link(row["feature"]), mine.words(row["feature"]), other.link(row["partner"]),
             other.words(row["partner"]), _number(row["cosine"])]
            for row in records(frame.head(ROWS))
        ]  # fmt: skip
    else:
        one, several = (a, b) if show == "splits" else (b, a)
        frame = match.splits if show == "splits" else match.merges
        head = ["A", "fires on", "of B"] if show == "splits" else ["B", "fires on", "of A"]
        rows = [
            [one.link(row["feature"]), one.words(row["feature"]), _family(several, row)]
            for row in records(frame.head(ROWS))
        ]
    return _listed(frame, head, rows)


def _listed(frame: "pd.DataFrame", head: list[str], rows: list[list[Any]]) -> Any:
    if not rows:
        return html.P("None.", className="muted")
    numeric = {place for place, name in enumerate(head) if name in ("cosine", "correlation")}

    ids = {place: name[-1] for place, name in enumerate(head) if name[-1] in "AB" and not name.startswith("of ")}

    def cell(kind: Any, place: int, content: Any) -> Any:
        side = {"data-side": ids[place]} if place in ids else {}
        named = {"data-name": head[place]} if place in numeric else {}
        term = TERMS.get(str(content)) if kind is html.Th else None
        words = [content, " ", define(term)] if term else content
        return kind(words, className="number" if place in numeric else "", **side, **named)

    def cells(kind: Any, row: list[Any]) -> list[Any]:
        return [cell(kind, place, content) for place, content in enumerate(row)]

    table = html.Table(
        [html.Thead(html.Tr(cells(html.Th, head))), html.Tbody([html.Tr(cells(html.Td, row)) for row in rows])],
        className="table pairs" if len(head) > 3 else "table pairs families",
    )
    more = f"The first {ROWS} of {count(len(frame))}; scope compare --json lists all." if len(frame) > ROWS else None
    return html.Div(
        [
            html.Div(table, className="scroll", tabIndex=0, role="region", **{"aria-label": "Features"}),
            *([html.P(more, className="muted small")] if more else []),
        ]
    )


def _family(several: "_Linked", row: dict[str, Any]) -> html.Ul:
    parts = list(zip(row["parts"], row["cosines"], strict=True))
    rest = len(parts) - PARTS
    return html.Ul(
        [
            *(
                html.Li(
                    [several.link(part), " ", several.words(part), " ", html.Span(number(cosine), className="muted")]
                )
                for part, cosine in parts[:PARTS]
            ),
            *([html.Li(f"and {rest:,} more", className="muted")] if rest > 0 else []),
        ],
        className="compare-family",
    )


def _number(value: float) -> html.Span:
    return html.Span(number(value), title=exact(value) if value == value else None)


class _Linked:
    """The features of one side: links to their pages and what they fire on, where there is an index of it."""

    def __init__(self, context: Context, index: str | None) -> None:
        self.index = index
        self.table = context.index(index).table if index else None

    def link(self, feature: int) -> Any:
        if self.index is None:
            return html.Span(str(feature), className="number")
        return html.A(str(feature), href=feature_link(self.index, int(feature)), className="number")

    def words(self, feature: int) -> Any:
        if self.table is None:
            return html.Span("–", className="muted", title="There is no index of it")
        row = self.table.iloc[int(feature)]
        if row.get("label"):
            return html.Bdi(str(row["label"]))
        if row["dead"]:
            return html.Span("never fires", className="muted")
        tokens = list(dict.fromkeys(str(token).strip() or "␣" for token in row["top_tokens"]))[:4]
        return html.Span([part for token in tokens for part in (" · ", html.Bdi(token))][1:])
