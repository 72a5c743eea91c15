"""How much of a behaviour a circuit carries."""

from typing import TYPE_CHECKING

from scope.figures.template import PALETTES, Theme, template

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["faithfulness_curves"]

_WORDS = {"kept": "errors kept", "ablated": "errors ablated"}


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
