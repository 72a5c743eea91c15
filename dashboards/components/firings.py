"""What fires on a token of a prompt: strength, and the push on a chosen next token."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dash import html

from dashboards.components.strip import token
from dashboards.format import exact, number, percent
from dashboards.links import feature_link

__all__ = ["choice", "firing_list", "prediction_chips"]


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
    rows: Sequence[Mapping[str, Any]], index: str, *, selected: int | None, strongest: float, largest: float | None
) -> html.Ul:
    """Features on one token.

    Args:
        rows: feature, value, label, and effect where a next token is chosen.
        selected: the feature shown across the tokens.
        strongest: the firing strength with the full bar.
        largest: the absolute effect with the full bar; None where no next token is chosen.
    """
    return html.Ul([_firing(row, index, selected, strongest, largest) for row in rows], className="firings")


def _firing(
    row: Mapping[str, Any], index: str, selected: int | None, strongest: float, largest: float | None
) -> html.Li:
    feature = int(row["feature"])
    pressed = feature == selected
    bars = [_bar(row["value"] / strongest if strongest else 0.0, number(row["value"]), exact(row["value"]), "strength")]
    if largest is not None:
        effect = float(row.get("effect", 0.0))
        words = ("+" if effect > 0 else "") + number(effect)
        bars.append(_signed(effect / largest if largest else 0.0, words, exact(effect)))
    return html.Li(
        className="firing" + (" with-effect" if largest is not None else ""),
        children=[
            html.A(
                str(feature), href=feature_link(index, feature), className="number", title=f"Open feature {feature}"
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


def _bar(share: float, words: str, title: str, kind: str) -> html.Span:
    return html.Span(
        [html.I(style={"--v": f"{min(1.0, max(0.0, share)):.3f}"}), html.Span(words, className="number")],
        className=f"firing-bar {kind}",
        title=title,
    )


def _signed(share: float, words: str, title: str) -> html.Span:
    side = "positive" if share > 0 else "negative"
    return html.Span(
        [
            html.Span(html.I(style={"--v": f"{min(1.0, abs(share)):.3f}"}), className="axis"),
            html.Span(words, className="number"),
        ],
        className=f"firing-bar effect {side}",
        title=title,
    )
