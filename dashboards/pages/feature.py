"""One feature: statistics and examples, what it does on a text that one types, what it promotes, what is like it."""

from functools import partial
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dashboards import streams
from dashboards.components import ablation, excerpt_view, live, states
from dashboards.components.charts import LOGITS_HEIGHT, strength_histogram
from dashboards.components.controls import button, choice, define, icon, panel
from dashboards.components.examples import example_groups, one_document
from dashboards.components.feature_view import (
    all_logits,
    feature_head,
    feature_side,
    feature_statistics,
    no_firings,
)
from dashboards.components.labels import label_panel_of
from dashboards.components.medium_view import example_medium
from dashboards.components.progress import Asked, progress_box, register_demand
from dashboards.components.strip import legend
from dashboards.context import Context
from dashboards.experts import ExpertJobs
from dashboards.feature_jobs import FeatureJobs
from dashboards.links import View, experts_link, feature_link, list_query
from dashboards.listing import FeatureQuery, listing
from dashboards.pages import Page
from dashboards.queries import (
    MAX_EXAMPLES,
    ExampleRequest,
    FeatureSummary,
    band_of_bin,
    examples,
    feature_id,
    summary,
)
from scope.errors import ScopeError
from scope.figures import logit_histogram

if TYPE_CHECKING:
    import numpy as np

    from scope.features.index import FeatureIndex

__all__ = ["register", "render"]

SHOWS = (("top", "Top"), ("quantiles", "Quantiles"), ("random", "Random"))
CONTEXTS = (("snippet", "Snippet"), ("document", "Document"))
FILTERS = ("language", "source", "role", "content")
"""Parts of the text that examples can be taken from, by their names in the address."""
STEP = 20


def render(context: Context, view: View) -> Page:
    """The page of one feature."""
    entry = context.entry(view)
    index = context.index(entry.id)
    feature = summary(index, feature_id(index, view.target), _listed(index, view))
    wanted = request_of(view.query)
    main = _example_part(context, entry.id, feature, wanted) if feature.fires else no_firings(index, feature)
    sample = excerpt_view.excerpt_part(context, index, feature.id, view.get("whole"))
    worth = ablation.ablation_box(context, entry.id, feature.id, bool(view.get("ablate"))) if feature.fires else None
    label, logits = label_panel_of(index, feature.id), _logits_part(context, entry.id, feature, view)
    side = feature_side(context.workspace, index, feature, label, logits)
    side += _experts_part(context, entry.id, feature)
    content = html.Div(
        className="feature-page",
        children=[
            feature_head(entry.id, feature, view.get("in")),
            feature_statistics(feature),
            html.Div(
                className="columns",
                children=[
                    html.Div(
                        [live.live_box(entry.id, feature.id, view.get("try")), sample, main, worth],
                        className="feature-main",
                    ),
                    html.Aside(side),
                ],
            ),
            dcc.Store(id="feature-of-page", data={"index": entry.id, "feature": feature.id}),
        ],
    )
    address = "" if view.index else feature_link(entry.id, feature.id, **view.query)
    return Page(content, f"Feature {feature.id}", "features", address)


def _listed(index: "FeatureIndex", view: View) -> "np.ndarray | None":
    """The features of the list that the page was reached from; None where that can no longer be read."""
    if not view.get("in"):
        return None
    try:
        return listing(index, FeatureQuery.of(list_query(view.get("in")))).ids
    except ScopeError:
        return None


def _experts_part(context: Context, index: str, feature: FeatureSummary) -> list[Any]:
    """The way to the experts of its tokens, where a store knows them and what the SAE reads."""
    reads = context.index(index).hook_name
    store = next((one.entry.id for one in ExpertJobs(context).stores(index) if reads in one.hooks), None)
    if not feature.fires or store is None:
        return []
    there = experts_link(index, view="features", store=store, feature=feature.id)
    return [panel("Experts", html.P(html.A("The experts that its tokens go to", href=there)), term="experts")]


def _logits_part(context: Context, index: str, feature: FeatureSummary, view: View) -> html.Div:
    """The histogram of all logit effects: at once where it is known, asked for where the address says so."""
    known = FeatureJobs(context).logits(index, feature.id)
    ask = known is None and view.get("logits") == "all"
    return html.Div(
        className="all-logits",
        children=[
            progress_box("logits"),
            html.Div([] if ask else all_logits(known), id="logits-result"),
            dcc.Store(id="logits-request", data={"ask": 1} if ask else None),
        ],
    )


