"""The parts of the feature browser: its inputs, the columns of its grid, the frame of its scatter plot."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
import numpy as np
from dash import html

from dashboards.columns import COLUMNS, DEFAULT_COLUMNS, UMAP, Column, available
from dashboards.components.controls import button, choice, define, icon, link_button
from dashboards.components.states import empty
from dashboards.glossary import GLOSSARY
from dashboards.links import View, feature_link
from dashboards.listing import FeatureQuery

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["chosen_columns", "column_definitions", "downloads", "filters", "notes", "plot", "toolbar"]

SHOWS = (("all", "All"), ("alive", "Alive"), ("dead", "Dead"), ("over-dense", "Over-dense"))
KINDS = (("neutral", "Neutral to language"), ("specific", "Specific to a language"))
DENSITY_FLOOR = -6.0
"""log10 of the density at the left end of the slider, which stands for "any"."""
WIDTHS = {"text": (116, 110, 170), "density": (122, 112, 170)}
NUMBER_WIDTH = (92, 84, 150)


def toolbar(index: "FeatureIndex", query: FeatureQuery) -> html.Div:
    """What one reaches for first."""
    return html.Div(
        className="toolbar",
        role="search",
        children=[
            dmc.TextInput(
                id="features-text",
                value=query.q,
                placeholder="Token, promoted token, label or id",
                debounce=250,
                size="sm",
                className="features-search",
                rightSection=html.Kbd("/"),
                attributes={"input": {"data-focus": "/", "aria-label": "Search features"}},
            ),
            dmc.SegmentedControl(
                id="features-show",
                data=[{"value": value, "label": label} for value, label in SHOWS],
                value=query.show,
                size="sm",
                **{"aria-label": "Which features"},
            ),
            choice("features-language", "Any main language", index.languages, query.language or None),
            choice("features-source", "Any main source", index.sources, query.source or None),
            *(
                choice(f"features-{name}", words, known, value or None, shown=bool(known))
                for name, words, known, value in (
                    ("role", "Any main role", index.roles, query.role),
                    ("content", "Any main content", index.kinds, query.content),
                )
            ),
        ],
    )


def filters(index: "FeatureIndex", query: FeatureQuery, lists: Sequence[str], columns: str) -> html.Details:
    """Everything else that narrows the list, and which columns it has; open where some of it is in use."""
    used = bool(
        columns or query.kind or query.starred or query.list or query.contrasts or query.low > 0 or query.high < 1
    )
    return html.Details(
        open=used,
        className="filters",
        children=[
            html.Summary("More filters, columns", className="small"),
            html.Div(
                className="filter-grid",
                children=[
                    _density(query),
                    _contrast(query),
                    html.Div(
                        className="filter-row",
                        children=[
                            dmc.Select(
                                id="features-kind",
                                data=[{"value": value, "label": label} for value, label in KINDS],
                                value=query.kind or None,
                                placeholder="Any spread over languages",
                                clearable=True,
                                size="sm",
                                className="filter wide",
                                comboboxProps={"shadow": "md"},
                                **{"aria-label": "Spread over languages"},
                            ),
                            choice("features-list", "Any list" if lists else "No lists yet", lists, query.list or None),
                            dmc.Checkbox(id="features-starred", label="Starred", checked=query.starred, size="sm"),
                        ],
                    ),
                    _columns(index, columns),
                ],
            ),
        ],
    )


def _columns(index: "FeatureIndex", columns: str) -> html.Div:
    known = [one for one in available(index) if one.name not in ("feature", *UMAP)]
    return html.Div(
        className="filter-row",
        children=[
            html.Span("Columns", className="small muted"),
            dmc.MultiSelect(
                id="features-columns",
                data=[{"value": one.name, "label": one.title} for one in known],
                value=chosen_columns(columns, index),
                placeholder="Add a column",
                size="sm",
                searchable=True,
                className="columns-choice",
                comboboxProps={"shadow": "md"},
                **{"aria-label": "Columns of the list"},
            ),
        ],
    )


def _density(query: FeatureQuery) -> html.Div:
    ends = [np.log10(query.low) if query.low > 0 else DENSITY_FLOOR, np.log10(query.high) if query.high > 0 else 0.0]
    return html.Div(
        className="density-filter",
        children=[
            html.Div(["Density ", define("density"), html.Span(id="features-density-words")], className="small muted"),
            dmc.RangeSlider(
                id="features-density",
                value=[round(max(DENSITY_FLOOR, float(end)), 2) for end in ends],
                min=DENSITY_FLOOR,
                max=0,
                step=0.1,
                minRange=0.1,
                label=None,
                size="sm",
                color="gray",
                thumbFromLabel="Lowest density, as a power of ten",
                thumbToLabel="Highest density, as a power of ten",
            ),
        ],
    )


def _contrast(query: FeatureQuery) -> html.Div:
    def field(name: str, title: str, placeholder: str, value: str) -> dmc.TextInput:
        return dmc.TextInput(
            id=f"features-{name}",
            value=value,
            placeholder=placeholder,
            debounce=500,
            size="sm",
            className="condition",
            attributes={"input": {"aria-label": title, "spellcheck": "false", "autocomplete": "off"}},
        )

    return html.Div(
        className="filter-row contrast",
        children=[
            html.Span("Fires on", className="small muted"),
            field("a", "Fires on (condition A)", "language:de", query.a),
            html.Span("and not on", className="small muted"),
            field("b", "and not on (condition B)", "everything else", query.b),
            define("contrast"),
        ],
    )


def downloads(index: str, random: int) -> html.Div:
    """A feature by chance, and links to exactly the list shown; assets/40_grid.js gives them the address's query."""
    return html.Div(
        [
            link_button(
                icon("shuffle"),
                href=feature_link(index, random),
                label="A random feature",
                className="icon-only",
                **{"data-key": "r"},
            ),
            *(
                html.A(
                    [icon("download"), name],
                    href=f"/export/{index}/features.{kind}",
                    download="",
                    className="button",
                    title=f"Download the features that are listed, in this order, as {name}",
                    **{"data-export": kind, "data-index": index},
                )
                for kind, name in (("csv", "CSV"), ("parquet", "Parquet"))
            ),
        ],
        className="chips downloads",
    )


