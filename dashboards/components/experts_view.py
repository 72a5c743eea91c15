"""Experts over a store: every layer's load, what one layer's are for, and which features fire on whose tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
import numpy as np
from dash import html

from dashboards.components.charts import chart
from dashboards.components.controls import define, link_button, panel
from dashboards.components.firings import choice, plain_bar
from dashboards.components.prompt_state import whole_number
from dashboards.components.states import skeleton
from dashboards.components.strip import legend, token
from dashboards.components.tables import Sorting, stacking_table
from dashboards.components.token_grid import grid_saves, token_grid
from dashboards.experts import BY, MIN_FIRINGS, ExpertStore, Groups
from dashboards.format import count, exact, number, percent, plural
from dashboards.links import experts_link, feature_link
from dashboards.queries import feature_name, records, table_row
from scope.figures import Theme, expert_heatmap

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["ExpertSelection", "draw_load", "draw_pairs", "number_field", "store_chips"]

ROWS = 24
"""Rows of a table at first."""
MEASURES = {"share": "share of the group's tokens", "lift": "times the expert's share of all tokens"}
GROUP_KEYS = {
    "Expert": "expert",
    "Share": "share",
    "Bits": "information",
    "By chance": "information_by_chance",
    "Of its tokens": "top_share",
    "Times its due": "top_lift",
}
PAIR_KEYS = {
    "Feature": "feature",
    "Expert": "expert",
    "Firings": "firings",
    "There": "together",
    "Share": "share",
    "Lift": "lift",
}


@dataclass(frozen=True)
class ExpertSelection:
    """What is selected of a store's experts, as the address says; what cannot be read is left open."""

    layer: int | None = None
    expert: int | None = None
    feature: int | None = None
    by: str = "language"
    of: str = "lift"
    """Of `MEASURES`: what the groups' cells show."""
    sort: str = ""
    rows: int = ROWS

    @classmethod
    def read(cls, query: Mapping[str, Any]) -> "ExpertSelection":
        """The selection of an address."""
        by, of = str(query.get("by", "")), str(query.get("of", ""))
        layer, expert, feature, rows = (whole_number(query, name) for name in ("layer", "expert", "feature", "rows"))
        return cls(
            layer,
            expert,
            feature,
            by if by in BY else "language",
            of if of in MEASURES else "lift",
            str(query.get("sort", "")),
            min(max(rows or ROWS, 1), 500),
        )


def number_field(name: str, words: str, label: str) -> list[Any]:
    """A field for a number, which Enter sends to the store experts-NAME-sent (assets/27_typing.js)."""
    return [
        dmc.TextInput(
            id=f"experts-{name}-text",
            placeholder=words,
            size="xs",
            className="target-text",
            attributes={"input": {"aria-label": label, "inputMode": "numeric", "data-typing": f"experts-{name}-sent"}},
        ),
    ]


def store_chips(stores: Sequence[ExpertStore], store: ExpertStore) -> html.Div:
    """Which store the figures are of, and others to choose."""
    chips = [
        choice(html.Bdi(one.entry.name), {"store": one.entry.id}, one.entry.id == store.entry.id) for one in stores
    ]
    return html.Div([html.Span("Over the tokens of", className="muted small"), *chips], className="chips")


def draw_load(
    load: "pd.DataFrame | None",
    groups: Groups | None,
    store: ExpertStore,
    query: Mapping[str, Any],
    theme: Theme,
    index: str,
) -> html.Div:
    """Load and specialisation, as far as they are known."""
    selection = ExpertSelection.read(query)
    layer = store.layer(selection.layer)
    chips = [choice(f"By {one}", {"by": one, "sort": None}, selection.by == one) for one in BY]
    head = [html.H2(f"What the experts of layer {layer} are for"), html.Span(chips, className="chips push")]
    if groups is None:
        parts: list[Any] = [html.Section([html.Header(head), skeleton(260)], className="panel")]
    else:
        table = html.Section([html.Header(head), *_specialisation(groups, selection)], className="panel")
        aside = html.Aside([_expert(load, groups, selection, layer, index)])
        parts = [html.Div([table, aside], className="columns"), _groups(groups, selection, layer, theme)]
    return html.Div(
        [skeleton(180) if load is None else _load_grid(load, selection, layer), *parts], className="lens-result"
    )


