"""What fires on a token of a prompt: strength, and the push on a chosen next token."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.controls import icon
from dashboards.components.strip import token
from dashboards.format import exact, number, percent
from dashboards.links import feature_link
from dashboards.queries import feature_name, table_row

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["choice", "firing_list", "named_feature", "pin_feature", "plain_bar", "prediction_chips", "signed_bar"]


def choice(
    words: Any, changes: Mapping[str, Any], pressed: bool, className: str = "chip", **properties: Any
) -> html.Button:
    """A button that changes what is selected on the page (assets/20_strips.js carries it out)."""
    return html.Button(
        words,
        type="button",
        className=className,
        **{"data-select": json.dumps(changes), "aria-pressed": "true" if pressed else "false"},
        **properties,
    )


def pin_feature(feature: int, pins: Sequence[int]) -> html.Button:
    """Pins a feature, or lets go of it."""
    pinned = feature in pins
    wanted = [one for one in pins if one != feature] + ([] if pinned else [feature])
    return choice(
        icon("pin"),
        {"pins": ",".join(map(str, wanted)) or None},
        pinned,
        className="pin icon-only",
        **{"aria-label": f"{'Unpin' if pinned else 'Pin'} feature {feature}"},
    )


def prediction_chips(predictions: Sequence[Any], target: int | None) -> html.Div:
    """The likely next tokens with their probabilities; the target is pressed, and a second click lets go of it."""
    return html.Div(
        className="chips",
        children=[
            choice(
                [token(one.text), html.Span(percent(one.probability), className="muted number")],
                {"target": None if one.token_id == target else one.token_id},
                one.token_id == target,
                title=f"probability {exact(one.probability)}",
            )
            for one in predictions
        ],
    )


def firing_list(
    rows: Sequence[Mapping[str, Any]],
    index: str,
    *,
    selected: int | None,
    largest: Mapping[str, float],
    pins: Sequence[int] = (),
) -> html.Ul:
    """Features on one token.

    Args:
        rows: feature, label, and the numbers named in `largest`.
        index: id of the index.
        selected: the feature shown across the tokens.
        largest: per number that is drawn, in order, the value with the full bar; "effect" is signed.
        pins: pinned features.
    """
    return html.Ul([_firing(row, index, selected, largest, pins) for row in rows], className="firings")


def _firing(
    row: Mapping[str, Any], index: str, selected: int | None, largest: Mapping[str, float], pins: Sequence[int]
) -> html.Li:
    feature = int(row["feature"])
    pressed = feature == selected
    bars = [
        signed_bar(float(row[name]), most) if name == "effect" else plain_bar(float(row[name]), most)
        for name, most in largest.items()
    ]
    return html.Li(
        className="firing" + (" with-effect" if len(bars) > 1 else ""),
        children=[
            html.Span(
                [
                    pin_feature(feature, pins),
                    html.A(
                        str(feature),
                        href=feature_link(index, feature),
                        className="number",
                        title=f"Open feature {feature}",
                    ),
                ],
                className="firing-id",
            ),
            choice(
                html.Span(row["label"] or "no tokens", dir="auto"),
                {"feature": None if pressed else feature},
                pressed,
                className="firing-label",
                title="Show it across the tokens",
            ),
            *bars,
        ],
    )


def named_feature(index: "FeatureIndex", feature: int) -> html.A:
    """A feature's number and name, which lead to its page."""
    name = feature_name(table_row(index, feature)) or "no tokens"
    return html.A(
        [html.Span(str(feature), className="number muted"), " ", html.Bdi(name)],
        href=feature_link(index.id, feature),
        title=f"Open feature {feature}",
    )


def plain_bar(value: float, largest: float, kind: str = "strength", words: str = "") -> html.Span:
    """A number of one sign as a bar; `words` stand for it where it is a share or the like."""
    share = min(1.0, max(0.0, value / largest)) if largest else 0.0
    return html.Span(
        [html.I(style={"--v": f"{share:.3f}"}), html.Span(words or number(value), className="number")],
        className=f"firing-bar {kind}",
        title=exact(value),
    )


def signed_bar(value: float, largest: float) -> html.Span:
    """A number of either sign as a bar on one side of an axis."""
    share = min(1.0, abs(value) / largest) if largest else 0.0
    return html.Span(
        [
            html.Span(html.I(style={"--v": f"{share:.3f}"}), className="axis"),
            html.Span(("+" if value > 0 else "") + number(value), className="number"),
        ],
        className=f"firing-bar effect {'positive' if value > 0 else 'negative'}",
        title=exact(value),
    )
