"""Lists whose rows carry a bar: logits, tokens, neighbours, rates with their intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.strip import token
from dashboards.format import exact, number, percent, plural
from dashboards.links import feature_link
from dashboards.queries import records

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cofiring_table", "feature_list", "logit_list", "rate_list", "token_list", "value_list"]


def _row(share: float, *children: Any, title: str | None = None) -> html.Li:
    return html.Li(list(children), title=title, style={"--v": f"{max(0.0, min(1.0, share)):.3f}"})


def _value(text: str, exact_value: float | None = None) -> html.Span:
    return html.Span(text, className="number", title=None if exact_value is None else exact(exact_value))


def logit_list(frame: "pd.DataFrame", scale: float, kind: str) -> html.Ul:
    """Tokens whose logit a feature moves; columns token, effect. `kind`: "positive" or "negative"."""
    return html.Ul(
        className=f"bars {kind}",
        children=[
            _row(
                abs(effect) / scale if scale else 0,
                html.Span(token(str(text)), className="name"),
                _value(("+" if effect > 0 else "") + number(effect), effect),
            )
            for text, effect in zip(frame["token"], frame["effect"], strict=True)
        ],
    )


def token_list(frame: "pd.DataFrame") -> html.Ul:
    """Tokens that a feature fires on; columns token, mean_value, count, share."""
    return html.Ul(
        className="bars",
        children=[
            _row(
                row["share"],
                html.Span(token(str(row["token"])), className="name"),
                _value(percent(row["share"]), row["share"]),
                title=f"{plural(int(row['count']), 'firing')}, mean strength {number(row['mean_value'])}",
            )
            for row in records(frame)
        ],
    )


def value_list(tokens: Sequence[str], values: Sequence[float]) -> html.Ul:
    """Tokens with a strength each, the largest first."""
    largest = max((float(value) for value in values), default=0.0) or 1.0
    return html.Ul(
        className="bars",
        children=[
            _row(float(value) / largest, html.Span(token(text), className="name"), _value(number(value), float(value)))
            for text, value in zip(tokens, values, strict=True)
        ],
    )


def _feature_name(row: Mapping[str, Any], index: str, names: Mapping[int, str]) -> html.A:
    feature = int(row["feature"])
    label = names.get(feature, "")
    shown = html.Span(label, dir="auto") if label else token(str(row["top_token"] or ""))
    return html.A(
        [html.Span(str(feature), className="id"), shown],
        href=feature_link(index, feature),
        className="name",
        title=f"Feature {feature}{': ' + label if label else ''}",
    )


def cofiring_table(frame: "pd.DataFrame", index: str, names: Mapping[int, str]) -> html.Div:
    """Features that fire on the same tokens, with every measure; a head sorts by it (assets/45_document.js)."""

    def head(name: str, title: str, words: str) -> html.Th:
        sort = html.Button(title, type="button", className="sort", title=words, **{"data-sort": name})
        return html.Th(sort, className="number", **{"aria-sort": "descending" if name == "jaccard" else "none"})

    def cell(row: Mapping[str, Any], name: str) -> html.Td:
        value = float(row[name])
        words = percent(value) if name.startswith("p_") else number(value)
        return html.Td(words, className="number", title=exact(value), **{"data-sort": name, "data-value": str(value)})

    measures = ("jaccard", "pmi", "p_other_given_this", "p_this_given_other")
    body = [
        html.Tr(
            [html.Td(_feature_name(row, index, names)), *(cell(row, name) for name in measures)],
            title=f"{plural(int(row['n_both']), 'token')} in common",
        )
        for row in records(frame)
    ]
    heads = [
        head("jaccard", "Jaccard", "tokens with both / tokens with either"),
        head("pmi", "PMI", "pointwise mutual information, in bits"),
        head("p_other_given_this", "P(it | this)", "share of this feature's tokens on which it fires too"),
        head("p_this_given_other", "P(this | it)", "share of its tokens on which this feature fires too"),
    ]
    table = html.Table([html.Thead(html.Tr([html.Th("Feature"), *heads])), html.Tbody(body)], className="cofiring")
    return html.Div(
        table, className="scroll", tabIndex=0, role="region", **{"aria-label": "Features that fire with it"}
    )


def feature_list(
    frame: "pd.DataFrame", index: str, column: str, title: str, names: Mapping[int, str] | None = None
) -> html.Ul:
    """Other features, linked; columns feature, top_token and the measure `column` from 0 to 1. `names`: labels."""
    names = names or {}
    return html.Ul(
        className="bars neutral",
        children=[
            _row(
                row[column],
                _feature_name(row, index, names),
                _value(number(row[column]), row[column]),
                title=title.format(**row),
            )
            for row in records(frame)
        ],
    )


def rate_list(frame: "pd.DataFrame", links: Mapping[str, str], limit: int) -> html.Div:
    """How often a feature fires in each group, with the interval drawn; the first column names the group.

    Args:
        frame: name, rate, rate_low, rate_high, n_firings, n_rows, the highest rate first.
        links: per name the address of its examples, where there is one.
        limit: rows to show at once; the rest unfolds.
    """
    name = str(frame.columns[0])
    end = float(frame["rate_high"].where(frame["n_firings"] > 0, frame["rate"]).max()) or 1.0
    rows = [
        _row(
            row["rate"] / end,
            html.A(str(row[name]), href=links[str(row[name])], className="name")
            if row["n_firings"] and str(row[name]) in links
            else html.Span(str(row[name]), className="name" if row["n_firings"] else "name muted"),
            _value(number(1000 * row["rate"]), 1000 * row["rate"]),
            *(
                [
                    html.Span(
                        className="whisker",
                        style={
                            "--low": f"{row['rate_low'] / end:.3f}",
                            "--high": f"{min(1, row['rate_high'] / end):.3f}",
                        },
                    )
                ]
                if row["n_firings"]
                else []
            ),
            title=(
                f"{plural(int(row['n_firings']), 'firing')} on {plural(int(row['n_rows']), 'token')}; 95% interval "
                f"{number(1000 * row['rate_low'])} to {number(1000 * row['rate_high'])} per 1,000"
            ),
        )
        for row in records(frame)
    ]
    shown = [html.Ul(rows[:limit], className="bars")]
    if len(rows) > limit:
        shown.append(
            html.Details(
                [
                    html.Summary(f"{len(rows) - limit} more", className="small muted"),
                    html.Ul(rows[limit:], className="bars"),
                ]
            )
        )
    return html.Div(shown)
