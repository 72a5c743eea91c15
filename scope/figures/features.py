"""Figures about features: activation histogram, rates, scatter, logit bars, tokens by features."""

from typing import TYPE_CHECKING, Any

import numpy as np

from scope.figures.colours import mix, ramp
from scope.figures.heatmap import heatmap
from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label, one_in, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = [
    "activation_histogram",
    "feature_scatter",
    "histogram_frame",
    "logit_bars",
    "logit_histogram",
    "rate_bars",
    "token_feature_heatmap",
]

STRENGTH = "firing strength (activation × decoder norm)"
BAR_HEIGHT = 20


def histogram_frame(edges: np.ndarray, counts: np.ndarray) -> "pd.DataFrame":
    """`FeatureIndex.histogram`'s result as the frame that `activation_histogram` draws."""
    import pandas as pd

    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "n_firings": counts})


def activation_histogram(
    frame: "pd.DataFrame",
    *,
    theme: Theme = "light",
    title: str = "How strongly it fires",
    log: bool = True,
    colours: list[str] | None = None,
) -> "go.Figure":
    """Columns low, high, n_firings: one bar per bin, coloured as tokens of that strength are, or by `colours`. Empty
    bins stay empty on the logarithmic axis."""
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    counts = frame["n_firings"].to_numpy(dtype=float)
    low, high = frame["low"].to_numpy(dtype=float), frame["high"].to_numpy(dtype=float)
    total = counts.sum()
    hover = [
        f"{short_number(a)} to {short_number(b)}<br>{c:,.0f} firings ({short_number(100 * c / total if total else 0)}%)"
        for a, b, c in zip(low, high, counts, strict=True)
    ]
    scale = {"color": (low + high) / 2, "colorscale": palette.sequential, "cmin": 0}
    bars = {
        "type": "bar",
        "x": (low + high) / 2,
        "y": np.where(counts > 0, counts, np.nan) if log else counts,
        "width": high - low,
        "marker": {
            **(scale if colours is None else {"color": colours}),
            "line": {"color": palette.accent_text, "width": 0.5},
        },
        "hovertext": hover,
        "hoverinfo": "text",
    }
    up: dict[str, Any] = {"title": {"text": "firings" + (" (log scale)" if log else "")}}
    if log:
        up |= {"type": "log", "range": _log_range(counts), "dtick": 1, "tickformat": ",d"}
    layout = {
        "template": template(theme).to_plotly_json(),
        "title": {"text": title},
        "showlegend": False,
        "xaxis": {"title": {"text": STRENGTH}, "rangemode": "tozero"},
        "yaxis": up,
        "bargap": 0,
    }
    # Every page of a feature draws it, and checking what is written here takes most of the time.
    figure = go.Figure({"data": [bars], "layout": layout}, _validate=False)
    if not total:
        _say(figure, "It never fires on this text.", theme)
    return figure


def _log_range(counts: np.ndarray) -> list[float]:
    """From a little below one firing, so that a bin with a single one can be seen, to above the largest."""
    return [-0.2, float(np.log10(max(counts.max(initial=1.0), 10.0))) + 0.1]


def rate_bars(
    frame: "pd.DataFrame", *, theme: Theme = "light", title: str | None = None, limit: int = 30
) -> "go.Figure":
    """First column (language, source, …), rate, rate_low, rate_high: how often a feature fires within each group,
    with its interval. Rates, never counts: groups have unlike sizes. The first `limit` rows are drawn."""
    palette = PALETTES[theme]
    group = str(frame.columns[0])
    frame = frame.head(limit).iloc[::-1]
    rate = frame["rate"].to_numpy(dtype=float)
    figure = _figure(theme, title or f"How often it fires, by {group}")
    figure.add_bar(
        x=rate * 1000,
        y=[as_label(str(name)) for name in frame[group]],
        orientation="h",
        marker={"color": palette.accent},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (frame["rate_high"].to_numpy(dtype=float) - rate) * 1000,
            "arrayminus": (rate - frame["rate_low"].to_numpy(dtype=float)) * 1000,
            "color": palette.text,
            "thickness": 1,
            "width": 2,
        },
        hovertext=[f"{as_label(str(n))}: {one_in(r)} tokens" for n, r in zip(frame[group], rate, strict=True)],
        hoverinfo="text",
    )
    figure.update_xaxes(title_text="firings per 1,000 tokens, with 95% interval", rangemode="tozero")
    figure.update_yaxes(title_text=group, showline=False, ticks="")
    figure.update_layout(height=_height(len(frame)), bargap=0.25)
    return figure


