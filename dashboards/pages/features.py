"""The feature browser: a grid that asks the server for the rows it shows, sorted and filtered there."""

from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, html
from dash.exceptions import PreventUpdate

from dashboards.components import states
from dashboards.components.controls import choice, define
from dashboards.context import Context
from dashboards.format import plural
from dashboards.links import View, features_link
from dashboards.pages import Page
from dashboards.queries import FeatureFilter, feature_rows, parse_sort

__all__ = ["register", "render"]

BLOCK = 60
SHOWS = (("all", "All"), ("alive", "Alive"), ("dead", "Dead"), ("over-dense", "Over-dense"))


def render(context: Context, view: View) -> Page:
    """The browser of one index, as its address says."""
    entry = context.entry(view)
    index = context.index(entry.id)
    sort = dict(parse_sort(view.get("sort")))
    grid = dag.AgGrid(
        id="features-grid",
        className="features-grid",
        rowModelType="infinite",
        columnDefs=_columns(sort),
        defaultColDef={"resizable": True, "sortable": False, "suppressMovable": True, "suppressHeaderMenuButton": True},
        columnSize="responsiveSizeToFit",
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
            "enableCellTextSelection": True,
            "animateRows": False,
            "suppressNoRowsOverlay": True,
            "context": {"index": entry.id},
        },
        style={"height": None},
    )
    content = html.Div(
        className="features-page",
        children=[
            html.Header(
                className="page-head",
                children=[html.H1("Features"), html.Span(id="features-count", className="muted", role="status")],
            ),
            _toolbar(view, index.languages, index.sources),
            html.Div(id="features-problem"),
            grid,
            html.P(
                [
                    "Density is the share of tokens that a feature fires on ",
                    define("density"),
                    "; the small histogram shows how strongly it fires, weak to strong, on a logarithmic scale.",
                ],
                className="small muted grid-note",
            ),
        ],
    )
    return Page(content, "Features", "features", "" if view.index else features_link(entry.id, **view.query))


def _toolbar(view: View, languages: Any, sources: Any) -> html.Div:
    return html.Div(
        className="toolbar",
        role="search",
        children=[
            dmc.TextInput(
                id="features-text",
                value=view.get("q"),
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
                value=view.get("show", "all") if view.get("show", "all") in dict(SHOWS) else "all",
                size="sm",
                **{"aria-label": "Which features"},
            ),
            choice("features-language", "Any main language", languages, view.get("language") or None),
            choice("features-source", "Any main source", sources, view.get("source") or None),
        ],
    )


def _columns(sort: dict[str, bool]) -> list[dict[str, Any]]:
    def column(
        field: str, title: str, width: int, renderer: str, *, sortable: bool = False, **more: Any
    ) -> dict[str, Any]:
        return {
            "field": field,
            "headerName": title,
            "width": width,
            "minWidth": min(width, 80),
            "cellRenderer": renderer,
            "sortable": sortable,
            **({"sort": "asc" if sort[field] else "desc"} if field in sort else {}),
            "sortingOrder": ["desc", "asc", None],
            **more,
        }

    return [
        column("feature", "Feature", 92, "FeatureLink", sortable=True, minWidth=84, maxWidth=110),
        column("tokens", "Fires on", 300, "Tokens", minWidth=170, flex=3),
        column("density", "Density", 150, "Density", sortable=True, minWidth=128, maxWidth=190),
        column(
            "spark",
            "Strength",
            116,
            "Spark",
            minWidth=110,
            maxWidth=130,
            headerTooltip="How strongly it fires: weak to strong, logarithmic",
        ),
        column("max_value", "Max", 92, "Number", sortable=True, minWidth=78, maxWidth=110, type="rightAligned"),
        column("mean_value", "Mean", 92, "Number", sortable=True, minWidth=78, maxWidth=110, type="rightAligned"),
        column("logits", "Promotes", 240, "Logits", minWidth=150, flex=2),
        column("top_language", "Language", 104, "Plain", sortable=True, minWidth=92, maxWidth=130),
    ]


def register(app: Dash, context: Context) -> None:
    """The grid's rows, and the address that follows its state."""
    app.clientside_callback(
        ClientsideFunction("scope", "filterFeatures"),
        Output("features-grid", "className"),
        Input("features-text", "value"),
        Input("features-show", "value"),
        Input("features-language", "value"),
        Input("features-source", "value"),
        State("features-grid", "id"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("features-grid", "getRowsResponse"),
        Output("features-count", "children"),
        Output("features-problem", "children"),
        Input("features-grid", "getRowsRequest"),
        State("features-text", "value"),
        State("features-show", "value"),
        State("features-language", "value"),
        State("features-source", "value"),
        prevent_initial_call=True,
    )
    def rows(
        asked: dict[str, Any] | None, text: str | None, show: str, language: str | None, source: str | None
    ) -> tuple[dict[str, Any], Any, Any]:
        if not asked:
            raise PreventUpdate
        wanted = FeatureFilter(text or "", show, language or "", source or "")
        sort = parse_sort(",".join(f"{item['colId']}:{item['sort']}" for item in asked.get("sortModel") or ()))
        try:
            index = context.index(asked["context"]["index"])
            found, total = feature_rows(index, wanted, sort, int(asked["startRow"]), int(asked["endRow"]))
        except Exception as problem:
            return {"rowData": [], "rowCount": 0}, "", states.error(problem, "These features could not be shown")
        return {"rowData": found, "rowCount": total}, _count(total, index.d_sae), None


def _count(total: int, d_sae: int) -> str:
    if total == d_sae:
        return plural(d_sae, "feature")
    if total == 0:
        return "No feature matches. Loosen a filter, or search for another token."
    return f"{total:,} of {plural(d_sae, 'feature')}"
