"""Which features fire on which tokens: features down, tokens across."""

from typing import Any

import numpy as np
from dash import html

from dashboards.components.controls import define
from dashboards.components.firings import choice
from dashboards.components.prompt_state import PromptView, scale_of
from dashboards.components.said import words_at
from dashboards.components.strip import legend
from dashboards.components.token_grid import column_turner, column_window, grid_saves, token_grid
from dashboards.format import count, plural
from dashboards.links import feature_link

__all__ = ["heatmap_part", "heatmap_rows"]

MORE = 24
"""Features that a click adds."""


def heatmap_rows(view: PromptView) -> tuple[list[int], int]:
    """The features of the heatmap, top down, and how many fire in all.

    Pinned ones come first; the others by the largest size of the measure over the tokens that count: the pinned ones,
    or all where none is pinned.
    """
    table = view.firings
    if view.pinned_tokens:
        table = table[table["position"].isin(view.pinned_tokens)]
    sizes = table[view.measure.column].abs().groupby(table["feature"]).max()
    order = sizes.iloc[np.argsort(-sizes.to_numpy(), kind="stable")].index
    rest = [int(feature) for feature in order if int(feature) not in view.pins]
    return [*view.pins, *rest[: view.selection.rows]], len(sizes)


def heatmap_part(view: PromptView) -> html.Section:
    """The heatmap with what it shows."""
    features, n_features = heatmap_rows(view)
    n = view.analysis.n_tokens
    only_pinned = view.selection.columns == "pinned" and bool(view.pinned_tokens)
    shown = column_window(n, view.selection.start, view.position)
    positions = list(view.pinned_tokens) if only_pinned else list(shown)
    if not features:
        return html.Section(
            [html.H2("Features by tokens"), html.P("No feature fires on this prompt.", className="muted")],
            className="panel heatmap-part",
        )
    values = _values(view, features, positions)
    scale = scale_of(values)
    kind = "effect" if view.measure.column == "effect" else "activation"
    tokens = view.analysis.features.tokens
    grid = token_grid(
        [tokens[place] for place in positions],
        positions,
        [
            {
                "id": feature,
                "name": view.name_of(feature, 4),
                "href": feature_link(view.index.id, feature),
                "pin": feature in view.pins,
                "v": row.tolist(),
            }
            for feature, row in zip(features, values, strict=True)
        ],
        what="feature",
        corner="Feature",
        caption=f"{view.measure.words} of {plural(len(features), 'feature')} on {plural(len(positions), 'token')}",
        scale=scale,
        kind="effect" if kind == "effect" else "activation",
        at=view.position,
        row=view.feature,
        pinned_tokens=view.pinned_tokens,
        pins=view.pins,
        special=view.analysis.special,
        said=[words_at(view.analysis, place) for place in positions],
        id="prompt-heatmap",
    )
    counted = "on the pinned tokens" if view.pinned_tokens else "on this prompt"
    return html.Section(
        className="panel heatmap-part",
        children=[
            html.Header(
                [
                    html.H2("Features by tokens"),
                    html.Span(f"{count(len(features))} of {plural(n_features, 'feature')} {counted}", className="unit"),
                    html.Span(
                        [legend(scale, "effect" if kind == "effect" else "activation", view.measure.words),
                         define(view.measure.term)],
                        className="legend-with-help push",
                    ),
                ]
            ),
            html.Div(_switches(view, only_pinned), className="chips") if view.pinned_tokens else None,
            grid,
            None if only_pinned else column_turner(shown, n),
            html.Div([_more(view, features, n_features), grid_saves()], className="grid-foot"),
        ],
    )  # fmt: skip


def _values(view: PromptView, features: list[int], positions: list[int]) -> np.ndarray:
    row_of = {feature: row for row, feature in enumerate(features)}
    column_of = {place: column for column, place in enumerate(positions)}
    table = view.firings
    table = table[table["feature"].isin(features) & table["position"].isin(positions)]
    values = np.zeros((len(features), len(positions)))
    rows = [row_of[feature] for feature in table["feature"].tolist()]
    columns = [column_of[place] for place in table["position"].tolist()]
    values[rows, columns] = table[view.measure.column].to_numpy(dtype=float)
    return values


def _switches(view: PromptView, only_pinned: bool) -> list[Any]:
    return [
        choice("All tokens", {"columns": None}, not only_pinned),
        choice(f"{plural(len(view.pinned_tokens), 'pinned token')}", {"columns": "pinned"}, only_pinned),
    ]


def _more(view: PromptView, features: list[int], n_features: int) -> html.Div | None:
    more = n_features - len(features)
    if more <= 0:
        return None
    return html.Div(
        choice(f"Show {min(MORE, more)} more features", {"rows": view.selection.rows + MORE}, False), className="more"
    )
