"""Where the tokens of a prompt go, and an edit of that: an expert forbidden, forced, or swapped for another, with the
features that flip and what may come next."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.controls import define, panel
from dashboards.components.experts_view import number_field
from dashboards.components.firings import choice, named_feature, plain_bar, signed_bar
from dashboards.components.prompt_state import whole_number, whole_numbers
from dashboards.components.states import skeleton
from dashboards.components.stats import stat, stats
from dashboards.components.strip import legend, token
from dashboards.components.tables import stacking_table
from dashboards.components.token_grid import column_turner, column_window, grid_saves, token_grid
from dashboards.experts import ExpertEdit, Routed
from dashboards.format import exact, number, percent, plural
from dashboards.links import experts_link
from dashboards.queries import records

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex
    from scope.features.routing import EditEffects

__all__ = ["RoutingSelection", "draw_routing"]

COLUMNS = 48
"""Tokens that are drawn at once: cells hold words."""
FLIPS = 30
"""Features that flip, listed at most."""
CHIPS = 16
"""Experts that can be chosen from buttons; of more, the chosen ones and a field for the number of another."""
ACTIONS = {"forbid": "Forbid", "force": "Force", "swap": "Swap"}


@dataclass(frozen=True)
class RoutingSelection:
    """What is selected, in a prompt that has so many tokens, of a model whose layers have experts."""

    position: int
    layer: int
    expert: int | None
    other: int | None
    action: str
    at: tuple[int, ...]
    """Tokens that the edit counts for; all where there is none."""
    start: int | None

    @classmethod
    def of(cls, query: Mapping[str, Any], routed: Routed) -> "RoutingSelection":
        """The selection of an address; what cannot be read is left open."""
        last, layers = len(routed.tokens) - 1, list(routed.facts.experts)
        place, layer = whole_number(query, "token"), whole_number(query, "layer")
        action = str(query.get("do") or "")
        return cls(
            last if place is None or place > last else place,
            layer if layer in routed.facts.experts else layers[-1],
            whole_number(query, "expert"),
            whole_number(query, "other"),
            action if action in ACTIONS else "",
            tuple(one for one in sorted(whole_numbers(query, "at")) if one <= last),
            whole_number(query, "from"),
        )


def draw_routing(
    routed: Routed, effects: "EditEffects | None", waiting: bool, query: Mapping[str, Any], index: "FeatureIndex"
) -> html.Div:
    """The result: the routing, and what the edit does once that is known."""
    selection = RoutingSelection.of(query, routed)
    changed = html.Div(
        [
            _edit_panel(routed, selection),
            _effects(routed, effects, waiting, selection, ExpertEdit.of(query), index),
        ],
        className="experts-changed",
    )
    aside = html.Aside([_here(routed, selection, index.id)])
    return html.Div(
        [_grid(routed, selection), html.Div([changed, aside], className="columns")], className="lens-result"
    )


def _grid(routed: Routed, selection: RoutingSelection) -> html.Section:
    routing = routed.routing
    assert routing is not None
    n = len(routed.tokens)
    shown = column_window(n, selection.start, selection.position, COLUMNS)
    rows = []
    for layer in sorted(routed.facts.experts, reverse=True):
        own = routing[routing["layer"] == layer]
        experts = own.pivot(index="position", columns="slot", values="expert").loc[list(shown)].to_numpy()
        weights = own.pivot(index="position", columns="slot", values="weight").loc[list(shown)].to_numpy()
        if selection.expert is not None and layer == selection.layer:
            values = (weights * (experts == selection.expert)).sum(-1)
        else:
            values = weights[:, 0]
        rows.append(
            {
                "id": layer,
                "name": f"layer {layer}",
                "v": values.tolist(),
                "w": [" ".join(map(str, row)) for row in experts.tolist()],
                "h": [
                    ", ".join(f"expert {expert} {number(weight)}" for expert, weight in zip(*row, strict=True))
                    for row in zip(experts.tolist(), weights.tolist(), strict=True)
                ],
            }
        )
    scale = max(1.0, max(max(row["v"]) for row in rows))
    chosen = selection.expert is not None
    about = (
        f"weight of the first choice; in layer {selection.layer} that of expert {selection.expert}"
        if chosen
        else "weight of the first choice"
    )
    grid = token_grid(
        [routed.tokens[place] for place in shown],
        list(shown),
        rows,
        what="layer",
        near="of",
        corner="Layer",
        caption=f"Layers by tokens: the experts that each token goes to, the likeliest first, coloured by the {about}",
        scale=scale,
        at=selection.position,
        row=selection.layer,
        pinned_tokens=selection.at,
        text=True,
        plain=True,
        value="weight",
        id="experts-routing-grid",
    )
    head = [
        html.H2("Chosen experts"),
        html.Span("click a cell to see and change its choice", className="unit"),
        html.Span([legend(scale, "activation", about), define("expert_weight")], className="legend-with-help push"),
    ]
    foot = html.Div([column_turner(shown, n, COLUMNS), grid_saves()], className="grid-foot")
    return html.Section([html.Header(head), grid, foot], className="panel heatmap-part")


def _slots(routed: Routed, selection: RoutingSelection) -> "pd.DataFrame":
    routing = routed.routing
    assert routing is not None
    return routing[(routing["layer"] == selection.layer) & (routing["position"] == selection.position)]


def _here(routed: Routed, selection: RoutingSelection, index: str) -> html.Section:
    """The choice for one token at one layer."""
    own = _slots(routed, selection)
    most = float(own["weight"].max()) or 1.0
    rows = [
        [
            choice(
                str(int(row["expert"])),
                {"expert": None if row["expert"] == selection.expert else int(row["expert"]), "layer": selection.layer},
                row["expert"] == selection.expert,
                **{"aria-label": f"Expert {int(row['expert'])}"},
            ),
            plain_bar(float(row["weight"]), most),
            html.Td(percent(row["probability"]), title=exact(row["probability"])),
            html.A(
                "see",
                href=experts_link(index, view="features", layer=selection.layer, expert=int(row["expert"])),
                **{"data-carry": "store text chat"},
            ),
        ]
        for row in records(own)
    ]
    table = stacking_table(
        "The choice", ("Expert", "Weight", "Probability", "Features"), rows, numeric={2}, className="compact"
    )
    parts: list[Any] = [table]
    if routed.dense is not None:
        there = routed.dense[
            (routed.dense["layer"] == selection.layer) & (routed.dense["position"] == selection.position)
        ]
        row = records(there)[0]
        parts.append(
            stats(
                [
                    stat("dense MLP", number(row["dense"]), title=exact(row["dense"])),
                    stat("experts", number(row["experts"]), title=exact(row["experts"])),
                    stat(
                        "share of the dense",
                        percent(row["dense_share"]),
                        term="dense_share",
                        title=exact(row["dense_share"]),
                    ),
                ]
            )
        )
    head = [
        html.H2(["The choice for ", token(routed.tokens[selection.position])]),
        html.Span(f"layer {selection.layer}", className="unit"),
    ]
    return html.Section([html.Header(head), *parts], className="panel")


def _edit_panel(routed: Routed, selection: RoutingSelection) -> html.Section:
    """What is done to the router's choice."""
    n_experts, _ = routed.facts.experts[selection.layer]
    here = [int(one) for one in _slots(routed, selection)["expert"]]
    expert = here[0] if selection.expert is None else selection.expert
    actions = [
        choice(
            words,
            {"do": None if selection.action == name else name, "layer": selection.layer, "expert": expert},
            selection.action == name,
        )
        for name, words in ACTIONS.items()
    ]
    known = (
        range(n_experts)
        if n_experts <= CHIPS
        else sorted({*here, expert, *([selection.other] if selection.other is not None else [])})
    )
    which = [
        choice(str(one), {"expert": one, "layer": selection.layer}, one == expert, **{"aria-label": f"Expert {one}"})
        for one in known
    ]
    settings = [_setting("Do", actions), _setting("Expert", which)]
    if n_experts > CHIPS:
        settings.append(_setting("", number_field("expert", f"0 to {n_experts - 1}, then Enter", "Another expert")))
    if selection.action == "swap":
        others = [
            choice(str(one), {"other": one}, one == selection.other, **{"aria-label": f"Swap with expert {one}"})
            for one in known
            if one != expert
        ]
        settings.append(_setting("With", others))
        if n_experts > CHIPS:
            settings.append(
                _setting("", number_field("other", f"0 to {n_experts - 1}, then Enter", "Expert to swap with"))
            )
    settings.append(_setting("On", _where(routed, selection)))
    return panel(
        f"Change the choice of layer {selection.layer}",
        html.Div(settings, className="experts-edit"),
        term="expert_edit",
    )


