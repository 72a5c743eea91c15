"""Figures: a DataFrame goes in, a Plotly figure comes out; notebooks and the dashboard share them.

Plotly is imported when the first figure is drawn, not before. The dashboard saves each figure as PNG and SVG in the
browser; from Python `figure.write_image("figure.svg")` does, which needs the extra `images` (kaleido) and a Chrome or
Chromium (`BROWSER_PATH=` where it is not found).
"""

from scope.figures.circuits import faithfulness_curves, verification_scatter
from scope.figures.comparison import cosine_histogram
from scope.figures.denoising import commit_bars, step_rates
from scope.figures.diffing import layer_lines, scaling_scatter, translation_lines
from scope.figures.experts import expert_heatmap
from scope.figures.features import (
    activation_histogram,
    feature_scatter,
    histogram_frame,
    logit_bars,
    logit_histogram,
    rate_bars,
    token_feature_heatmap,
)
from scope.figures.per_layer import per_layer_bars, per_layer_heatmap
from scope.figures.template import (
    CONFIG,
    FONT,
    PALETTES,
    Palette,
    Theme,
    activation_colour,
    css_variables,
    effect_colour,
    template,
)
from scope.figures.text import as_label, short_number
from scope.figures.training import METRICS, metric_curve, pareto_front, pareto_scatter, training_curves

__all__ = [
    "CONFIG",
    "FONT",
    "METRICS",
    "PALETTES",
    "Palette",
    "Theme",
    "activation_colour",
    "activation_histogram",
    "as_label",
    "commit_bars",
    "cosine_histogram",
    "css_variables",
    "effect_colour",
    "expert_heatmap",
    "faithfulness_curves",
    "feature_scatter",
    "histogram_frame",
    "layer_lines",
    "logit_bars",
    "logit_histogram",
    "metric_curve",
    "pareto_front",
    "pareto_scatter",
    "per_layer_bars",
    "per_layer_heatmap",
    "rate_bars",
    "scaling_scatter",
    "short_number",
    "step_rates",
    "template",
    "token_feature_heatmap",
    "training_curves",
    "translation_lines",
    "verification_scatter",
]