def notes(index: "FeatureIndex") -> html.Details:
    """What each column means, formulas included."""
    terms = dict.fromkeys(["spark", "logits", *(one.term for one in available(index) if one.term)])
    listed = [
        part
        for term in terms
        for part in (
            html.Dt(GLOSSARY[term].name),
            html.Dd([GLOSSARY[term].definition, " ", html.Code(GLOSSARY[term].formula)]),
        )
    ]
    return html.Details(
        [
            html.Summary("What the columns mean, and keys"),
            html.P(
                [
                    "Arrow keys move through the list; ",
                    html.Kbd("Enter"),
                    " opens a feature, on its name it edits the label, as ",
                    html.Kbd("F2"),
                    " does.",
                ]
            ),
            html.Dl(listed, className="definitions"),
        ],
        className="small muted grid-note",
    )


# --- the grid -------------------------------------------------------------------------------------------------------


def chosen_columns(text: str, index: "FeatureIndex") -> list[str]:
    """The statistics that an address asks for; the default ones where it does not say."""
    known = {column.name for column in available(index)} - {"feature", *UMAP}
    wanted = [name for name in text.split(",") if name in known]
    return wanted or [name for name in DEFAULT_COLUMNS if name in known]


def column_definitions(
    columns: Sequence[Column], shown: Collection[str], sort: Mapping[str, bool], contrasts: bool
) -> list[dict[str, Any]]:
    """AG Grid's columns. All statistics are there, and those that are not `shown` hidden: showing one needs no new
    page."""

    def column(
        field: str, title: str, widths: tuple[int, int, int | None], renderer: str, **more: Any
    ) -> dict[str, Any]:
        width, least, most = widths
        return {
            "field": field,
            "colId": field,
            "headerName": title,
            "width": width,
            "minWidth": least,
            **({"maxWidth": most} if most else {}),
            "cellRenderer": renderer,
            "sortable": True,
            **({"sort": "asc" if sort[field] else "desc"} if field in sort else {}),
            "sortingOrder": ["desc", "asc", None],
            **more,
        }

    def statistic(one: Column) -> dict[str, Any]:
        renderer = {"text": "Plain", "density": "Density", "share": "Share"}.get(one.kind, "Number")
        aligned = {} if one.kind in ("text", "density") else {"type": "rightAligned"}
        widths = WIDTHS.get(one.kind, NUMBER_WIDTH)
        more = {"hide": one.name not in shown, "headerTooltip": one.title, **_defined(one.term), **aligned}
        return column(one.name, one.title, widths, renderer, **more)

    hidden = {"hide": not contrasts}
    return [
        column("starred", "★", (38, 38, 38), "Star", headerTooltip="Starred", cellClass="star-cell", resizable=False),
        column("feature", "Feature", (86, 80, 90), "FeatureLink"),
        column("label", "Fires on, or label", (240, 128, None), "Tokens", flex=3, editable=True),
        column("rate_a", "On A", (120, 110, 150), "Rate", **_defined("rate_a"), **hidden),
        column("rate_b", "On B", (120, 110, 150), "Rate", **_defined("rate_b"), **hidden),
        column(
            "log_ratio", "log ratio", (104, 96, 120), "Number", type="rightAligned", **_defined("contrast"), **hidden
        ),
        column("z", "z", (76, 70, 100), "Number", type="rightAligned", **_defined("z"), **hidden),
        statistic(COLUMNS["density"]),
        column("spark", "Strength", (112, 112, 112), "Spark", **_defined("spark"), sortable=False, hide=contrasts),
        *(statistic(one) for one in columns if one.name not in ("feature", "density", *UMAP)),
        column(
            "logits",
            "Promotes",
            (150, 100, None),
            "Logits",
            **_defined("logits"),
            flex=1,
            sortable=False,
            hide=contrasts,
        ),
    ]


