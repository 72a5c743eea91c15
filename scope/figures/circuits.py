"""Figures of circuits: what verifying a graph has measured against what the graph predicts, and how much of a behaviour
a circuit carries."""

from typing import TYPE_CHECKING

import numpy as np

from scope.figures.template import PALETTES, Theme, template

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["faithfulness_curves", "verification_scatter"]

MAX_POINTS = 1500
PANELS = (("measured", "In the model"), ("measured_random", "Random features instead"))
COVERED = 0.995
"""Share of the points that the axes reach to; the rest stand at their ends."""

_WORDS = {"kept": "errors kept", "ablated": "errors ablated"}


def verification_scatter(
    pairs: "pd.DataFrame",
    *,
    theme: Theme = "light",
    title: str = "Measured changes against predicted ones",
) -> "go.Figure":
    """Columns predicted, measured, measured_random (`Verification.pairs`): a point for each intervention and node
    behind it, the random control beside; the line is where both are equal. At most `MAX_POINTS` points, always the
    same ones."""
    from plotly.subplots import make_subplots

    palette = PALETTES[theme]
    moved = pairs[pairs["predicted"] != 0]
    if len(moved) > MAX_POINTS:
        moved = moved.iloc[np.sort(np.random.default_rng(0).choice(len(moved), MAX_POINTS, replace=False))]
    columns = ["predicted", *(name for name, _ in PANELS)]
    end = float(np.quantile(np.abs(moved[columns].to_numpy(dtype="float64")), COVERED)) if len(moved) else 1.0
    end = end or 1.0
    figure = make_subplots(
        cols=2, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=[name for _, name in PANELS]
    )
    figure.update_layout(template=template(theme), title={"text": title}, showlegend=False, margin={"t": 74})
    figure.update_annotations(font={"size": 12, "color": palette.muted})
    x = moved["predicted"].to_numpy(dtype="float64")
    for column, (name, _) in enumerate(PANELS, 1):
        y = moved[name].to_numpy(dtype="float64")
        agrees = np.sign(x) == np.sign(y)
        figure.add_scatter(
            x=np.clip(x, -end, end),
            y=np.clip(y, -end, end),
            mode="markers",
            marker={
                "size": 5,
                "opacity": 0.6,
                "color": [palette.categories[0] if one else palette.categories[4] for one in agrees],
                "symbol": ["circle" if one else "x-thin-open" for one in agrees],
            },
            customdata=np.stack([x, y], -1) if len(x) else None,
            hovertemplate="predicted %{customdata[0]:.3g}<br>measured %{customdata[1]:.3g}<extra></extra>",
            row=1,
            col=column,
        )
        ends = [-end, end]
        line = {"color": palette.muted, "width": 1, "dash": "dot"}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", row=1, col=column)
    figure.update_xaxes(title_text="predicted change", range=[-1.04 * end, 1.04 * end])
    figure.update_yaxes(range=[-1.04 * end, 1.04 * end])
    figure.update_yaxes(title_text="measured change", col=1)
    return figure


def faithfulness_curves(
    table: "pd.DataFrame",
    *,
    theme: Theme = "light",
    title: str = "What is left when only some features are kept",
) -> "go.Figure":
    """The share of a target that circuits of each size keep, beside random circuits of that size.

    Args:
        table: as `scope.attribution.faithfulness` returns it, or `graph_faithfulness(…).table`: nodes, errors, size,
            faithfulness, low and high.
        theme: of the figure.
        title: of the figure.
    """
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure()
    for number, (errors, own) in enumerate(table.groupby("errors", sort=False)):
        colour, words = palette.categories[number], _WORDS[str(errors)]
        for kind, points in own[own["nodes"] != "all"].sort_values("size").groupby("nodes"):
            is_random = kind == "random"
            above, below = points["high"] - points["faithfulness"], points["faithfulness"] - points["low"]
            around = {"symmetric": False, "thickness": 1, "array": above, "arrayminus": below}
            figure.add_scatter(
                x=points["size"],
                y=points["faithfulness"],
                error_y=around if is_random else None,
                mode="lines+markers",
                line={"color": colour, "width": 1.6, "dash": "dot" if is_random else "solid"},
                marker={"size": 5},
                name=f"{'random features' if is_random else 'this circuit'}, {words}",
                hovertemplate="%{x:,} features: %{y:.1%}<extra></extra>",
            )
        for whole in own[own["nodes"] == "all"].itertuples():
            figure.add_hline(
                y=whole.faithfulness,
                line={"color": colour, "width": 1, "dash": "dash"},
                annotation={"text": f"all {whole.size:,} features, {words}", "font": {"size": 11}},
                annotation_position="bottom left",
            )
    figure.update_layout(
        template=template(theme),
        title={"text": title},
        xaxis={"title": {"text": "features kept"}, "type": "log" if _is_wide(table) else "linear"},
        yaxis={"title": {"text": "share of the target that is left"}, "tickformat": ".0%"},
    )
    return figure


def _is_wide(table: "pd.DataFrame") -> bool:
    sizes = table.loc[(table["nodes"] != "all") & (table["size"] > 0), "size"]
    return len(sizes) > 0 and sizes.max() > 50 * sizes.min()
