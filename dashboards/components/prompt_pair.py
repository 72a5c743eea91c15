"""Two prompts beside each other: their tokens, the features that differ, and what comes next after each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from dash import html

from dashboards.components.controls import define, panel
from dashboards.components.firings import choice, pin_feature, plain_bar, signed_bar
from dashboards.components.prompt_state import MEASURES, PromptView, scale_of
from dashboards.components.said import said_of
from dashboards.components.states import skeleton
from dashboards.components.strip import legend, token, token_strip
from dashboards.format import exact, number, percent, plural
from dashboards.links import feature_link
from dashboards.prompts import Distributions

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.prompt_compare import PromptComparison

__all__ = ["PairView", "draw_pair", "selected_pair"]

ROWS = 24


def selected_pair(selection: Any, pairs: "pd.DataFrame", n_a: int, n_b: int) -> tuple[int, int]:
    """The positions that are looked at: the selected token of either prompt and the one that it is paired with, or
    the last ones. A token that stands alone is seen beside the nearest pair before it."""
    for mine, other, place, n in (
        ("position_b", "position_a", selection.token2, n_b),
        ("position_a", "position_b", selection.token, n_a),
    ):
        if place is not None and place < n:
            until = pairs[(pairs[mine] >= 0) & (pairs[mine] <= place) & (pairs[other] >= 0)]
            partner = int(until[other].iloc[-1]) if len(until) else 0
            return (partner, place) if mine == "position_b" else (place, partner)
    return n_a - 1, n_b - 1


@dataclass(frozen=True, eq=False)
class PairView:
    """Everything that the drawing needs."""

    a: PromptView
    b: PromptView
    comparison: "PromptComparison"
    distributions: Distributions | None
    """Known once it has been computed, for `places`."""

    @property
    def places(self) -> tuple[int, int]:
        """The positions that are looked at."""
        return selected_pair(
            self.a.selection, self.comparison.pairs, self.a.analysis.n_tokens, self.b.analysis.n_tokens
        )

    @cached_property
    def table(self) -> "pd.DataFrame":
        """The compared features in the chosen measure: feature, a, b, change, only."""
        found = self.comparison.features
        frame = found[["feature", "only"]].assign(a=found["max_a"], b=found["max_b"], change=found["change"])
        return self._weighted(frame)

    def at_places(self) -> "pd.DataFrame":
        """The same for the two tokens that are looked at: feature, a, b, change, only."""
        sides = [
            view.analysis.features.at(place).set_index("feature")["value"].astype(float)
            for view, place in zip((self.a, self.b), self.places, strict=True)
        ]
        frame = sides[0].rename("a").to_frame().join(sides[1].rename("b"), how="outer").fillna(0.0)
        frame = frame.assign(change=frame["b"] - frame["a"]).rename_axis("feature").reset_index()
        frame["only"] = np.where(frame["b"] == 0, "a", np.where(frame["a"] == 0, "b", ""))
        return self._weighted(frame)

    def _weighted(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """In the chosen measure. A feature's correction is a factor, the same for all its firings."""
        from scope.features.prompt_compare import corrected_strengths

        if self.a.sort != "corrected" or not len(frame):
            return frame
        larger = np.maximum(frame["a"], frame["b"])
        corrected = corrected_strengths(frame.assign(value=larger), self.a.index)
        factor = corrected / np.where(larger > 0, larger, 1.0)
        return frame.assign(a=frame["a"] * factor, b=frame["b"] * factor, change=frame["change"] * factor)


def draw_pair(view: PairView) -> html.Div:
    """The whole result."""
    return html.Div(
        className="prompt-pair",
        children=[_strips(view), _next_part(view), _places_part(view), _differences(view)],
    )


def _strips(view: PairView) -> html.Section:
    sides = (view.a, view.b)
    across = [side.across() for side in sides]
    scale = scale_of(np.concatenate(across), clip=view.a.feature is None)
    pairs = view.comparison.pairs
    same = pairs[pairs["same"]]
    boxes = []
    for letter, side, values, place, column, name, lets in zip(
        "AB", sides, across, view.places, ("position_a", "position_b"), ("token", "token2"), ("token2", "token"),
        strict=True,
    ):  # fmt: skip
        equal = set(same[column])
        differs = [at for at in range(side.analysis.n_tokens) if at not in equal]
        strip = token_strip(
            side.analysis.features.tokens,
            values,
            scale=scale,
            selected=place,
            pick=True,
            special=side.analysis.special,
            label=f"Tokens of prompt {letter}; arrow keys step through them",
            id=f"prompt-strip-{letter.lower()}",
            extra={
                "differs": differs,
                "name": name,
                "lets": [lets],
                **said_of(side.analysis),
            },
        )
        words = f"{plural(len(differs), 'token')} of {side.analysis.n_tokens:,} not in the other"
        boxes.append(
            html.Div([html.H2([f"{letter} ", html.Span(words, className="unit")]), strip], className="pair-side")
        )
    feature = view.a.feature
    whose = f"feature {feature}" if feature is not None else "all features"
    chips: list[Any] = [choice("All features", {"feature": None}, feature is None)]
    if feature is not None:
        chips.append(choice(f"Feature {feature}", {"feature": feature}, True))
    chips.append(html.Span(className="gap"))
    chips += [
        choice(MEASURES[one].button, {"sort": one}, one == (view.a.sort or "strength"))
        for one in ("strength", "corrected")
    ]
    return html.Section(
        className="pair-strips prompt-strip-part",
        **{"aria-label": "Tokens of both prompts"},
        children=[
            html.Div(
                className="toolbar",
                children=[
                    html.Div(chips, className="chips"),
                    html.Div(
                        [
                            legend(scale, "activation", f"{view.a.measure.words}, {whose}"),
                            define(view.a.measure.term),
                        ],
                        className="push legend-with-help",
                    ),
                ],
            ),
            html.Div(boxes, className="pair-sides"),
        ],
    )