def _defined(term: str) -> dict[str, Any]:
    """What gives the head of a column its "?": assets/40_grid.js draws it."""
    if not term:
        return {}
    entry = GLOSSARY[term]
    words = {
        "innerHeaderComponent": "Head",
        "define": entry.name[:1].upper() + entry.name[1:],
        "definition": entry.definition,
        "formula": entry.formula,
    }
    return {"headerComponentParams": words}


# --- the scatter plot -----------------------------------------------------------------------------------------------


def plot(index: "FeatureIndex", view: View, umap_command: str) -> html.Section:
    """The frame of the scatter plot; assets/46_scatter.js draws it into its canvas from the address. `umap_command` is
    what makes a UMAP where there is none."""
    kind = view.get("plot", "statistics")
    kind = kind if kind in ("statistics", "umap", "none") else "statistics"
    numbers = [one for one in available(index, numbers=True) if one.name != "feature"]
    axes = [{"value": one.name, "label": one.title} for one in numbers if one.name not in UMAP]
    colours = [
        *(
            {"value": name, "label": COLUMNS[name].title}
            for name in ("top_language", "top_source", "top_role", "top_kind")
            if COLUMNS[name].on(index)
        ),
        *axes,
    ]
    has_umap = any(one.name in UMAP for one in numbers)
    return html.Section(
        className="plot-part",
        **{"aria-label": "Scatter plot of the features", "data-plot": kind},
        children=[
            html.Div(
                className="toolbar",
                children=[
                    dmc.SegmentedControl(
                        id="features-plot",
                        data=[
                            {"value": "statistics", "label": "Statistics"},
                            {"value": "umap", "label": "UMAP"},
                            {"value": "none", "label": "No plot"},
                        ],
                        value=kind,
                        size="xs",
                        **{"aria-label": "What is plotted"},
                    ),
                ],
            ),
            html.Div(
                className="toolbar axes",
                children=[
                    _axis("features-x", "Horizontal", axes, view.get("x") or "density", only="statistics"),
                    _axis("features-y", "Vertical", axes, view.get("y") or "max_value", only="statistics"),
                    _axis("features-colour", "Colour", colours, view.get("colour") or None, clearable=True),
                ],
            ),
            html.Div(
                className="scatter",
                **{"data-scatter": json.dumps({"index": index.id, "umap": has_umap})},
                children=[] if has_umap else [_no_umap(umap_command)],
            ),
            html.Div(
                className="toolbar scatter-tools",
                children=[
                    button("Box", className="tiny", **{"data-tool": "box", "aria-pressed": "true"}),
                    button("Lasso", className="tiny", **{"data-tool": "lasso", "aria-pressed": "false"}),
                    button("Clear the area", className="tiny", hidden=True, **{"data-clear-area": "true"}),
                    html.Span(className="scatter-note small muted", role="status"),
                    html.Span(
                        [
                            button(
                                kind.upper(),
                                label=f"Save this plot as {kind.upper()}",
                                className="save",
                                **{"data-save-scatter": kind},
                            )
                            for kind in ("png", "svg")
                        ],
                        className="plot-saves",
                    ),
                ],
            ),
        ],
    )


def _axis(id: str, title: str, data: Any, value: str | None, *, clearable: bool = False, only: str = "") -> html.Label:
    select = dmc.Select(
        id=id,
        data=data,
        value=value,
        clearable=clearable,
        placeholder="none",
        searchable=True,
        allowDeselect=False,
        size="xs",
        comboboxProps={"shadow": "md"},
        **{"aria-label": title},
    )
    return html.Div([html.Span(title, className="small muted"), select], className="axis", **{"data-only": only})


def _no_umap(command: str) -> html.Div:
    state = empty(
        "No UMAP yet",
        "A map of the decoder puts features that write alike next to each other. This adds it to the index:",
        command=command,
    )
    return html.Div(state, className="no-umap")
