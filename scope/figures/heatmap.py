"""The form that all figures of cells have: coloured from 0 up, with a gap between cells and words for each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.figures.template import PALETTES, Theme, template

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["heatmap"]


def heatmap(
    values: np.ndarray, hover: Sequence[Sequence[str]], *, theme: Theme, title: str, measure: str, **cells: Any
) -> "go.Figure":
    """A figure of cells.

    Args:
        values: `(rows, columns)`; NaN leaves a cell empty.
        hover: what is said of each cell, markup escaped.
        theme: of the figure.
        title: of the figure.
        measure: what the colour is.
        cells: further properties of Plotly's heatmap.
    """
    import plotly.graph_objects as go

    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    cells = {"zmax": largest or 1.0} | cells  # Plotly heeds zmin only beside a zmax
    figure = go.Figure(layout={"template": template(theme), "title": {"text": title}, "showlegend": False})
    return figure.add_heatmap(
        z=values,
        colorscale=PALETTES[theme].sequential,
        zmin=0,
        hovertext=hover,
        hoverinfo="text",
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": measure, "side": "right"}, "thickness": 10, "outlinewidth": 0},
        **cells,
    )
