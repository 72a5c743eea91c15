"""A prompt that has been run: its tokens, what fires on the selected one, the next tokens, and how they are pushed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
import numpy as np
from dash import html

from dashboards.components.controls import define
from dashboards.components.firings import choice, firing_list, prediction_chips
from dashboards.components.strip import Kind, legend, token, token_strip
from dashboards.format import plural
from dashboards.links import feature_link
from dashboards.prompts import Analysis, Push
from dashboards.queries import feature_name, table_row

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["PromptView", "Selection", "draw_prompt"]


@dataclass(frozen=True)
class Selection:
    """What is selected on the page, as its address says."""

    token: int | None = None
    feature: int | None = None
    target: int | None = None
    """Id of the chosen next token."""
    sort: str = "strength"
    colour: str = ""
    """ "strength" or "effect"; by default the effect where a next token is chosen."""

    @classmethod
    def of(cls, query: Mapping[str, str] | None) -> "Selection":
        """The selection of a query; what cannot be read is left open."""
        query = query or {}

        def whole(name: str) -> int | None:
            text = str(query.get(name, ""))
            return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None

        return cls(
            whole("token"), whole("feature"), whole("target"), query.get("sort", "strength"), query.get("colour", "")
        )


@dataclass(frozen=True, eq=False)
class PromptView:
    """Everything that the drawing needs."""

    index: "FeatureIndex"
    analysis: Analysis
    push: Push | None
    """Known once the target's effects have been computed."""
    selection: Selection

    @property
    def position(self) -> int:
        """The selected token; the last one where none is, or where the text has become shorter."""
        chosen = self.selection.token
        last = self.analysis.n_tokens - 1
        return last if chosen is None or chosen > last else chosen

    @property
    def feature(self) -> int | None:
        """The feature shown across the tokens, if it exists."""
        chosen = self.selection.feature
        return chosen if chosen is not None and chosen < self.index.d_sae else None

    @property
    def by_effect(self) -> bool:
        """Whether the strip shows effects."""
        return self.push is not None and self.selection.colour != "strength"


def draw_prompt(view: PromptView) -> html.Div:
    """The whole result."""
    return html.Div(
        className="prompt-columns",
        children=[_strip_part(view), html.Aside([_next_part(view)]), _firings_part(view)],
    )


def _strip_values(view: PromptView) -> tuple[np.ndarray, str]:
    """One number per token, and what it is in words."""
    n = view.analysis.n_tokens
    if view.by_effect:
        assert view.push is not None
        table = view.push.table
        if view.feature is not None:
            table = table[table["feature"] == view.feature]
        values = np.zeros(n)
        np.add.at(values, table["position"].to_numpy(dtype=int), table["effect"].to_numpy(dtype=float))
        return values, "effect on the logit, " + (
            f"feature {view.feature}" if view.feature is not None else "all features"
        )
    if view.feature is not None:
        return np.asarray(
            view.analysis.features.values_of(view.feature), dtype=float
        ), f"strength of feature {view.feature}"
    table = view.analysis.features.table
    values = np.zeros(n)
    np.add.at(values, table["position"].to_numpy(dtype=int), table["value"].to_numpy(dtype=float))
    return values, "strength of all features"


def _strip_part(view: PromptView) -> html.Section:
    values, words = _strip_values(view)
    kind: Kind = "effect" if view.by_effect else "activation"
    size = np.abs(values)
    # A few tokens (sinks) can be a hundred times as strong as the rest; they are cut off where that happens.
    scale = float(min(size.max(initial=0.0), 4 * np.quantile(size, 0.9))) if view.feature is None else 0.0
    scale = scale or float(size.max(initial=0.0))
    strip = token_strip(
        view.analysis.features.tokens,
        values,
        scale=scale,
        kind=kind,
        selected=view.position,
        centre=None,
        pick=True,
        special=view.analysis.special,
        label="Tokens of the prompt; arrow keys step through them",
        id="prompt-strip",
    )
    chips = [
        choice("All features", {"feature": None}, view.feature is None),
        *([choice(f"Feature {view.feature}", {"feature": view.feature}, True)] if view.feature is not None else []),
    ]
    if view.push is not None:
        chips += [
            html.Span(className="gap"),
            choice("Effect", {"colour": None}, view.by_effect),
            choice("Strength", {"colour": "strength"}, not view.by_effect),
        ]
    return html.Section(
        className="prompt-strip-part",
        **{"aria-label": "Tokens"},
        children=[
            html.Div(
                className="toolbar",
                children=[
                    html.Div(chips, className="chips"),
                    html.Div(
                        [legend(scale, kind, words), define("effect" if view.by_effect else "strength")],
                        className="push legend-with-help",
                    ),
                ],
            ),
            strip,
            _feature_note(view),
        ],
    )


