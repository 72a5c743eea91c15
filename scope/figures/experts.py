"""Figures of mixtures of experts: which experts the tokens of each group go to."""

from typing import TYPE_CHECKING

import numpy as np

from scope.figures.heatmap import heatmap
from scope.figures.template import Theme
from scope.figures.text import as_label, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["expert_heatmap"]


def expert_heatmap(
    frame: "pd.DataFrame", y: str = "share", *, theme: Theme = "light", title: str = "Tokens that went to each expert"
) -> "go.Figure":
    """Columns group, expert, tokens, share, lift (`scope.features.experts.expert_load`): a row per group, a column per
    expert.

    Args:
        frame: what to draw; many groups make a tall figure, so best the largest alone.
        y: what is shown as colour: "share" or "lift".
    """
    wide = frame.pivot(index="group", columns="expert", values=y)
    tokens = frame.pivot(index="group", columns="expert", values="tokens").to_numpy()
    hover = [
        [
            f"{as_label(str(group), 24)}, expert {expert}<br>{y} {short_number(value)}, {number:,} tokens"
            for expert, value, number in zip(wide.columns, values, numbers, strict=True)
        ]
        for group, values, numbers in zip(wide.index, wide.to_numpy(), tokens, strict=True)
    ]
    figure = heatmap(wide.to_numpy(), hover, theme=theme, title=title, measure=y)
    places, names = np.arange(len(wide)), [as_label(str(group), 18) for group in wide.index]
    figure.update_xaxes(title_text="expert", tickvals=np.arange(len(wide.columns)), ticktext=list(wide.columns))
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", ticks="")
    return figure.update_layout(height=150 + 22 * len(wide))