def _setting(words: str, chips: list[Any]) -> html.Div:
    return html.Div(
        [html.Span(words, className="muted"), html.Span(chips, className="chips")], className="steer-setting"
    )


def _where(routed: Routed, selection: RoutingSelection) -> list[Any]:
    at, place = selection.at, selection.position
    chips = [choice("All tokens", {"at": None}, not at)]
    chips += [
        choice(
            [token(routed.tokens[one]), " ×"],
            {"at": ",".join(str(other) for other in at if other != one) or None},
            True,
            **{"aria-label": f"Not on token {one}"},
        )
        for one in at
    ]
    if place not in at:
        wanted = ",".join(map(str, sorted([*at, place])))
        chips.append(
            choice(["+ ", token(routed.tokens[place])], {"at": wanted}, False, **{"aria-label": f"On token {place}"})
        )
    return chips


def _effects(
    routed: Routed,
    effects: "EditEffects | None",
    waiting: bool,
    selection: RoutingSelection,
    edit: ExpertEdit | None,
    index: "FeatureIndex",
) -> html.Section:
    if edit is None:
        words = (
            "Choose the expert to swap with."
            if selection.action == "swap"
            else "Forbid, force or swap an expert to see which features begin or cease to fire, and what may come next."
        )
        return panel("What it changes", html.P(words, className="muted small", id="experts-nothing"))
    if effects is None:
        return panel("What it changes", skeleton(26, 220, 220) if waiting else None)
    place = html.Span(["next token after ", token(routed.tokens[effects.position])])
    return html.Section(
        [
            html.Header([html.H2(_in_words(edit, routed)), define("expert_edit")]),
            stats(
                [stat("KL of the next token", f"{number(effects.kl)} nats", term="steer_kl", title=exact(effects.kl))]
            ),
            panel("What may come next", _next(effects), unit=place),
            _flips(effects, index),
        ],
        className="panel experts-effects",
    )


