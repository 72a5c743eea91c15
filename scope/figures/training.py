"""Curves of training runs, and how good what came out of them is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scope.figures.axes import log_axis
from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["METRICS", "metric_curve", "pareto_front", "pareto_scatter", "training_curves"]

METRICS = {
    "fvu": "fraction of variance unexplained",
    "loss": "loss",
    "l0": "features per token",
    "dead_share": "share of dead features",
    "over_dense_share": "share of over-dense features",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "sparsity_coefficient": "sparsity coefficient",
    "tokens_per_s": "tokens per second",
    "data_wait_share": "share of the time waited for data",
}
"""What a run log has, in the order in which it is worth looking at."""
_AXIS_OF = {**METRICS, "delta_ce": "nats per token", "auxk_loss": "loss of dead features"}
_X_OF = {"tokens": "tokens", "step": "step", "seconds": "seconds"}
MAX_POINTS = 600
"""Points of a curve, at most: what lies between is left out, the ends never."""
_LOG = {"fvu", "loss", "auxk_loss", "grad_norm"}


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


def metric_curve(
    curves: Mapping[str, "pd.DataFrame"],
    metric: str,
    *,
    x: str = "tokens",
    theme: Theme = "light",
    colours: Mapping[str, int] | None = None,
) -> "go.Figure":
    """One metric over the course of some runs.

    Args:
        curves: per run a frame with the columns `x` and, where it has it, `metric`.
        metric: which column to draw.
        x: "tokens", "step" or "seconds".
        theme: of the figure.
        colours: per run the number of its colour; by default in order.
    """
    import plotly.graph_objects as go

    palette = PALETTES[theme].categories
    figure = go.Figure()
    for number, (name, frame) in enumerate(curves.items()):
        if metric not in frame or not len(frame):
            continue
        points = _thinned(frame[[x, metric]].dropna())
        colour = palette[(colours or {}).get(name, number) % len(palette)]
        figure.add_scatter(
            x=points[x],
            y=points[metric],
            mode="lines" if len(points) > 1 else "markers",
            name=as_label(name),
            line={"color": colour, "width": 1.6},
            marker={"color": colour},
            hovertext=[
                f"{as_label(name)}: {short_number(v)} at {short_number(at)} {_X_OF[x]}" for at, v in points.values
            ],
            hoverinfo="text",
        )
    figure.update_layout(
        template=template(theme),
        showlegend=False,
        margin={"t": 8},
        uirevision=f"{metric} {x}",
        xaxis={"title": {"text": _X_OF[x]}, "rangemode": "tozero", "tickformat": "~s", "nticks": 6},
        yaxis={"nticks": 5, "rangemode": "tozero"},
    )
    if metric in _LOG:
        figure.update_yaxes(**log_axis(value for line in figure.data for value in line.y))
    return figure


def _thinned(points: "pd.DataFrame") -> "pd.DataFrame":
    if len(points) <= MAX_POINTS:
        return points
    import numpy as np

    return points.iloc[np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)]


def pareto_front(l0: Sequence[float], fvu: Sequence[float]) -> list[bool]:
    """Which SAEs no other one beats in both: none with an L0 as low or lower has a lower FVU, and none with the same
    FVU has a lower L0."""
    pairs = list(zip(l0, fvu, strict=True))
    return [not any((b <= d and a < c) or (b < d and a <= c) for a, b in pairs) for c, d in pairs]


def pareto_scatter(frame: "pd.DataFrame", *, theme: Theme = "light") -> "go.Figure":
    """FVU against L0 of SAEs; a line joins those of a hook that no other one of it beats in both.

    Args:
        frame: columns name, hook, l0, fvu, held_out (bool: measured on held-out text, else on training rows), front
            (bool), and `note` for the hover.
        theme: of the figure.
    """
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure()
    for number, (hook, points) in enumerate(frame.groupby("hook", sort=False)):
        colour = palette.categories[min(number, len(palette.categories) - 1)]
        for _, line in points[points["front"]].sort_values("l0").groupby("held_out", sort=False):
            figure.add_scatter(
                x=line["l0"], y=line["fvu"], mode="lines", line={"color": colour, "width": 1.2, "dash": "dot"},
                hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        figure.add_scatter(
            x=points["l0"],
            y=points["fvu"],
            mode="markers",
            name=as_label(str(hook)),
            marker={
                "color": colour,
                "size": 9,
                "symbol": ["circle" if held else "circle-open" for held in points["held_out"]],
                "line": {"color": colour, "width": 1.5},
            },
            customdata=points["name"],
            hovertext=[as_label(str(note), 160) for note in points["note"]],
            hoverinfo="text",
        )
    figure.update_layout(
        template=template(theme),
        showlegend=frame["hook"].nunique() > 1,
        margin={"t": 8},
        xaxis={"title": {"text": "l0: features per token"}, **log_axis(frame["l0"], 8)},
        yaxis={"title": {"text": "fraction of variance unexplained"}, **log_axis(frame["fvu"])},
    )
    return figure
