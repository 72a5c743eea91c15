"""Curves of a training run."""

from typing import TYPE_CHECKING

from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["training_curves"]

_AXIS_OF = {
    "fvu": "fraction of variance unexplained",
    "l0": "features per token",
    "dead_share": "share of dead features",
    "learning_rate": "learning rate",
    "delta_ce": "nats per token",
    "loss": "loss",
    "auxk_loss": "loss of dead features",
}
_LOG = {"fvu", "loss", "auxk_loss"}


def training_curves(
    frame: "pd.DataFrame",
    metrics: list[str] | None = None,
    *,
    x: str = "tokens",
    theme: Theme = "light",
    title: str = "How the training went",
) -> "go.Figure":
    """One small panel per metric over `x`, one line per run, panels sharing their x axis.

    Args:
        frame: column `x`, one column per metric, and `run` where there are several.
        metrics: which columns to draw; otherwise all numeric ones but `x` and step.
    """
    from plotly.subplots import make_subplots

    if metrics is None:
        metrics = [c for c in frame.columns if c not in {x, "step", "run"} and frame[c].dtype.kind in "iuf"]
    palette = PALETTES[theme]
    panels = make_subplots(
        rows=max(len(metrics), 1), cols=1, shared_xaxes=True, vertical_spacing=min(0.08, 0.3 / max(len(metrics), 1))
    )
    runs = list(frame.groupby("run", sort=False)) if "run" in frame else [("", frame)]
    for row, metric in enumerate(metrics, start=1):
        for number, (name, points) in enumerate(runs):
            points = points[points[metric].notna()]
            panels.add_scatter(
                x=points[x],
                y=points[metric],
                mode="lines",
                name=as_label(str(name)),
                legendgroup=as_label(str(name)),
                showlegend=row == 1 and len(runs) > 1,
                line={"color": palette.categories[number % len(palette.categories)], "width": 1.5},
                hovertext=[f"{as_label(str(name))} {short_number(v)}".strip() for v in points[metric]],
                hoverinfo="text+x",
                row=row,
                col=1,
            )
        label = _AXIS_OF.get(metric, metric.replace("_", " "))
        panels.update_yaxes(title_text=label, type="log" if metric in _LOG else "linear", row=row, col=1)
    panels.update_xaxes(title_text=x, row=max(len(metrics), 1), col=1)
    panels.update_layout(template=template(theme), title_text=title, height=90 + 150 * max(len(metrics), 1))
    return panels
