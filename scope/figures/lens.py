"""Figures of the logit lens: the likeliest tokens by layer and position, and tokens followed over the layers."""

from typing import TYPE_CHECKING

import numpy as np

from scope.figures.heatmap import heatmap
from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["lens_heatmap", "lens_lines"]

CELL = (72, 24)
"""Pixels."""


def lens_heatmap(
    frame: "pd.DataFrame", *, theme: Theme = "light", title: str = "Likeliest next token after each layer"
) -> "go.Figure":
    """Columns layer, position, token, top_token, probability (`LogitLens.cells`): a row per layer, the last on top,
    the likeliest token in each cell, its probability as colour."""
    wide = frame.pivot(index="layer", columns="position", values="probability")
    words = frame.pivot(index="layer", columns="position", values="top_token")
    tokens = frame.drop_duplicates("position").set_index("position")["token"].reindex(wide.columns)
    labels = [[as_label(token, 10) for token in row] for row in words.to_numpy()]
    hover = [
        [
            f"layer {layer}, after {as_label(token, 24)}<br>{as_label(word, 24)}: {short_number(share)}"
            for token, word, share in zip(tokens, row, shares, strict=True)
        ]
        for layer, row, shares in zip(wide.index, words.to_numpy(), wide.to_numpy(), strict=True)
    ]
    figure = heatmap(
        wide.to_numpy(),
        hover,
        theme=theme,
        title=title,
        measure="probability",
        zmax=1,
        text=labels,
        texttemplate="%{text}",
        textfont={"size": 11, "color": PALETTES[theme].text},
    )
    figure.update_xaxes(
        tickvals=np.arange(len(tokens)), ticktext=[as_label(t, 12) for t in tokens], title_text="after token", ticks=""
    )
    figure.update_yaxes(
        tickvals=np.arange(len(wide)), ticktext=[str(one) for one in wide.index], title_text="layer", ticks=""
    )
    width, height = 160 + CELL[0] * len(tokens), 130 + CELL[1] * len(wide)
    return figure.update_layout(width=max(width, 480), height=height, autosize=False)


def lens_lines(
    frame: "pd.DataFrame",
    y: str = "probability",
    *,
    plain: "pd.DataFrame | None" = None,
    sae_layer: int | None = None,
    theme: Theme = "light",
    title: str | None = None,
) -> "go.Figure":
    """Columns layer, followed, followed_id, probability, rank (`LogitLens.followed`, of one position): a line per
    token over the layers. Ranks are on a logarithmic axis, the likeliest on top.

    Args:
        frame: what to draw.
        y: "probability" or "rank".
        plain: the same of the model without the SAE, drawn as dotted lines.
        sae_layer: marked by a line.
    """
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure(layout={"template": template(theme), "title": {"text": title or f"{y.capitalize()} by layer"}})
    for which, dash in ((plain, "dot"), (frame, "solid")):
        for place, (token, rows) in enumerate([] if which is None else which.groupby("followed_id", sort=False)):
            name = as_label(str(rows["followed"].iloc[0]), 24)
            figure.add_scatter(
                x=rows["layer"],
                y=rows[y],
                mode="lines" if dash == "dot" else "lines+markers",
                name=name,
                legendgroup=str(token),
                showlegend=dash == "solid",
                line={"color": palette.categories[place % len(palette.categories)], "dash": dash, "width": 1.75},
                marker={"size": 5},
                hovertext=[
                    f"{name}{' without the SAE' if dash == 'dot' else ''}<br>layer {layer}: {y} {short_number(value)}"
                    for layer, value in zip(rows["layer"], rows[y], strict=True)
                ],
                hoverinfo="text",
            )
    if sae_layer is not None:
        figure.add_vline(x=sae_layer, line={"color": palette.muted, "width": 1, "dash": "dash"})
        figure.add_annotation(x=sae_layer, y=1, yref="paper", text="SAE", showarrow=False, yshift=8, xanchor="left")
    last = float(frame["layer"].max()) if len(frame) else 1.0
    figure.update_xaxes(title_text="layer", range=[-0.02 * last - 0.2, last * 1.02 + 0.2])
    if y == "rank":
        most = max(float(frame["rank"].max()) if len(frame) else 1.0, 10.0)
        figure.update_yaxes(type="log", range=[np.log10(most) + 0.1, -0.1], dtick=1, title_text="rank (log scale)")
    else:
        figure.update_yaxes(range=[-0.02, 1.02], title_text="probability")
    return figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
        margin={"l": 56, "r": 16, "t": 40, "b": 70},
        hovermode="closest",
    )
