"""The feature browser: a grid that asks the server for the rows it shows, and a scatter plot of the same features.

The address is the state of both (`dashboards.listing.FeatureQuery` reads it). Every input writes its part of it;
`#features-query` holds a copy that the server gets with each request for rows, and assets/46_scatter.js reads the
address itself. An area that is drawn in the plot is one more filter; a row of the grid that is pointed at is marked in
the plot.
"""

import shlex
from typing import TYPE_CHECKING, Any

import dash_ag_grid as dag
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate

from dashboards.columns import available
from dashboards.components import features_view, states
from dashboards.context import Context
from dashboards.format import plural
from dashboards.links import View, features_link
from dashboards.listing import FeatureQuery, grid_rows, listing
from dashboards.marks import marks_of
from dashboards.pages import Page
from dashboards.queries import random_feature
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.workspace import Entry

__all__ = ["register", "render"]

BLOCK = 60
MAX_BLOCK = 1_000
"""Rows that one request may ask for."""
INPUTS = (
    ("features-text", "value"),
    ("features-show", "value"),
    ("features-language", "value"),
    ("features-source", "value"),
    ("features-kind", "value"),
    ("features-starred", "checked"),
    ("features-list", "value"),
    ("features-density", "value"),
    ("features-a", "value"),
    ("features-b", "value"),
    ("features-plot", "value"),
    ("features-x", "value"),
    ("features-y", "value"),
    ("features-colour", "value"),
    ("features-columns", "value"),
    ("features-role", "value"),
    ("features-content", "value"),
)
"""What writes the address, in the order that `filterFeatures` of assets/40_grid.js takes it."""


def render(context: Context, view: View) -> Page:
    """The browser of one index, as its address says."""
    entry = context.entry(view)
    index = context.index(entry.id)
    query = FeatureQuery.of(view.query)
    content = html.Div(
        className="features-page",
        children=[
            html.Header(
                className="page-head",
                children=[
                    html.H1("Features"),
                    html.Span(id="features-count", className="muted", role="status"),
                    features_view.downloads(entry.id, random_feature(index)),
                ],
            ),
            features_view.toolbar(index, query),
            features_view.filters(index, query, sorted(marks_of(index).lists), view.get("cols")),
            html.Div(id="features-problem"),
            html.Div(
                className="features-columns",
                children=[
                    html.Div([_grid(entry.id, index, view, query), features_view.notes(index)], className="grid-part"),
                    features_view.plot(index, view, _umap_command(context, entry, index)),
                ],
            ),
            dcc.Store(id="features-query", data=view.query),
            dcc.Store(id="features-saved"),
        ],
    )
    return Page(content, "Features", "features", "" if view.index else features_link(entry.id, **view.query))


def _umap_command(context: Context, entry: "Entry", index: "FeatureIndex") -> str:
    """What makes the map of the decoder: indexing again what is indexed already adds nothing else."""
    parents = {parent.kind: str(parent.path) for parent in context.workspace.parents(entry)}
    words = [parents.get("activation-store", "STORE"), parents.get("sae", "SAE"), "--out", str(index.path), "--umap"]
    return " ".join(["scope", "index", *map(shlex.quote, words)])


def _grid(id: str, index: "FeatureIndex", view: View, query: FeatureQuery) -> dag.AgGrid:
    shown = features_view.chosen_columns(view.get("cols"), index)
    return dag.AgGrid(
        id="features-grid",
        className="features-grid",
        rowModelType="infinite",
        columnDefs=features_view.column_definitions(available(index), shown, dict(query.sort), query.contrasts),
        defaultColDef={"resizable": True, "sortable": False, "suppressMovable": True, "suppressHeaderMenuButton": True},
        columnSize="responsiveSizeToFit",
        getRowId="params.data.id",
        dashGridOptions={
            "rowHeight": 46,
            "headerHeight": 38,
            "cacheBlockSize": BLOCK,
            "maxBlocksInCache": 40,
            "infiniteInitialRowCount": BLOCK,
            "maxConcurrentDatasourceRequests": 1,
            "blockLoadDebounceMillis": 60,
            "rowSelection": {"mode": "singleRow", "checkboxes": False, "enableClickSelection": False},
            "suppressCellFocus": False,
            "suppressClickEdit": True,
            "stopEditingWhenCellsLoseFocus": True,
            "enableCellTextSelection": True,
            "animateRows": False,
            "suppressNoRowsOverlay": True,
            "context": {"index": id},
        },
        style={"height": None},
    )


def register(app: Dash, context: Context) -> None:
    """The grid's rows, what is written in them, and the address that follows the state."""
    app.clientside_callback(
        ClientsideFunction("scope", "filterFeatures"),
        Output("features-grid", "className"),
        *(Input(*name) for name in INPUTS),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("scope", "askRows"),
        Output("features-query", "storage_type"),
        Input("features-query", "data"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("features-grid", "getRowsResponse"),
        Output("features-count", "children"),
        Output("features-problem", "children"),
        Input("features-grid", "getRowsRequest"),
        State("features-query", "data"),
        prevent_initial_call=True,
    )
    def rows(asked: dict[str, Any] | None, address: dict[str, str] | None) -> tuple[dict[str, Any], Any, Any]:
        if not asked:
            raise PreventUpdate
        sort = ",".join(f"{item['colId']}:{item['sort']}" for item in asked.get("sortModel") or ())
        try:
            index = context.index(asked["context"]["index"])
            query = FeatureQuery.of({**(address or {}), "sort": sort})
            start = int(asked["startRow"])
            found, total = grid_rows(index, query, start, min(int(asked["endRow"]), start + MAX_BLOCK))
            words = _count(total, index.d_sae, listing(index, query).note)
        except Exception as problem:
            return {"rowData": [], "rowCount": 0}, "", states.error(problem, "These features could not be shown")
        return {"rowData": found, "rowCount": total}, words, None

    @app.callback(
        Output("features-saved", "data"),
        Input("features-grid", "cellValueChanged"),
        State("features-grid", "dashGridOptions"),
        prevent_initial_call=True,
    )
    def save(changes: list[dict[str, Any]] | None, options: dict[str, Any]) -> Any:
        if not changes:
            raise PreventUpdate
        index = context.index(options["context"]["index"])
        labels = getattr(index, "labels", None)
        if labels is None:
            raise InvalidInputError("Labels cannot be kept for this index.")
        for change in changes:
            feature, value = int(change["data"]["feature"]), change.get("value")
            if change["colId"] == "starred":
                labels.set(feature, starred=bool(value))
            elif change["colId"] == "label":
                labels.set(feature, text=str(value or ""))
        return {"version": labels.version}


def _count(total: int, d_sae: int, note: str) -> str:
    if total == 0:
        return "No feature matches. Loosen a filter, or search for another token." + (f" {note}" if note else "")
    words = plural(d_sae, "feature") if total == d_sae else f"{total:,} of {plural(d_sae, 'feature')}"
    return f"{words} · {note}" if note else words