def feature_scatter(
    frame: "pd.DataFrame",
    x: str = "density",
    y: str = "max_value",
    *,
    colour: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    theme: Theme = "light",
    title: str | None = None,
) -> "go.Figure":
    """One point per feature, for any two numeric columns of the feature table. `customdata` holds the feature ids.

    Args:
        frame: columns feature, `x`, `y`, and top_token for the hover where it is there.
        colour: a further numeric column, or a categorical one (the eight commonest values, the rest as "other").
    """
    figure = _figure(theme, title or f"{_words(y)} against {_words(x)}, one point per feature")
    if colour is not None and frame[colour].dtype.kind not in "iufb":
        values = frame[colour].fillna("none").astype(str)
        named = list(values.value_counts().index[: len(PALETTES[theme].categories) - 1])
        groups = values.where(values.isin(named), "other")
        for name in [*named, *(["other"] if (groups == "other").any() else [])]:
            figure.add_trace(_points(frame[groups == name], x, y, name=as_label(name)))
        beside = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top", "itemsizing": "constant"}
        figure.update_layout(showlegend=True, legend=beside)
    else:
        marker: dict[str, Any] = {"color": PALETTES[theme].accent_text}
        if colour is not None:
            marker = {
                "color": frame[colour],
                "colorscale": _strong_scale(theme),
                "colorbar": {"title": {"text": _words(colour), "side": "right"}, "thickness": 10, "outlinewidth": 0},
            }
        figure.add_trace(_points(frame, x, y, marker=marker))
    figure.update_xaxes(title_text=_words(x) + (" (log scale)" if log_x else ""), type="log" if log_x else "linear")
    figure.update_yaxes(title_text=_words(y) + (" (log scale)" if log_y else ""), type="log" if log_y else "linear")
    figure.update_layout(dragmode="select")
    return figure


def _points(frame: "pd.DataFrame", x: str, y: str, **trace: Any) -> "go.Scattergl":
    import plotly.graph_objects as go

    tokens = frame["top_token"] if "top_token" in frame else [""] * len(frame)
    hover = [
        f"feature {feature}<br>{as_label(str(token))}<br>{_words(x)} {short_number(a)}<br>{_words(y)} {short_number(b)}"
        for feature, token, a, b in zip(frame["feature"], tokens, frame[x], frame[y], strict=True)
    ]
    marker = {"size": 4, "opacity": 0.6, **trace.pop("marker", {})}
    return go.Scattergl(
        x=frame[x],
        y=frame[y],
        mode="markers",
        marker=marker,
        customdata=frame["feature"],
        hovertext=hover,
        hoverinfo="text",
        **trace,
    )


def logit_bars(
    frame: "pd.DataFrame",
    *,
    theme: Theme = "light",
    title: str = "Tokens that it makes more and less likely",
    unit: str = "logit per unit of firing strength",
    limit: int = 20,
) -> "go.Figure":
    """Columns token, effect: the `limit` largest of either sign as bars, positive above negative."""
    palette = PALETTES[theme]
    ordered = frame.sort_values("effect", ascending=False, kind="stable")
    chosen = ordered if len(ordered) <= 2 * limit else ordered.iloc[[*range(limit), *range(-limit, 0)]]
    chosen = chosen.iloc[::-1]
    effect = chosen["effect"].to_numpy(dtype=float)
    figure = _figure(theme, title)
    figure.add_bar(
        x=effect,
        y=np.arange(len(chosen)),
        orientation="h",
        marker={"color": np.where(effect < 0, palette.negative, palette.positive)},
        hovertext=[f"{as_label(t)}: {e:+.4g}" for t, e in zip(chosen["token"], effect, strict=True)],
        hoverinfo="text",
    )
    figure.update_xaxes(title_text=unit, zeroline=True, zerolinecolor=palette.rule)
    labels = [as_label(token, 24) for token in chosen["token"]]
    figure.update_yaxes(tickvals=np.arange(len(chosen)), ticktext=labels, showline=False, ticks="", title_text="token")
    figure.update_layout(height=_height(len(chosen)), bargap=0.25)
    return figure


