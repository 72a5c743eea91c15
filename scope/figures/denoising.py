"""Figures of text diffusion: how often a feature fires at each step, and at which step tokens are committed."""

from typing import TYPE_CHECKING

from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["commit_bars", "step_rates"]


def step_rates(
    frame: "pd.DataFrame", *, theme: Theme = "light", title: str = "How often it fires at each step"
) -> "go.Figure":
    """Columns step, rate, rate_low, rate_high, n_firings, n_rows (`scope.features.denoising.rate_by_step`): a line with
    its interval as a band."""
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure(layout={"template": template(theme), "title": {"text": title}, "showlegend": False})
    step = frame["step"]
    figure.add_scatter(
        x=[*step, *step[::-1]],
        y=[*frame["rate_high"], *frame["rate_low"][::-1]],
        fill="toself",
        fillcolor=palette.accent,
        opacity=0.25,
        line={"width": 0},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=step,
        y=frame["rate"],
        mode="lines+markers",
        line={"color": palette.accent_text, "width": 2},
        marker={"size": 6},
        hovertext=[
            f"step {row['step']}<br>{row['n_firings']:,} firings on {row['n_rows']:,} tokens "
            f"({short_number(100 * row['rate'])}%)"
            for row in frame.to_dict("records")
        ],
        hoverinfo="text",
    )
    figure.update_xaxes(title_text="step of denoising", tickformat="d")
    return figure.update_yaxes(title_text="firings per token", rangemode="tozero")


def commit_bars(
    frame: "pd.DataFrame", *, theme: Theme = "light", title: str = "When tokens are committed"
) -> "go.Figure":
    """Columns step, n_tokens, share (`scope.features.denoising.commit_table`): a bar for each step, and one, "end", for
    tokens that no step committed."""
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure(layout={"template": template(theme), "title": {"text": title}, "showlegend": False})
    names = ["end" if step < 0 else str(step) for step in frame["step"]]
    figure.add_bar(
        x=names,
        y=100 * frame["share"],
        marker={"color": [palette.accent if name != "end" else palette.muted for name in names]},
        hovertext=[
            f"{_when(row['step'])}<br>{row['n_tokens']:,} tokens ({short_number(100 * row['share'])}%)"
            for row in frame.to_dict("records")
        ],
        hoverinfo="text",
    )
    figure.update_xaxes(title_text="step of denoising", type="category")
    return figure.update_yaxes(title_text="% of tokens", rangemode="tozero")


def _when(step: int) -> str:
    return "filled in at the end" if step < 0 else f"committed at step {step}"
