"""One feature: its statistics, its examples, what it promotes, and what is like it."""

from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, ctx, html, no_update
from dash.exceptions import PreventUpdate

from dashboards.components import bars, states
from dashboards.components.charts import chart, theme_of_request
from dashboards.components.controls import button, code, define, icon, link_button, panel
from dashboards.components.examples import example_groups
from dashboards.components.stats import density_interval, stat, stats
from dashboards.components.strip import legend
from dashboards.context import Context
from dashboards.format import count, density, exact, number, percent, plural
from dashboards.links import View, feature_link, prompt_link
from dashboards.pages import Page
from dashboards.queries import (
    MAX_EXAMPLES,
    ExampleRequest,
    FeatureSummary,
    band_of_bin,
    examples,
    feature_id,
    feature_name,
    summary,
)
from scope.figures import activation_histogram, histogram_frame

__all__ = ["register", "render"]

SHOWS = (("top", "Top"), ("quantiles", "Quantiles"), ("random", "Random"))
STEP = 20
HISTOGRAM_HEIGHT = 232


def render(context: Context, view: View) -> Page:
    """The page of one feature."""
    entry = context.entry(view)
    index = context.index(entry.id)
    feature = summary(index, feature_id(index, view.target))
    wanted = request_of(view.query)
    if feature.fires:
        main: list[Any] = [_example_part(context, entry.id, feature, wanted)]
    else:
        main = [_no_firings(index, entry.id, feature)]
    content = html.Div(
        className="feature-page",
        children=[
            _head(entry.id, feature),
            _statistics(feature),
            html.Div(className="columns", children=[html.Div(main), html.Aside(_side(index, entry.id, feature))]),
        ],
    )
    address = "" if view.index else feature_link(entry.id, feature.id, **view.query)
    return Page(content, f"Feature {feature.id}", "features", address)


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
        n=whole("n", STEP),
        seed=whole("seed", 0),
        low=share("low", 0.0),
        high=share("high", 1.0),
    )


def _head(index: str, feature: FeatureSummary) -> html.Header:
    title = feature_name(feature.row, 5)
    return html.Header(
        className="feature-head",
        children=[
            html.Div(
                [
                    html.H1(["Feature ", html.Span(str(feature.id), className="number")]),
                    html.P(title, className="feature-title", dir="auto"),
                ],
            ),
            html.Div(
                className="feature-moves",
                children=[
                    *(
                        link_button(
                            icon(name),
                            href=feature_link(index, other),
                            label=words,
                            className="icon-only",
                            **{"data-key": key},
                        )
                        for name, other, words, key in (
                            ("left", feature.previous, "Previous feature", "ArrowLeft"),
                            ("right", feature.next, "Next feature", "ArrowRight"),
                            ("shuffle", feature.random, "A random feature", "r"),
                        )
                    ),
                    link_button(
                        icon("prompt"),
                        href=prompt_link(index, feature=feature.id),
                        label="Look for it in a prompt",
                        className="icon-only",
                    ),
                    button(
                        icon("link"),
                        label="Copy a link to this view",
                        className="icon-only",
                        **{"data-copy-link": "true"},
                    ),
                ],
            ),
        ],
    )


def _statistics(feature: FeatureSummary) -> html.Dl:
    row = feature.row
    interval = density_interval(row["density_low"], row["density"], row["density_high"])
    shown = [
        stat("density", density(row["density"]), term="density", note=interval, title=exact(row["density"])),
        stat("firings", count(row["n_firings"]), term="firings"),
    ]
    if feature.fires:
        shown += [
            stat("maximum", number(row["max_value"]), term="max", title=exact(row["max_value"])),
            stat("mean", number(row["mean_value"]), term="mean", title=exact(row["mean_value"])),
        ]
        for name, title, form in (
            ("top_token_share", "top token", percent),
            ("token_entropy", "token entropy", lambda value: f"{number(value)} bits"),
        ):
            if row.get(name) is not None:
                term = {"top_token_share": "token_share"}.get(name, name)
                shown.append(stat(title, form(row[name]), term=term, title=exact(row[name])))
    if row.get("encoder_decoder_cosine") is not None:
        cosine = row["encoder_decoder_cosine"]
        shown.append(stat("enc–dec cosine", number(cosine), term="encoder_decoder_cosine", title=exact(cosine)))
    if row.get("over_dense"):
        shown.append(stat("flag", "over-dense", term="over_dense"))
    return stats(shown)


