"""A prompt that has been run: its tokens, what fires where, the next tokens, and how they are pushed."""

from typing import Any

import dash_mantine_components as dmc
import numpy as np
from dash import html

from dashboards.components.controls import define
from dashboards.components.firings import choice, firing_list, prediction_chips
from dashboards.components.medium_view import medium_figure
from dashboards.components.prompt_heatmap import heatmap_part
from dashboards.components.prompt_state import MEASURES, PromptView, scale_of
from dashboards.components.said import said_of
from dashboards.components.strip import Kind, legend, token, token_strip
from dashboards.format import number, percent, plural
from dashboards.links import feature_link
from dashboards.prompts import Prediction
from dashboards.pushes import METHODS, Push

__all__ = ["draw_prompt", "measure_chips", "next_token_field"]

AGAINST = 6
"""Other next tokens that are offered to set the chosen one against."""


def draw_prompt(view: PromptView) -> html.Div:
    """The whole result."""
    return html.Div(
        className="prompt-columns",
        children=[_strip_part(view), html.Aside([_next_part(view)]), heatmap_part(view), _firings_part(view)],
    )


def measure_chips(view: PromptView, *, effect: bool = True) -> list[html.Button]:
    """What orders and colours."""
    names = [name for name in MEASURES if name != "effect" or (effect and view.push is not None)]
    return [choice(MEASURES[name].button, {"sort": name}, name == (view.sort or "strength")) for name in names]


def _strip_part(view: PromptView) -> html.Section:
    values = view.across()
    effect = view.measure.column == "effect"
    kind: Kind = "effect" if effect else "activation"
    scale = scale_of(values, clip=view.feature is None)
    whose = f"feature {view.feature}" if view.feature is not None else "all features"
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
        extra={
            "pins": view.pinned_tokens,
            **said_of(view.analysis),
        },
    )
    chips: list[Any] = [
        choice("All features", {"feature": None}, view.feature is None),
        *([choice(f"Feature {view.feature}", {"feature": view.feature}, True)] if view.feature is not None else []),
        html.Span(className="gap"),
        *measure_chips(view),
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
                        [legend(scale, kind, f"{view.measure.words}, {whose}"), define(view.measure.term)],
                        className="push legend-with-help",
                    ),
                ],
            ),
            _media(view, values, scale, kind),
            strip,
            _feature_note(view),
            _pinned_tokens(view),
        ],
    )


def _media(view: PromptView, values: np.ndarray, scale: float, kind: Kind) -> html.Div | None:
    """The prompt's images and sounds, with what colours its tokens."""
    shown = view.analysis.shown
    if shown is None:
        return None
    who = "some feature" if view.feature is None else ""
    figures = []
    for one in shown.media:
        own = one._replace(values=values[one.rows].astype(np.float32))
        centre = np.flatnonzero(one.rows == view.position).tolist()
        figures.append(medium_figure(own, f"{shown.files}/{one.digest}", scale, centre, kind=kind, who=who))
    title = [html.P(html.Bdi(shown.title), className="small muted")] if shown.title else []
    return html.Div([*title, html.Div(figures, className="media-row")])


def _feature_note(view: PromptView) -> html.P | None:
    if view.feature is None:
        return None
    fires = int((view.analysis.features.values_of(view.feature) > 0).sum())
    return html.P(
        className="small muted",
        children=[
            html.A(f"Feature {view.feature}", href=feature_link(view.index.id, view.feature)),
            f" ({view.name_of(view.feature, 4)}) fires on {plural(fires, 'token')} of this prompt.",
        ],
    )


def _pinned_tokens(view: PromptView) -> html.Div | None:
    if not view.pinned_tokens:
        return None
    return html.Div(
        className="chips pinned-tokens small",
        children=[
            html.Span("Pinned tokens", className="muted"),
            *(
                choice(token(view.analysis.features.tokens[place]), {"token": place}, place == view.position)
                for place in view.pinned_tokens
            ),
            choice("Unpin all", {"at": None, "columns": None}, False),
        ],
    )


def _pin_token(view: PromptView) -> html.Button:
    place = view.position
    pinned = place in view.pinned_tokens
    wanted = [one for one in view.pinned_tokens if one != place] + ([] if pinned else [place])
    changes: dict[str, Any] = {"at": ",".join(map(str, sorted(wanted))) or None}
    if not wanted:
        changes["columns"] = None
    return choice("Unpin this token" if pinned else "Pin this token", changes, pinned)