def _in_words(edit: ExpertEdit, routed: Routed) -> str:
    said = {
        "forbid": f"Layer {edit.layer} without expert {edit.expert}",
        "force": f"Layer {edit.layer} with expert {edit.expert} forced",
        "swap": f"Layer {edit.layer}, experts {edit.expert} and {edit.other} swapped",
    }[edit.action]
    return f"{said} on {plural(len(edit.positions), 'token')}" if edit.positions else f"{said} on all tokens"


def _next(effects: "EditEffects") -> html.Div:
    table = effects.next_tokens
    most = float(table["change"].abs().max()) or 1.0
    rows = [
        [
            token(str(row["token"])),
            html.Td(percent(row["before"]), title=exact(row["before"])),
            html.Td(percent(row["after"]), title=exact(row["after"])),
            signed_bar(float(row["change"]), most),
        ]
        for row in records(table)
    ]
    names = ("Next token", "By itself", "Changed", "Change")
    return stacking_table("What may come next", names, rows, numeric={1, 2}, className="experts-next compact")


def _flips(effects: "EditEffects", index: "FeatureIndex") -> html.Section:
    flips = effects.flips
    if flips is None or flips.empty:
        words = "No feature of this SAE begins or ceases to fire."
        return panel("Features that flip", html.P(words, className="muted small"), term="expert_flips")
    rows = []
    for row in records(flips.head(FLIPS)):
        rows.append(
            [
                [token(str(row["token"])), html.Span(f" {int(row['position'])}", className="muted number")],
                named_feature(index, int(row["feature"])),
                html.Td(number(row["before"]), title=exact(row["before"])),
                html.Td(number(row["after"]), title=exact(row["after"])),
                "begins" if row["before"] == 0 else "ceases",
            ]
        )
    shown = f", the {FLIPS} largest" if len(flips) > FLIPS else ""
    begins = int((flips["before"] == 0).sum())
    unit = f"{plural(begins, 'begins', 'begin')}, {plural(len(flips) - begins, 'ceases', 'cease')}{shown}"
    names = ("Token", "Feature", "Before", "After", "It")
    table = stacking_table("Features that flip", names, rows, numeric={2, 3}, className="experts-flips compact")
    return panel("Features that flip", table, unit=unit, term="expert_flips")