def request_of(query: dict[str, str]) -> ExampleRequest:
    """Which examples an address asks for."""

    def whole(name: str, default: int) -> int:
        text = query.get(name, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default

    def share(name: str, default: float) -> float:
        try:
            return min(1.0, max(0.0, float(query.get(name, default))))
        except ValueError:
            return default

    return ExampleRequest(
        show=query.get("show", "top"),
        language=query.get("language", ""),
        source=query.get("source", ""),
        role=query.get("role", ""),
        content=query.get("content", ""),
        document=whole("document", 0) if query.get("document") else None,
        n=whole("n", STEP),
        seed=whole("seed", 0),
        low=share("low", 0.0),
        high=share("high", 1.0),
        context="document" if query.get("context") == "document" else "snippet",
    )


def _example_part(context: Context, index: str, feature: FeatureSummary, wanted: ExampleRequest) -> html.Section:
    opened = context.index(index)

    return html.Section(
        className="examples-part",
        **{"aria-label": "Examples"},
        children=[
            html.Div(
                className="toolbar",
                children=[
                    dmc.SegmentedControl(
                        id="examples-show",
                        data=[{"value": value, "label": label} for value, label in SHOWS],
                        value=wanted.show if wanted.show in dict(SHOWS) else "",
                        size="xs",
                        **{"aria-label": "Which examples"},
                    ),
                    choice("examples-language", "Any language", opened.languages, wanted.language or None, "xs"),
                    choice("examples-source", "Any source", opened.sources, wanted.source or None, "xs"),
                    *(
                        choice(f"examples-{name}", words, known, value or None, "xs", shown=bool(known))
                        for name, words, known, value in (
                            ("role", "Any role", opened.roles, wanted.role),
                            ("content", "Any content", opened.kinds, wanted.content),
                        )
                    ),
                    dmc.SegmentedControl(
                        id="examples-context",
                        data=[{"value": value, "label": label} for value, label in CONTEXTS],
                        value=wanted.context,
                        size="xs",
                        **{"aria-label": "How much of the text"},
                    ),
                    button(
                        "⏎",
                        label="Break lines where the text does",
                        className="icon-only tiny",
                        **{"data-break-lines": "true"},
                    ),
                    html.Div(
                        [legend(float(feature.row["max_value"])), define("strength")], className="push legend-with-help"
                    ),
                ],
            ),
            html.Div(_examples(context, index, feature.id, wanted), id="examples"),
            dcc.Store(id="examples-request", data=wanted.__dict__),
        ],
    )


def _examples(context: Context, index: str, feature: int, wanted: ExampleRequest) -> Any:
    """The examples, or what went wrong with them."""
    try:
        opened = context.index(index)
        groups = examples(opened, feature, wanted)
        scale = float(opened.table["max_value"].iloc[feature])
    except Exception as problem:
        return states.error(problem, "These examples could not be shown")
    shown = sum(len(group.examples) for group in groups)
    only = [] if wanted.document is None else [one_document(opened, feature, wanted.document)]
    if not shown:
        parts = (wanted.language, wanted.source, wanted.role, wanted.content)
        where = " and ".join(part.replace("_", " ") for part in parts if part) or "this part of the text"
        words = f"The feature does not fire in {where}. Clear the filter to see where it does."
        return html.Div([*only, states.empty("No examples", words)])
    figure = partial(example_medium, opened, scale=scale) if opened.modalities else None
    content: list[Any] = [*only, example_groups(groups, index, scale, wanted.context == "document", figure)]
    if wanted.show == "random" and not wanted.filtered:
        content.append(button(icon("shuffle"), "Draw others", id="examples-again", className="more"))
    elif wanted.show != "quantiles" and shown >= wanted.n and wanted.n < MAX_EXAMPLES:
        content.append(button(f"Show {STEP} more", id="examples-more", className="more"))
    elif wanted.show == "quantiles":
        content.append(button(icon("shuffle"), "Draw others", id="examples-again", className="more"))
    return html.Div(content)


def register(app: Dash, context: Context) -> None:
    """What changes within the page: which examples are shown, a text that is tested, all logits, the colours."""
    streams.register(app.server, context)
    live.register(app, context)
    ablation.register(app, context)
    excerpt_view.register(app, context)
    _register_logits(app, context)
    _register_choice(app, context)
    _register_paging(app)
    app.clientside_callback(
        ClientsideFunction("scope", "examplesAddress"),
        Output("examples", "className"),
        Input("examples-request", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("examples", "children"),
        Input("examples-request", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def show(wanted: dict[str, Any], about: dict[str, Any]) -> Any:
        return _examples(context, about["index"], about["feature"], ExampleRequest(**wanted))

    @app.callback(
        Output("feature-histogram", "figure"),
        Input("theme-now", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def recolour(theme: str, about: dict[str, Any] | None) -> Any:
        if not about:
            raise PreventUpdate
        edges, counts = context.index(about["index"]).histogram(about["feature"])
        return strength_histogram(edges, counts, "dark" if theme == "dark" else "light")


def _register_logits(app: Dash, context: Context) -> None:
    """The effects on all logits, by the model worker."""
    jobs = FeatureJobs(context)
    register_demand(
        app, context.worker, "logits", "askLogits", jobs.submit_logits, all_logits, "The logits could not be computed"
    )

    @app.callback(
        Output("logits-histogram", "figure"),
        Input("theme-now", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def recolour(theme: str, about: Asked | None) -> Any:
        found = jobs.logits(about["index"], about["feature"]) if about else None
        if found is None:
            raise PreventUpdate
        figure = logit_histogram(found.edges, found.counts, theme="dark" if theme == "dark" else "light")
        return figure.update_layout(height=LOGITS_HEIGHT)


def _register_choice(app: Dash, context: Context) -> None:
    """The segmented control, the filters and the bars of the histogram choose which examples are shown."""

    @app.callback(
        Output("examples-request", "data"),
        Output("examples-show", "value"),
        *(Output(f"examples-{name}", "value") for name in FILTERS),
        Input("examples-show", "value"),
        *(Input(f"examples-{name}", "value") for name in FILTERS),
        Input("examples-context", "value"),
        Input("feature-histogram", "clickData"),
        State("examples-request", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def choose(show: str, *rest: Any) -> tuple[Any, ...]:
        *chosen, extent, bar, now, about = rest
        filters = {name: value or "" for name, value in zip(FILTERS, chosen, strict=True)}
        unchanged, cleared = [no_update] * len(FILTERS), [None] * len(FILTERS)
        base = ExampleRequest(context=extent)
        if ctx.triggered_id == "examples-context":
            if extent == now.get("context"):
                raise PreventUpdate
            return {**now, "context": extent}, no_update, *unchanged
        if ctx.triggered_id == "feature-histogram":
            if not bar:
                raise PreventUpdate
            _, counts = context.index(about["index"]).histogram(about["feature"])
            low, high = band_of_bin(counts, int(bar["points"][0]["pointIndex"]))
            return {**base.__dict__, "show": "band", "low": low, "high": high}, "", *cleared
        if ctx.triggered_id == "examples-show":
            if not show or (show == now["show"] and not ExampleRequest(**now).filtered):
                raise PreventUpdate
            return {**base.__dict__, "show": show}, no_update, *cleared
        if all(filters[name] == now[name] for name in FILTERS):
            raise PreventUpdate
        return {**base.__dict__, **filters}, "top", *unchanged


def _register_paging(app: Dash) -> None:
    """More of the same, or others drawn at random."""

    @app.callback(
        Output("examples-request", "data", allow_duplicate=True),
        Input("examples-more", "n_clicks"),
        State("examples-request", "data"),
        prevent_initial_call=True,
    )
    def more(clicks: int | None, now: dict[str, Any]) -> dict[str, Any]:
        if not clicks:
            raise PreventUpdate
        return {**now, "n": min(now["n"] + STEP, MAX_EXAMPLES)}

    @app.callback(
        Output("examples-request", "data", allow_duplicate=True),
        Input("examples-again", "n_clicks"),
        State("examples-request", "data"),
        prevent_initial_call=True,
    )
    def again(clicks: int | None, now: dict[str, Any]) -> dict[str, Any]:
        if not clicks:
            raise PreventUpdate
        return {**now, "seed": now["seed"] + 1}