def logit_histogram(
    edges: np.ndarray,
    counts: np.ndarray,
    *,
    theme: Theme = "light",
    title: str = "Effects on all tokens' logits",
    unit: str = "logit per unit of firing strength",
) -> "go.Figure":
    """One bar per bin of `edges` `(n + 1,)`, `counts` `(n,)` tokens each, on a logarithmic axis: negative effects in
    the negative colour, positive ones in the positive."""
    palette = PALETTES[theme]
    middles, numbers = (edges[:-1] + edges[1:]) / 2, counts.astype(float)
    figure = _figure(theme, title)
    figure.add_bar(
        x=middles,
        y=np.where(numbers > 0, numbers, np.nan),
        width=np.diff(edges),
        marker={"color": [palette.negative if middle < 0 else palette.positive for middle in middles.tolist()]},
        hovertext=[
            f"{short_number(a)} to {short_number(b)}<br>{c:,.0f} tokens"
            for a, b, c in zip(edges[:-1].tolist(), edges[1:].tolist(), numbers.tolist(), strict=True)
        ],
        hoverinfo="text",
    )
    figure.update_xaxes(title_text=unit, zeroline=True, zerolinecolor=palette.rule)
    figure.update_yaxes(
        title_text="tokens (log scale)", type="log", range=_log_range(numbers), dtick=1, tickformat=",d"
    )
    figure.update_layout(bargap=0)
    return figure


def token_feature_heatmap(
    frame: "pd.DataFrame",
    tokens: list[str] | tuple[str, ...],
    *,
    features: list[int] | None = None,
    labels: dict[int, str] | None = None,
    limit: int = 40,
    theme: Theme = "light",
    title: str = "Which features fire on which token",
) -> "go.Figure":
    """Columns position, feature, value: one row per feature, one column per token, colour is firing strength.

    Args:
        tokens: display strings of all positions.
        features: which to draw, top down; otherwise the `limit` with the strongest firings.
        labels: names of features, shown beside their ids.
    """
    if features is None:
        strongest = frame.groupby("feature")["value"].max().sort_values(ascending=False, kind="stable")
        features = [int(feature) for feature in strongest.index[:limit]]
    row_of = {feature: row for row, feature in enumerate(features)}
    chosen = frame[frame["feature"].isin(features)]
    strengths = np.full((len(features), len(tokens)), np.nan)
    strengths[[row_of[int(f)] for f in chosen["feature"]], chosen["position"].to_numpy(dtype=int)] = chosen["value"]
    names = [f"{f} {as_label((labels or {}).get(f, ''), 24)}".rstrip() for f in features]
    hover = [
        [f"{name}<br>{as_label(token)}<br>{short_number(value)}" for token, value in zip(tokens, row, strict=True)]
        for name, row in zip(names, strengths, strict=True)
    ]
    figure = heatmap(
        strengths,
        hover,
        theme=theme,
        title=title,
        measure="firing strength",
        hoverongaps=False,
        customdata=np.broadcast_to(np.array(features, dtype=int)[:, None], strengths.shape),
    )
    ticks = [as_label(token, 12) for token in tokens]
    figure.update_xaxes(tickvals=np.arange(len(tokens)), ticktext=ticks, title_text="token", tickangle=-60, ticks="")
    figure.update_yaxes(
        tickvals=np.arange(len(features)), ticktext=names, title_text="feature", autorange="reversed", ticks=""
    )
    figure.update_layout(height=_height(len(features)) + 60, width=max(480, 18 * len(tokens) + 220), autosize=False)
    if not features:
        _say(figure, "No feature fires on this text.", theme)
    return figure


def _figure(theme: Theme, title: str) -> "go.Figure":
    import plotly.graph_objects as go

    return go.Figure(layout={"template": template(theme), "title": {"text": title}, "showlegend": False})


def _say(figure: "go.Figure", words: str, theme: Theme) -> None:
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    figure.add_annotation(text=words, showarrow=False, font={"color": PALETTES[theme].muted}, **place)


def _strong_scale(theme: Theme) -> list[tuple[float, str]]:
    """The accent for points, which need an edge against the page: it starts where the page ends."""
    palette = PALETTES[theme]
    return ramp(mix(palette.page, palette.accent, 0.35), palette.accent_text)


def _height(n_bars: int) -> int:
    return 110 + BAR_HEIGHT * max(n_bars, 3)


def _words(column: str) -> str:
    return column.replace("_", " ")