def _no_firings(index: Any, id: str, feature: FeatureSummary) -> html.Div:
    return html.Div(
        [
            states.empty(
                "This feature never fires",
                f"It is zero on all {count(index.n_indexed_rows)} tokens of this index, so there are no examples. What "
                "it would promote and which features point the same way is still known. A larger text may wake it: "
                "index more documents, or look at another feature.",
            ),
            link_button("A random feature that fires", href=feature_link(id, feature.random), className="main-action"),
        ]
    )


def _example_part(context: Context, index: str, feature: FeatureSummary, wanted: ExampleRequest) -> html.Section:
    opened = context.index(index)

    def select(name: str, title: str, values: Any) -> dmc.Select:
        return dmc.Select(
            id=f"examples-{name}",
            data=[{"value": str(value), "label": str(value)} for value in values],
            value=getattr(wanted, name) or None,
            placeholder=title,
            clearable=True,
            searchable=True,
            size="xs",
            className="filter",
            comboboxProps={"shadow": "md"},
            **{"aria-label": title},
        )

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
                    select("language", "Any language", opened.languages),
                    select("source", "Any source", opened.sources),
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
            html.Div(_examples(context, index, feature.id, wanted), id="examples", **{"aria-live": "polite"}),
            _stores(index, feature.id, wanted),
        ],
    )


