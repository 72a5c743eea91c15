"""How far two models, or two languages, are apart over the layers."""

from typing import TYPE_CHECKING

from scope.figures.template import PALETTES, Theme, template
from scope.figures.text import as_label, short_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["layer_lines", "scaling_scatter", "translation_lines"]

MAX_LINES = 8


def layer_lines(
    frame: "pd.DataFrame",
    y: str,
    *,
    line: str = "source",
    low: str | None = None,
    high: str | None = None,
    theme: Theme = "light",
    label: str = "",
    title: str = "",
) -> "go.Figure":
    """A line over the layers for each value of a column, at most eight; the first is wider, and has its interval.

    Args:
        frame: columns layer, `y`, `line`, and those of the interval.
        y: what is drawn.
        line: the column that tells the lines apart.
        low, high: columns of the interval, drawn as a band.
        theme: of the figure.
        label: name of the y axis, with its unit.
        title: of the figure.
    """
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure(layout={"template": template(theme), "title": {"text": title}})
    for number, name in enumerate(list(dict.fromkeys(frame[line]))[:MAX_LINES]):
        own = frame[frame[line] == name].sort_values("layer")
        colour = palette.categories[number % len(palette.categories)]
        shown = as_label(str(name))
        if low and high and number == 0:
            figure.add_scatter(
                x=[*own["layer"], *own["layer"][::-1]],
                y=[*own[high], *own[low][::-1]],
                fill="toself",
                fillcolor=colour,
                opacity=0.18,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=own["layer"],
            y=own[y],
            mode="lines+markers",
            name=shown,
            line={"color": colour, "width": 2.2 if number == 0 else 1.4},
            marker={"size": 5},
            hovertext=[
                f"{shown}, layer {layer}: {short_number(value)}"
                for layer, value in zip(own["layer"], own[y], strict=True)
            ],
            hoverinfo="text",
        )
    last = int(frame["layer"].max()) if len(frame) else 0
    figure.update_xaxes(title_text="layer", dtick=max(1, last // 10), range=[-0.3, last + 0.3])
    figure.update_yaxes(title_text=label, rangemode="tozero")
    return figure


def translation_lines(
    frame: "pd.DataFrame", *, theme: Theme = "light", title: str = "How alike a page and its translation are"
) -> "go.Figure":
    """The similarity of translations over the layers, with its interval, and that of random pairs.

    Args:
        frame: of one pair of languages, columns layer, similarity and baseline, each with _low and _high
            (`scope.features.translations.layer_similarity`).
        theme: of the figure.
        title: of the figure.
    """
    import pandas as pd

    parts = [
        pd.DataFrame(
            {
                "layer": frame["layer"],
                "pairs": words,
                "value": frame[name],
                "low": frame[f"{name}_low"],
                "high": frame[f"{name}_high"],
            }
        )
        for name, words in (("similarity", "translations"), ("baseline", "random pairs"))
    ]
    return layer_lines(
        pd.concat(parts), "value", line="pairs", low="low", high="high", theme=theme,
        label="cosine of mean activations, common mean removed", title=title,
    )  # fmt: skip


def scaling_scatter(
    frame: "pd.DataFrame", nu_error: float, nu_reconstruction: float, *, theme: Theme = "light", title: str = ""
) -> "go.Figure":
    """Features that seem to be of one model alone, by what latent scaling finds of them in the other: those at the
    lower left, within both thresholds, are specific.

    Args:
        frame: columns feature, nu_error, nu_reconstruction, verdict, firings.
        nu_error, nu_reconstruction: the thresholds, drawn as lines.
        theme: of the figure.
        title: of the figure.
    """
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    figure = go.Figure(layout={"template": template(theme), "title": {"text": title}})
    for number, verdict in enumerate(sorted(set(frame["verdict"]), key=lambda name: (name != "specific", name))):
        own = frame[frame["verdict"] == verdict]
        figure.add_scatter(
            x=own["nu_reconstruction"],
            y=own["nu_error"],
            mode="markers",
            name=as_label(str(verdict)),
            marker={"color": palette.categories[number % len(palette.categories)], "size": 7, "opacity": 0.8},
            hovertext=[
                f"feature {feature}: error {short_number(error)}, reconstruction {short_number(made)}, {n:,} firings"
                for feature, error, made, n in zip(
                    own["feature"], own["nu_error"], own["nu_reconstruction"], own["firings"], strict=True
                )
            ],
            hoverinfo="text",
        )
    figure.add_vline(x=nu_reconstruction, line={"color": palette.muted, "width": 1, "dash": "dot"})
    figure.add_hline(y=nu_error, line={"color": palette.muted, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text="ν of the reconstruction (decoupling)")
    figure.update_yaxes(title_text="ν of the error (shrinkage)")
    return figure