def _load_grid(load: "pd.DataFrame", selection: ExpertSelection, layer: int) -> html.Section:
    share, tokens = (load.pivot(index="layer", columns="expert", values=name) for name in ("share", "tokens"))
    scale = float(share.to_numpy()[share.notna().to_numpy()].max(initial=0.0)) or 1.0
    rows = [
        {
            "id": int(one),
            "name": f"layer {one}",
            "v": [0.0 if math.isnan(value) else value for value in share.loc[one].tolist()],
            "h": [
                "there is none" if math.isnan(value) else f"{percent(value)} of the tokens, {int(n):,}"
                for value, n in zip(share.loc[one].tolist(), tokens.loc[one].tolist(), strict=True)
            ],
        }
        for one in reversed(share.index.tolist())
    ]
    experts = [int(one) for one in share.columns]
    own = share.loc[layer].to_numpy(dtype=float)
    chosen_per_token = float(np.nansum(own))
    even = chosen_per_token / max(1, int(np.isfinite(own).sum()))
    grid = token_grid(
        [str(one) for one in experts],
        experts,
        rows,
        what="layer",
        column="expert",
        corner="Layer",
        caption="Layers by experts: share of the tokens that went to each",
        scale=scale,
        at=selection.expert,
        row=layer,
        value="share",
        id="experts-load-grid",
    )
    head = [
        html.H2("Load"),
        html.Span(f"a token goes to {number(chosen_per_token)}; an even load is {percent(even)}", className="unit"),
        html.Span(
            [legend(scale, "activation", "share of tokens"), define("expert_load")], className="legend-with-help push"
        ),
    ]
    return html.Section(
        [html.Header(head), grid, html.Div(grid_saves(), className="grid-foot")], className="panel heatmap-part"
    )


def _specialisation(groups: Groups, selection: ExpertSelection) -> list[Any]:
    sorting = Sorting.of(selection.sort, GROUP_KEYS, "-information")
    table = groups.table.sort_values(sorting.by, ascending=not sorting.descending, kind="stable")
    most = f"Most of one {selection.by}"
    names = ("Expert", "Share", "Bits", "By chance", most, "Of its tokens", "Times its due")
    rows = [
        [
            _expert_chip(int(row["expert"]), selection.expert),
            html.Td(percent(row["share"]), title=exact(row["share"])),
            html.Td(number(row["information"]), title=exact(row["information"])),
            html.Td(number(row["information_by_chance"]), title=exact(row["information_by_chance"])),
            _group_name(row["top_group"], selection.by) if row["share"] > 0 else "–",
            html.Td(percent(row["top_share"]), title=exact(row["top_share"])),
            html.Td(number(row["top_lift"]), title=exact(row["top_lift"])),
        ]
        for row in records(table.head(selection.rows))
    ]
    drawn = stacking_table(
        "Specialisation of experts",
        names,
        rows,
        numeric={1, 2, 3, 5, 6},
        terms={
            "Share": "expert_load",
            "Bits": "expert_information",
            "By chance": "expert_chance",
            "Times its due": "expert_lift",
        },
        sorting=sorting,
        className="experts-table",
    )
    return [drawn, *_more(len(table), selection)]


def _more(n: int, selection: ExpertSelection) -> list[Any]:
    if n <= selection.rows:
        return []
    return [
        html.Div(choice(f"More of {count(n)}", {"rows": min(500, selection.rows + 4 * ROWS)}, False), className="more")
    ]


def _expert_chip(expert: int, chosen: int | None, more: Mapping[str, Any] | None = None) -> html.Button:
    pressed = expert == chosen
    changes = {"expert": None if pressed else expert, **(more or {})}
    return choice(str(expert), changes, pressed, **{"aria-label": f"Expert {expert}"})


def _group_name(group: Any, by: str) -> Any:
    text = str(group)
    return token(text) if by == "token" else html.Bdi(text or "not known")


def _expert(
    load: "pd.DataFrame | None", groups: Groups, selection: ExpertSelection, layer: int, index: str
) -> html.Section:
    """One expert: its groups, and the way to its features."""
    expert = selection.expert
    own = groups.load[groups.load["expert"] == expert]
    if expert is None or own.empty:
        words = "Choose an expert in the map or the table to see where its tokens come from."
        return panel("One expert", html.P(words, className="muted small"))
    largest = float(own["share"].max()) or 1.0
    rows = [
        [
            _group_name(row["group"], selection.by),
            plain_bar(float(row["share"]), largest, words=percent(row["share"])),
            html.Td(number(row["lift"]), title=exact(row["lift"])),
        ]
        for row in records(own.sort_values("lift", ascending=False, kind="stable"))
    ]
    weight = ""
    if load is not None:
        mine = load[(load["layer"] == layer) & (load["expert"] == expert)]
        if len(mine):
            known = (
                f", with a mean weight of {number(float(mine['weight'].iloc[0]))}"
                if mine["weight"].notna().all()
                else ""
            )
            weight = f"{count(int(mine['tokens'].iloc[0]))} tokens went to it{known}."
    link = experts_link(index, view="features", layer=layer, expert=expert)
    return panel(
        f"Expert {expert}",
        html.P(weight, className="small muted"),
        stacking_table(
            "Its share of each group",
            (selection.by.capitalize(), "Share", "Lift"),
            rows,
            numeric={2},
            className="compact",
        ),
        html.Div(link_button("Its features", href=link, **{"data-carry": "store text chat"}), className="chips more"),
        unit=f"layer {layer}",
        term="expert_lift",
    )


