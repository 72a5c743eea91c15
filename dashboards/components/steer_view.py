"""What the steering page shows: the sliders and settings, the texts as they are written, and what the push has cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
import numpy as np
from dash import html

from dashboards.components.controls import button, define, panel
from dashboards.components.firings import choice, signed_bar
from dashboards.components.prompt_state import scale_of
from dashboards.components.stats import stat, stats
from dashboards.components.strip import legend, token, token_strip
from dashboards.format import exact, number, percent
from dashboards.links import feature_link
from dashboards.queries import feature_name, table_row
from dashboards.steering import LENGTHS, SLIDER, STEP, TEMPERATURES, Push, Steer, Steered, pushes_text
from scope.interventions.words import intervention_words

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.interventions.spec import InterventionSpec

__all__ = ["draw_controls", "draw_result", "draw_writing", "suggestions"]

SIDES = {
    "plain": ("By itself", None),
    "steered": ("Steered", None),
    "random": ("Random direction", "steer_control"),
}
LEAST = 1e-4
"""Probabilities below this are not told apart."""
WHERE = (("all", "Prompt and new text"), ("prompt", "Prompt"), ("generated", "New text"))


def draw_controls(
    index: "FeatureIndex", wanted: Steer, kept: Sequence[str], spec: "InterventionSpec | None", problem: str = ""
) -> html.Div:
    """What is pushed, how it is written, and what the workspace keeps.

    Args:
        index: whose features are pushed.
        wanted: what the address asks for.
        kept: names of the interventions of the workspace.
        spec: those that the address names.
        problem: why they cannot be shown.
    """
    what = _named_part(wanted, spec, problem) if wanted.named else _pushes_part(index, wanted)
    return html.Div([what, _settings_part(wanted), _kept_part(wanted, kept)], className="steer-controls")


def _pushes_part(index: "FeatureIndex", wanted: Steer) -> html.Section:
    rows = [_pushed(index, push) for push in wanted.pushes if push.feature < index.d_sae]
    none = html.P(
        "No feature yet. Add one by its number, or search for words of its label or tokens.", className="muted small"
    )
    return html.Section(
        className="panel",
        children=[
            html.Header([html.H2("Pushed features"), define("steering")]),
            html.Ul(rows, className="pushes") if rows else none,
            dmc.TextInput(
                id="steer-add",
                placeholder="Add a feature: its number, or words, then Enter",
                size="xs",
                attributes={
                    "input": {"aria-label": "Add a feature by its number or by words", "data-typing": "steer-sent"}
                },
            ),
            html.Div(id="steer-answer", className="chips"),
        ],
    )


def _pushed(index: "FeatureIndex", push: Push) -> html.Li:
    row = table_row(index, push.feature)
    name = feature_name(row, 4) or "no tokens"
    largest = float(row["max_value"])
    id = {"feature": push.feature}
    return html.Li(
        className="pushed",
        children=[
            html.Span(
                [
                    html.A(str(push.feature), href=feature_link(index.id, push.feature), className="number"),
                    html.Span(name, dir="auto", title=name),
                ],
                className="pushed-name",
            ),
            html.Output(
                f"{'+' if push.times > 0 else ''}{number(push.times)} ×",
                id={"type": "steer-times", **id},
                className="pushed-times number",
                title=f"times its maximum, a firing strength of {exact(largest)}",
            ),
            button(
                "×",
                label=f"Do not push feature {push.feature}",
                className="icon-only tiny",
                **{"data-unpush": str(push.feature)},
            ),
            dmc.Slider(
                id={"type": "steer-push", **id},
                value=push.times,
                min=-SLIDER,
                max=SLIDER,
                step=STEP,
                size="sm",
                color="gray",
                marks=[{"value": value, "label": f"{value:+g} ×".replace("-", "−")} for value in (-SLIDER, SLIDER)]
                + [{"value": 0, "label": "0"}],
                thumbLabel=f"Times the maximum of feature {push.feature}",
            ),
        ],
    )


def suggestions(index: "FeatureIndex", features: Sequence[int]) -> list[Any]:
    """Features that words have found, to be pushed."""
    return [
        html.Button(
            [html.Span(str(feature), className="muted number"), html.Span(feature_name(table_row(index, feature), 3))],
            type="button",
            className="chip",
            **{"data-push": str(feature)},
        )
        for feature in features
    ]


def _named_part(wanted: Steer, spec: "InterventionSpec | None", problem: str) -> html.Section:
    children: list[Any] = [
        html.Header([html.H2(wanted.named, dir="auto"), html.Span("named intervention", className="unit")])
    ]
    if spec is None:
        children.append(html.P(problem, className="small", role="alert"))
    else:
        children.append(
            html.Ul([html.Li(intervention_words(one)) for one in spec.interventions], className="steer-words")
        )
        if spec.freeze_attention:
            children.append(html.P("Attention stays where it is without them.", className="small muted"))
    children.append(
        html.Div(
            [choice("Use sliders", {"named": None, **_as_sliders(spec)}, False)],
            className="chips",
        )
    )
    return html.Section(children, className="panel")


def _as_sliders(spec: "InterventionSpec | None") -> dict[str, Any]:
    """Interventions as the sliders have them, where they can."""
    if spec is None or len(spec.interventions) != 1:
        return {}
    (one,) = spec.interventions
    if one.kind != "add" or one.unit != "maximum" or one.positions or not one.features:
        return {}
    pushes = tuple(Push(feature, value) for feature, value in zip(one.features, one.values, strict=True))
    during = None if one.during == "all" else one.during
    return {"push": pushes_text(pushes), "during": during, "freeze": "1" if spec.freeze_attention else None}


def _settings_part(wanted: Steer) -> html.Section:
    def line(words: str, chips: list[Any], *more: Any) -> html.Div:
        return html.Div(
            [html.Span(words, className="muted"), html.Div([*chips, *more], className="chips")],
            className="steer-setting",
            role="group",
            **{"aria-label": words},
        )

    lengths = [choice(str(n), {"n": None if n == 40 else n}, n == wanted.n_tokens) for n in LENGTHS]
    hot = [
        choice(f"{t:g}", {"t": f"{t:g}" if t else None}, t == wanted.temperature, title=_temperature_words(t))
        for t in TEMPERATURES
    ]
    lines = [line("New tokens", lengths), line("Temperature", hot)]
    if not wanted.named:
        where = [
            choice(words, {"during": None if name == "all" else name}, name == wanted.during) for name, words in WHERE
        ]
        held = [
            choice("Live", {"freeze": None}, not wanted.freeze),
            choice("As without the push", {"freeze": "1"}, wanted.freeze),
        ]
        lines += [line("Pushed on", where), line("Attention", held, define("held_attention"))]
    return html.Section(lines, className="panel", **{"aria-label": "Settings"})


def _temperature_words(temperature: float) -> str:
    return f"draws with temperature {temperature:g}" if temperature else "always the likeliest token"


def _kept_part(wanted: Steer, kept: Sequence[str]) -> html.Section:
    chips = [choice(name, {"named": None if name == wanted.named else name}, name == wanted.named) for name in kept]
    children: list[Any] = [
        html.Header([html.H2("Named interventions"), define("named_intervention")]),
        html.Div(chips, className="chips", id="steer-named")
        if chips
        else html.P("None are kept in this workspace yet.", className="muted small"),
    ]
    if not wanted.named:
        children.append(
            html.Div(
                className="steer-save",
                children=[
                    dmc.TextInput(
                        id="steer-name",
                        placeholder="Name for what is pushed now",
                        size="xs",
                        attributes={
                            "input": {
                                "aria-label": "Name for what is pushed now",
                                "maxLength": 60,
                                "data-typing": "steer-name-sent",
                            }
                        },
                    ),
                    button("Save", id="steer-save", **{"data-sends": "steer-name"}),
                ],
            )
        )
    children.append(html.Div(id="steer-saved", className="small", role="status"))
    return html.Section(children, className="panel")


def draw_writing(prompt: str, texts: Mapping[str, str], stopped: bool = False) -> html.Div:
    """The texts as far as they have been written."""
    sides = [
        _side(
            name,
            html.P(
                [html.Span(prompt, className="muted"), text],
                className="steer-text" if stopped else "steer-text writing",
                dir="auto",
            ),
        )
        for name, text in texts.items()
    ]
    return html.Div(_sides(sides), className="steer-result")


def draw_result(prompt: str, found: Steered) -> html.Div:
    """What was written, token by token coloured by how far the push moved it, its price, and the next token."""
    steering = found.steering
    parts = {"plain": steering.plain, "steered": steering.steered, "random": steering.random}
    known = {name: part for name, part in parts.items() if part is not None}
    scale = scale_of(np.concatenate([part.token_kls for part in known.values()]))
    sides = []
    for name, part in known.items():
        strip = token_strip(
            found.tokens[name],
            part.token_kls,
            scale=scale or 1.0,
            label=f"{SIDES[name][0]}: the new tokens, coloured by the KL divergence from the model by itself",
        )
        price = [
            stat("KL a token", f"{number(part.mean_kl)} nats", term="steer_kl", title=exact(part.mean_kl)),
            stat("KL right after the prompt", f"{number(part.kl)} nats", title=exact(part.kl)),
            stat("Perplexity", number(part.perplexity), term="steer_perplexity", title=exact(part.perplexity)),
        ]
        text = html.Div([html.Span(prompt, className="muted"), strip], className="steer-flow", dir="auto")
        sides.append(_side(name, text if prompt else strip, stats(price if name != "plain" else price[2:])))
    about = html.Div(
        [legend(scale, "activation", "KL from the model by itself, nats"), define("steer_kl")],
        className="legend-with-help",
    )
    return html.Div([_done(found.wanted), _sides(sides), about, _changes(found)], className="steer-result")


def _done(wanted: Steer) -> html.P:
    """What the texts were written under: the sliders may have moved since."""
    pushes = [push for push in wanted.pushes if push.times]
    said = ", ".join(f"feature {push.feature} by {push.times:+g} × its maximum" for push in pushes)
    where = {"all": "", "prompt": ", on the prompt alone", "generated": ", on the new text alone"}[wanted.during]
    held = "; attention as without the push" if wanted.freeze else ""
    pushed = f"Pushed: {said.replace('-', '−')}{where}{held}."
    return html.P(f"Under “{wanted.named}”." if wanted.named else pushed, className="small muted", dir="auto")


def _sides(sides: list[html.Article]) -> html.Div:
    return html.Div(sides, className="steer-sides" if len(sides) > 2 else "steer-sides of-two")


def _side(name: str, *children: Any) -> html.Article:
    title, term = SIDES[name]
    return html.Article(
        [html.H2([title, *([define(term)] if term else [])]), *children],
        className="steer-side is-steered" if name == "steered" else "steer-side",
        **{"data-side": name},
    )


def _share(probability: float) -> str:
    """A probability; one too small to matter as such."""
    return percent(probability) if probability >= LEAST else f"<{100 * LEAST:g}%"


def _changes(found: Steered) -> html.Section:
    """How likely the next tokens are, and by how many percentage points that has changed."""
    changes, with_random = found.steering.changes, found.steering.random is not None
    largest = float(changes["change"].abs().max()) or 1.0
    names = ["plain", "steered", *(["random"] if with_random else [])]
    titles = {"plain": "By itself", "steered": "Steered", "random": "Random"}
    head = ["Next token", *(titles[name] for name in names), "Change"]
    rows = [
        html.Tr(
            [
                html.Td(token(str(row["token"]))),
                *(
                    html.Td(_share(float(row[name])), className="number", title=exact(float(row[name])))
                    for name in names
                ),
                html.Td(signed_bar(100 * float(row["change"]), 100 * largest)),
            ]
        )
        for row in changes.to_dict("records")
    ]
    heads = [
        html.Th(words, scope="col", className="number" if 0 < place < len(head) - 1 else "")
        for place, words in enumerate(head)
    ]
    table = html.Table([html.Thead(html.Tr(heads)), html.Tbody(rows)], className="table steer-changes")
    return panel(
        "Right after the prompt",
        html.Div(
            table,
            className="scroll",
            role="region",
            tabIndex=0,
            **{"aria-label": "Probabilities of the next token"},
        ),
        unit="probability of the next token, largest changes (percentage points) first",
    )