def _tokens_at(view: PairView) -> tuple[html.Span, html.Span]:
    first, second = (
        token(side.analysis.features.tokens[place]) for side, place in zip((view.a, view.b), view.places, strict=True)
    )
    return first, second


def _next_part(view: PairView) -> html.Section:
    first, second = _tokens_at(view)
    head = html.Header([html.H2(["What comes next after ", first, " | ", second]), define("divergence")])
    if view.distributions is None:
        return html.Section([head, skeleton(*[24] * 8)], className="panel")
    table = view.distributions.table
    largest = float(max(table["a"].max(), table["b"].max()))
    rows = [
        html.Li(
            className="next-row",
            children=[token(text), _share(a, largest), _share(b, largest)],
        )
        for text, a, b in zip(table["token"].tolist(), table["a"].tolist(), table["b"].tolist(), strict=True)
    ]
    return html.Section(
        className="panel",
        children=[
            head,
            html.P(
                [
                    "Jensen–Shannon divergence ",
                    html.Span(
                        f"{number(view.distributions.divergence)} bits",
                        className="number",
                        title=exact(view.distributions.divergence),
                    ),
                    ": 0 where both expect the same, 1 where they share nothing.",
                ],
                className="small muted",
            ),
            html.Div(
                [html.Span("Next token"), html.Span("Probability in A"), html.Span("Probability in B")],
                className="next-row firing-head",
            ),
            html.Ul(rows, className="next-rows"),
        ],
    )


def _share(value: float, largest: float) -> html.Span:
    return html.Span(
        [
            html.I(style={"--v": f"{value / largest if largest else 0:.3f}"}),
            html.Span(percent(value), className="number"),
        ],
        className="firing-bar strength",
        title=exact(value),
    )


def _places_part(view: PairView) -> html.Section:
    first, second = _tokens_at(view)
    table = view.at_places()
    table = table.iloc[np.argsort(-table["change"].abs().to_numpy(), kind="stable")].head(ROWS)
    head = html.Header(
        [
            html.H2(["On ", first, " | ", second]),
            html.Span(f"token {view.places[0]} of A, {view.places[1]} of B", className="unit"),
        ]
    )
    if not len(table):
        return html.Section([head, html.P("No feature fires on either token.", className="muted")], className="panel")
    return html.Section([head, *_rows(view, table, "Strength in A", "Strength in B")], className="panel")


def _differences(view: PairView) -> html.Section:
    table = view.table
    parts = {
        "": ("All that differ", (table["a"] - table["b"]) != 0),
        "a": ("Only in A", table["only"] == "a"),
        "b": ("Only in B", table["only"] == "b"),
        "changed": ("Changed on equal tokens", table["change"] != 0),
    }
    chosen = view.a.selection.differs if view.a.selection.differs in parts else ""
    part = table[parts[chosen][1]]
    if chosen != "changed":
        part = part.assign(change=part["b"] - part["a"])
    part = part.iloc[np.argsort(-part["change"].abs().to_numpy(), kind="stable")]
    pinned = part["feature"].isin(view.a.pins)
    shown = part[pinned].index.tolist() + part[~pinned].head(view.a.selection.rows).index.tolist()
    chips = [
        choice(f"{words} ({int(which.sum()):,})", {"differs": name or None}, name == chosen)
        for name, (words, which) in parts.items()
    ]
    body: list[Any] = (
        _rows(view, part.loc[shown], "Maximum in A", "Maximum in B") if shown else [html.P("None.", className="muted")]
    )
    if len(part) > len(shown):
        more = min(ROWS, len(part) - len(shown))
        body.append(
            html.Div(choice(f"Show {more} more", {"rows": view.a.selection.rows + ROWS}, False), className="more")
        )
    return panel(
        "Features that differ",
        html.Div(chips, className="chips"),
        *body,
        term="change",
        unit="over the whole prompts, largest change first",
    )


def _rows(view: PairView, table: "pd.DataFrame", head_a: str, head_b: str) -> list[Any]:
    largest = float(max(table["a"].max(), table["b"].max()))
    most = float(table["change"].abs().max())
    head = html.Div(
        [html.Span("Feature"), html.Span("Fires on"), html.Span(head_a), html.Span(head_b), html.Span("Change")],
        className="firing pair-row firing-head",
    )
    rows = [_row(view, row, largest, most) for row in table.to_dict("records")]
    return [head, html.Ul(rows, className="firings")]


def _row(view: PairView, row: Mapping[Any, Any], largest: float, most: float) -> html.Li:
    feature = int(row["feature"])
    pressed = feature == view.a.feature
    return html.Li(
        className="firing pair-row",
        children=[
            html.Span(
                [
                    pin_feature(feature, view.a.pins),
                    html.A(str(feature), href=feature_link(view.a.index.id, feature), className="number"),
                ],
                className="firing-id",
            ),
            choice(
                html.Span(view.a.name_of(feature), dir="auto"),
                {"feature": None if pressed else feature},
                pressed,
                className="firing-label",
                title="Show it across the tokens of both",
            ),
            plain_bar(float(row["a"]), largest),
            plain_bar(float(row["b"]), largest),
            signed_bar(float(row["change"]), most),
        ],
    )