def _stores(index: str, feature: int, wanted: ExampleRequest) -> html.Div:
    from dash import dcc

    return html.Div(
        [
            dcc.Store(id="feature-of-page", data={"index": index, "feature": feature}),
            dcc.Store(id="examples-request", data=wanted.__dict__),
        ],
        hidden=True,
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
    if not shown:
        where = " and ".join(part for part in (wanted.language, wanted.source) if part) or "this part of the text"
        return states.empty(
            "No examples", f"The feature does not fire in {where}. Clear the filter to see where it does."
        )
    parts: list[Any] = [example_groups(groups, index, scale)]
    if wanted.show == "random" and not (wanted.language or wanted.source):
        parts.append(button(icon("shuffle"), "Draw others", id="examples-again", className="more"))
    elif wanted.show != "quantiles" and shown >= wanted.n and wanted.n < MAX_EXAMPLES:
        parts.append(button(f"Show {STEP} more", id="examples-more", className="more"))
    elif wanted.show == "quantiles":
        parts.append(button(icon("shuffle"), "Draw others", id="examples-again", className="more"))
    return html.Div(parts)


def _side(index: Any, id: str, feature: FeatureSummary) -> list[Any]:
    parts: list[Any] = []
    if feature.fires:
        parts.append(html.Div(_histogram(feature), className="panel"))
        parts.append(
            panel("Fires on", bars.token_list(feature.top_tokens), unit="share of all strength", term="token_share")
        )
    parts.append(_logits(feature))
    if feature.fires:
        for name, frame in (("language", feature.by_language), ("source", feature.by_source)):
            links = {str(value): feature_link(id, feature.id, **{name: value}) for value in frame[name]}
            parts.append(
                panel(f"By {name}", bars.rate_list(frame, links, 6), unit="firings per 1,000 tokens", term="rate")
            )
    if len(feature.neighbours):
        listed = bars.feature_list(feature.neighbours, id, "cosine", "cosine {cosine:.4f}")
        parts.append(panel("Decoder neighbours", listed, unit="cosine", term="neighbours"))
    if len(feature.cofiring):
        title = (
            "{n_both:,} tokens in common, PMI {pmi:.2f} bits, P(it | this) {p_other_given_this:.3f}, "
            "P(this | it) {p_this_given_other:.3f}"
        )
        parts.append(
            panel(
                "Fires with", bars.feature_list(feature.cofiring, id, "jaccard", title), unit="Jaccard", term="cofiring"
            )
        )
    parts.append(panel("In Python", code(_snippet(index, feature.id))))
    return parts


def _histogram(feature: FeatureSummary) -> Any:
    figure = activation_histogram(histogram_frame(feature.edges, feature.counts), theme=theme_of_request())
    words = f"Histogram of {plural(int(feature.counts.sum()), 'firing')}; a click on a bar shows its examples"
    return chart(figure, id="feature-histogram", height=HISTOGRAM_HEIGHT, words=words)


def _logits(feature: FeatureSummary) -> Any:
    if not len(feature.top_logits):
        return panel(
            "Direct logit effects",
            html.P(
                "The index was built without the model, so they are not known. Build it again with the model at hand.",
                className="muted small",
            ),
            term="logits",
        )
    scale = max(feature.top_logits["effect"].abs().max(), feature.bottom_logits["effect"].abs().max())
    two = html.Div(
        className="two",
        children=[
            html.Div(
                [html.H3("Promotes", className="small muted"), bars.logit_list(feature.top_logits, scale, "positive")]
            ),
            html.Div(
                [
                    html.H3("Suppresses", className="small muted"),
                    bars.logit_list(feature.bottom_logits, scale, "negative"),
                ]
            ),
        ],
    )
    return panel("Direct logit effects", two, unit="per unit of strength, before the final norm", term="logits")


def _snippet(index: Any, feature: int) -> str:
    return (
        "from scope.features import FeatureIndex\n\n"
        f'index = FeatureIndex.open("{index.path}")\n'
        f"index.feature({feature})\n"
        f"index.activations([{feature}])  # every firing, as a DataFrame"
    )


def register(app: Dash, context: Context) -> None:
    """What changes within the page: which examples are shown, and the colours of the histogram."""

    @app.callback(
        Output("examples-request", "data"),
        Output("examples-show", "value"),
        Output("examples-language", "value"),
        Output("examples-source", "value"),
        Input("examples-show", "value"),
        Input("examples-language", "value"),
        Input("examples-source", "value"),
        Input("feature-histogram", "clickData"),
        State("examples-request", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def choose(
        show: str,
        language: str | None,
        source: str | None,
        bar: dict[str, Any] | None,
        now: dict[str, Any],
        about: dict[str, Any],
    ) -> tuple[Any, Any, Any, Any]:
        base = ExampleRequest()
        if ctx.triggered_id == "feature-histogram":
            if not bar:
                raise PreventUpdate
            _, counts = context.index(about["index"]).histogram(about["feature"])
            low, high = band_of_bin(counts, int(bar["points"][0]["pointIndex"]))
            return ExampleRequest(show="band", low=low, high=high).__dict__, "", None, None
        if ctx.triggered_id == "examples-show":
            if not show or (show == now["show"] and not (now["language"] or now["source"])):
                raise PreventUpdate
            return {**base.__dict__, "show": show}, no_update, None, None
        if (language or "") == now["language"] and (source or "") == now["source"]:
            raise PreventUpdate
        return {**base.__dict__, "language": language or "", "source": source or ""}, "top", no_update, no_update

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

    @app.callback(
        Output("examples", "children"),
        Input("examples-request", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def show(wanted: dict[str, Any], about: dict[str, Any]) -> Any:
        return _examples(context, about["index"], about["feature"], ExampleRequest(**wanted))

    app.clientside_callback(
        ClientsideFunction("scope", "examplesAddress"),
        Output("examples", "className"),
        Input("examples-request", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("feature-histogram", "figure"),
        Input("theme-now", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def recolour(theme: str, about: dict[str, Any] | None) -> Any:
        if not about:
            raise PreventUpdate
        frame = histogram_frame(*context.index(about["index"]).histogram(about["feature"]))
        figure = activation_histogram(frame, theme="dark" if theme == "dark" else "light")
        return figure.update_layout(height=HISTOGRAM_HEIGHT)