def _groups(groups: Groups, selection: ExpertSelection, layer: int, theme: Theme) -> html.Section:
    figure = expert_heatmap(groups.load, selection.of, theme=theme, title=f"Layer {layer}: {MEASURES[selection.of]}")
    height = int(figure.layout.height)
    chips = [choice(name.capitalize(), {"of": name}, selection.of == name) for name in MEASURES]
    left_out = groups.n_groups - groups.load["group"].nunique()
    unit = f"the largest; {plural(left_out, 'more', 'more')} left out" if left_out else ""
    words = f"{MEASURES[selection.of]}, by {selection.by} and expert"
    return panel(
        f"Each {selection.by}'s experts",
        chart(figure, id="experts-groups-chart", height=height, words=words),
        unit=unit,
        end=html.Span(chips, className="chips"),
    )


def draw_pairs(
    pairs: "pd.DataFrame | None", store: ExpertStore, query: Mapping[str, Any], index: "FeatureIndex"
) -> html.Div:
    """Features and experts that meet: all, those of one feature, or those of one expert."""
    selection = ExpertSelection.read(query)
    layer = store.layer(selection.layer)
    layers = [choice(f"Layer {one}", {"layer": one, "expert": None}, one == layer) for one in store.layers]
    of = [
        choice(
            "All pairs",
            {"feature": None, "expert": None, "sort": None},
            selection.feature is None and selection.expert is None,
        )
    ]
    if selection.expert is not None:
        of.append(choice(f"Expert {selection.expert} ×", {"expert": None}, True))
    if selection.feature is not None:
        of.append(choice(f"Feature {selection.feature} ×", {"feature": None}, True))
    fields = [
        *number_field("feature", "a feature's number, then Enter", "Feature"),
        *number_field("expert", "an expert's number, then Enter", "Expert"),
    ]
    switches = [
        html.Div([html.Span("Experts of", className="muted small"), *layers], className="chips"),
        html.Div([html.Span("Pairs", className="muted small"), *of, *fields], className="chips"),
    ]
    body: Any = skeleton(400)
    if pairs is not None:
        body = _pairs_part(pairs, selection, layer, index)
    return html.Div([html.Div(switches, className="experts-switches"), body], className="lens-result")


def _pairs_part(pairs: "pd.DataFrame", selection: ExpertSelection, layer: int, index: "FeatureIndex") -> html.Section:
    found = pairs
    title: list[Any] = ["Features and experts"]
    if selection.feature is not None:
        found = found[found["feature"] == selection.feature]
        title = [f"Experts of feature {selection.feature}"]
    if selection.expert is not None:
        found = found[found["expert"] == selection.expert]
        title = (
            [f"Features of expert {selection.expert}"]
            if selection.feature is None
            else [*title, f", expert {selection.expert}"]
        )
    sorting = Sorting.of(selection.sort, PAIR_KEYS, "-lift")
    found = found.sort_values([sorting.by, "firings"], ascending=[not sorting.descending, False], kind="stable")
    if found.empty:
        words = (
            f"Nothing to list: features that fire on fewer than {MIN_FIRINGS} tokens of the store are left out, and "
            f"layer {layer} has experts 0 to {int(pairs['expert'].max()) if len(pairs) else 0}."
        )
        return panel("".join(title), html.P(words, className="muted"))
    largest = float(found["lift"].max()) or 1.0
    rows = [
        [
            _feature_cell(int(row["feature"]), selection, index),
            _expert_chip(int(row["expert"]), selection.expert, {"feature": None, "sort": None}),
            html.Td(count(row["firings"])),
            html.Td(count(row["together"])),
            html.Td(percent(row["share"]), title=exact(row["share"])),
            plain_bar(float(row["lift"]), largest),
        ]
        for row in records(found.head(selection.rows))
    ]
    table = stacking_table(
        "Features and experts",
        ("Feature", "Expert", "Firings", "There", "Share", "Lift"),
        rows,
        numeric={2, 3, 4},
        terms={"Share": "expert_share", "Lift": "expert_lift"},
        sorting=sorting,
        className="experts-table",
    )
    unit = f"layer {layer}; features that fire on {MIN_FIRINGS} tokens or more"
    return panel("".join(title), table, *_more(len(found), selection), unit=unit)


def _feature_cell(feature: int, selection: ExpertSelection, index: "FeatureIndex") -> html.Span:
    """The feature's page behind its number, its experts behind its name."""
    name = feature_name(table_row(index, feature)) or "no tokens"
    pressed = feature == selection.feature
    return html.Span(
        [
            html.A(
                str(feature), href=feature_link(index.id, feature), className="number", title=f"Open feature {feature}"
            ),
            choice(
                html.Bdi(name),
                {"feature": None if pressed else feature, "expert": None, "sort": None},
                pressed,
                className="firing-label",
                title="Show its experts",
            ),
        ],
        className="pair-feature",
    )