def _firings_part(view: PromptView) -> html.Section:
    place = view.position
    here = token(view.analysis.features.tokens[place])
    column = view.measure.column
    found = view.firings[view.firings["position"] == place]
    if not len(found):
        special = place in view.analysis.special
        words = (
            "Features on BOS and other special tokens are left out, as in the index: SAEs are not trained on them."
            if special
            else "No feature fires on this token."
        )
        return html.Section([html.H2(["On ", here]), html.P(words, className="muted")], className="panel")
    found = found.iloc[found[column].abs().argsort(kind="stable")[::-1]]
    rows = [
        {**{str(key): value for key, value in row.items()}, "label": view.name_of(int(row["feature"]))}
        for row in found.to_dict("records")
    ]
    names = ["corrected" if column == "corrected" else "value", *(["effect"] if view.push is not None else [])]
    first = MEASURES["corrected" if column == "corrected" else "strength"]
    head: list[Any] = [
        html.Span("Feature"),
        html.Span("Fires on"),
        html.Span(["Corrected " if column == "corrected" else "Strength ", define(first.term)]),
    ]
    if view.push is not None:
        head.append(html.Span([" Pushes ", *_pushed(view.push), " ", define(view.push.how.term)]))
    return html.Section(
        className="panel firings-part",
        children=[
            html.Header(
                [
                    html.H2([f"{plural(len(rows), 'feature')} on ", here]),
                    html.Span(f"token {place}", className="unit"),
                    html.Span(_pin_token(view), className="chips push"),
                ]
            ),
            html.Div(head, className="firing firing-head" + (" with-effect" if view.push is not None else "")),
            firing_list(
                rows,
                view.index.id,
                selected=view.feature,
                largest={name: float(found[name].abs().max()) for name in names},
                pins=view.pins,
            ),
        ],
    )


def _pushed(push: Push) -> list[Any]:
    """The next token, or the two whose difference is attributed."""
    return [token(push.text), *([" rather than ", token(push.against)] if push.against is not None else [])]


def next_token_field(prefix: str = "prompt", words: str = "or type another token, then Enter") -> list[Any]:
    """A field for a token that is not in the list, and the place for what is said about it: PREFIX-target-text, which
    Enter sends to the store PREFIX-sent (assets/27_typing.js), and PREFIX-typed-answer."""
    return [
        dmc.TextInput(
            id=f"{prefix}-target-text",
            placeholder=words,
            size="xs",
            className="target-text",
            attributes={"input": {"aria-label": "Another next token", "data-typing": f"{prefix}-sent"}},
        ),
        html.Div(id=f"{prefix}-typed-answer"),
    ]


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
                else "What each feature did for the chosen token stands beside it. Click it again to let go.",
                className="small muted",
            ),
            prediction_chips(predictions, target),
            *chosen,
            *next_token_field(),
            _attribution_part(view, predictions) if target is not None else None,
        ],
    )


def _attribution_part(view: PromptView, predictions: list[Prediction]) -> html.Div:
    """How the chosen token is attributed: by which method, against which other token, after which position."""
    selection = view.selection
    methods = [
        choice(how.button, {"method": None if name == "direct" else name}, name == selection.method)
        for name, how in METHODS.items()
    ]
    others = [one for one in predictions if one.token_id != selection.target][:AGAINST]
    if selection.against is not None and all(one.token_id != selection.against for one in others):
        known = view.push.against if view.push is not None else None
        others.append(Prediction(selection.against, known or f"token {selection.against}", 0.0))
    against = [choice("nothing", {"against": None}, selection.against is None)]
    against += [choice(token(one.text), {"against": one.token_id}, one.token_id == selection.against) for one in others]
    lines = [
        html.Div([html.Span("By", className="muted small"), *methods], className="chips", role="group",
                 **{"aria-label": "Method"}),
        html.Div([html.Span("Against", className="muted small"), *against], className="chips", role="group",
                 **{"aria-label": "Against another next token"}),
    ]  # fmt: skip
    if selection.method != "direct":
        last = view.analysis.n_tokens - 1
        at = last if selection.after is None else min(selection.after, last)
        places = sorted({last, at, view.position})
        lines.append(
            html.Div(
                className="chips",
                role="group",
                **{"aria-label": "After which token"},
                children=[
                    html.Span("After", className="muted small"),
                    *(
                        choice(
                            [
                                token(view.analysis.features.tokens[place]),
                                html.Span(str(place), className="muted number"),
                            ],
                            {"after": None if place == last else place},
                            place == at,
                        )
                        for place in places
                    ),
                ],
            )
        )
    if view.push is not None and view.push.value is not None:
        lines.append(html.P(_value_words(view), className="small muted"))
    return html.Div(lines, className="attribution")


def _value_words(view: PromptView) -> str:
    """What the effects are of."""
    push = view.push
    assert push is not None
    assert push.value is not None
    what = "The logit" if push.against is None else "The difference of the logits"
    total = float(push.table["effect"].sum())
    words = f"{what} is {number(push.value)}; the effects of all firings add up to {number(total)}."
    if push.completeness is not None:
        words += (
            f" With the SAE's errors they are {percent(push.completeness)} of what sets it apart from the baseline."
        )
    return words
