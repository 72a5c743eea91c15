"""What is known of a feature over a larger text than the index's: what the feature page shows of an excerpt."""

from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, html
from dash.exceptions import PreventUpdate

from dashboards.components import bars, states
from dashboards.components.charts import HISTOGRAM_HEIGHT, chart, strength_histogram, theme_of_request
from dashboards.components.controls import define, panel
from dashboards.components.examples import example_groups
from dashboards.components.stats import interval, stat, stats
from dashboards.components.strip import legend
from dashboards.context import Context
from dashboards.format import count, density, exact, number, plural
from dashboards.queries import ExampleGroup, band_title

if TYPE_CHECKING:
    from scope.features.excerpt import FeatureExcerpt
    from scope.features.index import FeatureIndex

__all__ = ["excerpt_part", "register"]

SHOWS = (("top", "Top"), ("quantiles", "Quantiles"))
SHOWN_GROUPS = 6
"""Languages that are listed at once."""


def excerpt_part(context: Context, index: "FeatureIndex", feature: int, shown: str) -> Any:
    """The section, None where the workspace has no excerpt of the index's SAE.

    Args:
        context: the dashboard's.
        index: the index of the page.
        feature: the feature.
        shown: "top" or "quantiles", which of its examples.
    """
    try:
        excerpt = context.excerpt(index)
        if excerpt is None:
            return None
        content = _content(excerpt, feature, shown)
    except Exception as problem:
        return states.error(problem, "What is known over the whole sample could not be read")
    title = f"Over the whole sample: {_tokens(excerpt.n_rows)} tokens"
    section = panel(title, *content, term="excerpt")
    section.className = "panel excerpt"
    return html.Div([section, html.H2(f"In this index: {_tokens(index.n_rows)} tokens", className="here")])


def _tokens(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 10**6 else count(n)


def _content(excerpt: "FeatureExcerpt", feature: int, shown: str) -> list[Any]:
    row = excerpt.row(feature)
    if row["dead"]:
        words = f"The feature never fires on any of the {count(excerpt.n_indexed_rows)} tokens."
        return [html.P(words, className="muted")]
    drawn = interval(row["density_low"], row["density"], row["density_high"], density)
    figures = [
        stat("density", density(row["density"]), term="density", note=drawn, title=exact(row["density"])),
        stat("firings", count(row["n_firings"])),
        *(
            stat(title, number(row[name]), title=exact(row[name]))
            for title, name in (("maximum", "max_value"), ("mean", "mean_value"), ("median", "q50"))
        ),
    ]
    return [stats(figures), _distribution(excerpt, feature), *_example_part(excerpt, feature, shown)]


def _distribution(excerpt: "FeatureExcerpt", feature: int) -> html.Details:
    """How strongly, on which tokens and in which languages it fires, folded."""
    edges, counts = excerpt.histogram(feature)
    words = f"Histogram of {plural(int(counts.sum()), 'firing')} over the whole sample"
    figure = strength_histogram(edges, counts, theme_of_request())
    parts = [html.Div(chart(figure, id="excerpt-histogram", height=HISTOGRAM_HEIGHT, words=words))]
    if excerpt.has_text:
        tokens = bars.token_list(excerpt.top_tokens(feature))
        parts.append(html.Div([html.H3("Share of all strength", className="small muted"), tokens]))
    for name, frame in (("language", excerpt.by_language(feature)), ("source", excerpt.by_source(feature))):
        rates = bars.rate_list(frame, {}, SHOWN_GROUPS)
        title = html.H3(f"Firings per 1,000 tokens, by {name}", className="small muted")
        parts.append(html.Div([title, rates]))
    return html.Details([html.Summary("How strongly, on what, in which languages"), html.Div(parts, className="two")])


def _example_part(excerpt: "FeatureExcerpt", feature: int, shown: str) -> list[Any]:
    if not excerpt.has_text:
        missing = states.empty(
            "The text of its examples is not here yet",
            "Examples are kept as places in the text. The demo reads the text of its own SAE; "
            "FeatureExcerpt.read_text reads that of any.",
            command="scope demo",
        )
        return [missing]
    chosen = shown if shown in dict(SHOWS) else SHOWS[0][0]
    toolbar = html.Div(
        className="toolbar",
        children=[
            dmc.SegmentedControl(
                id="excerpt-show",
                data=[{"value": value, "label": label} for value, label in SHOWS],
                value=chosen,
                size="xs",
                **{"aria-label": "Which examples of the whole sample"},
            ),
            html.Div(
                [legend(float(excerpt.row(feature)["max_value"])), define("strength")],
                className="push legend-with-help",
            ),
        ],
    )
    return [toolbar, html.Div(_examples(excerpt, feature, chosen), id="excerpt-examples")]


def _examples(excerpt: "FeatureExcerpt", feature: int, shown: str) -> Any:
    if shown == "quantiles":
        bands = enumerate(excerpt.bands)
        groups = [ExampleGroup(band_title(*band), tuple(excerpt.band_examples(feature, at))) for at, band in bands]
    else:
        groups = [ExampleGroup("", tuple(excerpt.top_examples(feature)))]
    scale = float(excerpt.row(feature)["max_value"])
    return example_groups([group for group in groups if group.examples], None, scale)


def register(app: Dash, context: Context) -> None:
    """Which of its examples are shown, and the colours of its histogram."""

    def excerpt_of(about: dict[str, Any] | None) -> "FeatureExcerpt":
        excerpt = context.excerpt(context.index(about["index"])) if about else None
        if excerpt is None:
            raise PreventUpdate
        return excerpt

    @app.callback(
        Output("excerpt-examples", "children"),
        Input("excerpt-show", "value"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def show(shown: str, about: dict[str, Any] | None) -> Any:
        try:
            return _examples(excerpt_of(about), (about or {})["feature"], shown)
        except PreventUpdate:
            raise
        except Exception as problem:
            return states.error(problem, "These examples could not be shown")

    app.clientside_callback(
        ClientsideFunction("scope", "excerptAddress"),
        Output("excerpt-examples", "className"),
        Input("excerpt-show", "value"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("excerpt-histogram", "figure"),
        Input("theme-now", "data"),
        State("feature-of-page", "data"),
        prevent_initial_call=True,
    )
    def recolour(theme: str, about: dict[str, Any] | None) -> Any:
        edges, counts = excerpt_of(about).histogram((about or {})["feature"])
        return strength_histogram(edges, counts, "dark" if theme == "dark" else "light")
