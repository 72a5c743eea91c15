"""How alike the features of two dictionaries are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

__all__ = ["cosine_histogram"]

BINS = 40


def cosine_histogram(
    best: "Sequence[tuple[str, np.ndarray]]", threshold: float, *, theme: Theme = "light"
) -> "go.Figure":
    """How many features of each dictionary have a nearest one of such a cosine in the other.

    Args:
        best: per dictionary its name, and each feature's cosine to its nearest.
        threshold: from which two features count as the same.
        theme: of the figure.
    """
    import numpy as np
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    low = min([0.0, *(float(values.min()) for _, values in best if len(values))])
    edges = np.linspace(low, 1.0, BINS + 1)
    figure = go.Figure()
    for number, (name, values) in enumerate(best):
        counts, _ = np.histogram(values, edges)
        figure.add_scatter(
            x=edges,
            y=np.append(counts, counts[-1]),
            mode="lines",
            line={"shape": "hv", "width": 1.6, "color": palette.categories[number]},
            name=as_label(name),
            hovertext=[
                f"{as_label(name)}: {count:,} features from {start:.2f} to {stop:.2f}"
                for count, start, stop in zip([*counts, counts[-1]], edges, [*edges[1:], 1.0], strict=True)
            ],
            hoverinfo="text",
        )
    figure.add_vline(x=threshold, line={"color": palette.muted, "width": 1, "dash": "dot"})
    figure.update_layout(
        template=template(theme),
        margin={"t": 8},
        xaxis={"title": {"text": "cosine to the nearest feature of the other"}},
        yaxis={"title": {"text": "features"}, "rangemode": "tozero"},
    )
    return figure
