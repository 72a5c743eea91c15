"""Figures of per-layer embeddings: what each layer's table wrote into the residual stream, token by token."""

from typing import TYPE_CHECKING

import numpy as np

from scope.figures.heatmap import heatmap
from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["per_layer_bars", "per_layer_heatmap"]

CELL = (56, 20)
"""Pixels."""
NAMES = {"table": "the layer's table", "projection": "projection of the main embedding"}


def per_layer_heatmap(
    frame: "pd.DataFrame", part: str = "table", *, theme: Theme = "light", title: str | None = None
) -> "go.Figure":
    """Columns layer, position, token, part, norm, share (`PerLayerReport.writes`): a row per layer, the last on top,
    the part's share of the residual stream's norm as colour."""
    rows = frame[frame["part"] == part]
    share = rows.pivot(index="layer", columns="position", values="share")
    norm = rows.pivot(index="layer", columns="position", values="norm").to_numpy()
    tokens = rows.drop_duplicates("position").set_index("position")["token"].reindex(share.columns)
    hover = [
        [
            f"layer {layer}, {as_label(token, 24)}<br>share of the residual {short_number(value)}, "
            f"norm {short_number(size)}"
            for token, value, size in zip(tokens, values, sizes, strict=True)
        ]
        for layer, values, sizes in zip(share.index, share.to_numpy(), norm, strict=True)
    ]
    title = title or f"Written into the residual by {NAMES[part]}"
    figure = heatmap(share.to_numpy(), hover, theme=theme, title=title, measure="share of the residual's norm")
    figure.update_xaxes(
        tickvals=np.arange(len(tokens)),
        ticktext=[as_label(token, 12) for token in tokens],
        title_text="token",
        ticks="",
    )
    figure.update_yaxes(
        tickvals=np.arange(len(share)), ticktext=[str(one) for one in share.index], title_text="layer", ticks=""
    )
    width, height = 180 + CELL[0] * len(tokens), 140 + CELL[1] * len(share)
    return figure.update_layout(width=max(width, 480), height=height, autosize=False)


def per_layer_bars(frame: "pd.DataFrame", position: int, *, theme: Theme = "light") -> "go.Figure":
    """Columns layer, position, token, part, share (`PerLayerReport.writes`): the shares of both parts at one token, a
    pair of bars for each layer."""
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    rows = frame[frame["position"] == position]
    token = as_label(str(rows["token"].iloc[0]), 24) if len(rows) else ""
    figure = go.Figure(
        layout={"template": template(theme), "title": {"text": f"Per-layer embeddings at {token}"}, "barmode": "group"}
    )
    for place, (part, name) in enumerate(NAMES.items()):
        own = rows[rows["part"] == part]
        figure.add_bar(
            x=own["layer"],
            y=own["share"],
            name=name,
            marker={"color": palette.categories[place % len(palette.categories)]},
            hovertemplate=f"layer %{{x}}: %{{y:.3g}}<extra>{name}</extra>",
        )
    figure.update_xaxes(title_text="layer", dtick=1 if len(rows) <= 40 else None)
    figure.update_yaxes(title_text="share of the residual's norm", rangemode="tozero")
    return figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}, margin={"b": 70})