def _feature_note(view: PromptView) -> html.P | None:
    if view.feature is None:
        return None
    fires = int((np.asarray(view.analysis.features.values_of(view.feature)) > 0).sum())
    return html.P(
        className="small muted",
        children=[
            html.A(f"Feature {view.feature}", href=feature_link(view.index.id, view.feature)),
            f" ({feature_name(table_row(view.index, view.feature))}) fires on {plural(fires, 'token')} of this prompt.",
        ],
    )


def _rows(view: PromptView) -> list[dict[str, Any]]:
    found = view.analysis.features.at(view.position)
    effects: dict[int, float] = {}
    if view.push is not None:
        here = view.push.table[view.push.table["position"] == view.position]
        effects = dict(zip(here["feature"].astype(int), here["effect"].astype(float), strict=True))
    rows: list[dict[str, Any]] = [
        {
            "feature": int(feature),
            "value": float(value),
            "label": feature_name(table_row(view.index, int(feature)), 5),
            "effect": effects.get(int(feature), 0.0),
        }
        for feature, value in zip(found["feature"], found["value"], strict=True)
    ]
    if view.push is not None and view.selection.sort == "effect":
        rows.sort(key=lambda row: -abs(row["effect"]))
    return rows


def _firings_part(view: PromptView) -> html.Section:
    rows = _rows(view)
    place = view.position
    here = token(view.analysis.features.tokens[place])
    if not rows:
        special = place in view.analysis.special
        words = (
            "Features on BOS and other special tokens are left out, as in the index: SAEs are not trained on them."
            if special
            else "No feature fires on this token."
        )
        return html.Section([html.H2(["On ", here]), html.P(words, className="muted")], className="panel")
    largest = max((abs(row["effect"]) for row in rows), default=0.0) if view.push is not None else None
    order = []
    if view.push is not None:
        order = [
            choice("By strength", {"sort": None}, view.selection.sort != "effect"),
            choice("By effect", {"sort": "effect"}, view.selection.sort == "effect"),
        ]
    head: list[Any] = [html.Span("Feature"), html.Span("Fires on"), html.Span(["Strength ", define("strength")])]
    if view.push is not None:
        head.append(html.Span([" Pushes ", token(view.push.text), " ", define("effect")]))
    return html.Section(
        className="panel",
        children=[
            html.Header(
                [
                    html.H2([f"{plural(len(rows), 'feature')} on ", here]),
                    html.Span(f"token {place}", className="unit"),
                    html.Span(order, className="chips push"),
                ]
            ),
            html.Div(head, className="firing firing-head" + (" with-effect" if view.push is not None else "")),
            firing_list(
                rows,
                view.index.id,
                selected=view.feature,
                strongest=max(row["value"] for row in rows),
                largest=largest,
            ),
        ],
    )


def _next_part(view: PromptView) -> html.Section:
    predictions = view.analysis.predictions[view.position]
    target = view.selection.target
    chosen: list[Any] = []
    if target is not None:
        known = next((one.text for one in predictions if one.token_id == target), view.push.text if view.push else None)
        if known is not None and all(one.token_id != target for one in predictions):
            chosen = [
                html.Div(
                    choice([token(known), html.Span("chosen", className="muted")], {"target": None}, True),
                    className="chips",
                )
            ]
    return html.Section(
        className="panel",
        children=[
            html.Header(
                [
                    html.H2(["After ", token(view.analysis.features.tokens[view.position])]),
                    html.Span("likeliest next tokens", className="unit"),
                ]
            ),
            html.P(
                "Choose one to see how each feature on this token pushes it."
                if target is None
                else "The chosen token's push is shown beside each feature. Click it again to let go.",
                className="small muted",
            ),
            prediction_chips(predictions, target),
            *chosen,
            dmc.TextInput(
                id="prompt-target-text",
                placeholder="or type another token, then Enter",
                size="xs",
                className="target-text",
                attributes={"input": {"aria-label": "Another next token"}},
            ),
            html.Div(id="prompt-typed-answer"),
        ],
    )
