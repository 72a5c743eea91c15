"""What per-layer embeddings wrote on a prompt: layers by tokens, one token over the layers, the features pushed, and
what that did for a next token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.charts import chart
from dashboards.components.controls import define, panel
from dashboards.components.firings import choice, named_feature, plain_bar, signed_bar
from dashboards.components.prompt_state import scale_of, whole_number
from dashboards.components.strip import legend, token
from dashboards.components.table_effects_view import draw_table_effects
from dashboards.components.tables import stacking_table
from dashboards.components.token_grid import column_turner, column_window, grid_saves, token_grid
from dashboards.format import exact, number, percent
from dashboards.models import Written
from dashboards.queries import records
from scope.figures import Theme, per_layer_bars

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.tables import TableEffects
    from scope.features.index import FeatureIndex

__all__ = ["EmbeddingsSelection", "draw_embeddings"]

PARTS = {
    "table": ("The layer's table", "written by the look-up in the layer's own table"),
    "projection": ("Projected main embedding", "written by the projection of the main embedding"),
}
CHART_HEIGHT = 260


@dataclass(frozen=True)
class EmbeddingsSelection:
    """What is selected on the page, as its address says."""

    token: int | None = None
    layer: int | None = None
    part: str = "table"
    """Of `PARTS`: what the cells show."""
    start: int | None = None
    """First token that is drawn."""
    target: int | None = None
    """A next token, by its id: what the tables did for it is shown."""

    @classmethod
    def of(cls, query: Mapping[str, Any]) -> "EmbeddingsSelection":
        """The selection of an address; what cannot be read is left open."""
        part = str(query.get("part", ""))
        return cls(
            whole_number(query, "token"),
            whole_number(query, "layer"),
            part if part in PARTS else "table",
            whole_number(query, "from"),
            whole_number(query, "target"),
        )


def draw_embeddings(
    written: Written,
    query: Mapping[str, Any],
    index: "FeatureIndex",
    theme: Theme,
    effects: "TableEffects | None" = None,
    waiting: bool = False,
) -> html.Div:
    """The result, for what is selected; `effects` of the chosen next token, which may be waited for."""
    assert written.report is not None
    selection, report = EmbeddingsSelection.of(query), written.report
    position = len(report.tokens) - 1
    if selection.token is not None and selection.token <= position:
        position = selection.token
    here = report.of_token(position)
    layer = int(here["layer"].to_numpy()[here["share_table"].to_numpy().argmax()])
    if selection.layer is not None and selection.layer < written.facts.n_layers:
        layer = selection.layer
    switches = [choice(words, {"part": name}, selection.part == name) for name, (words, _) in PARTS.items()]
    return html.Div(
        className="lens-result",
        children=[
            html.Div([html.Span("Cells", className="muted small"), *switches], className="chips"),
            _grid(written, selection, position, layer),
            html.Div(
                [
                    _features(written, index, position, layer),
                    html.Aside([_one(here, layer, report.tokens[position]), _bars(report.writes, position, theme)]),
                ],
                className="columns",
            ),
            draw_table_effects(
                written,
                selection.target,
                effects,
                waiting=waiting,
                shown=column_window(len(report.tokens), selection.start, position),
                at=position,
                layer=layer,
            ),
        ],
    )


def _grid(written: Written, selection: EmbeddingsSelection, position: int, layer: int) -> html.Section:
    report = written.report
    assert report is not None
    n = len(report.tokens)
    own = report.writes[report.writes["part"] == selection.part]
    share, norm = (own.pivot(index="layer", columns="position", values=name) for name in ("share", "norm"))
    scale = scale_of(share.to_numpy()) or 1.0
    shown = column_window(n, selection.start, position)
    part = slice(shown.start, shown.stop)
    rows = [
        {
            "id": int(one),
            "name": f"layer {one}",
            "v": share.loc[one].to_numpy()[part].tolist(),
            "h": [f"norm {number(float(size))}" for size in norm.loc[one].to_numpy()[part]],
        }
        for one in reversed(share.index.tolist())
    ]
    about = PARTS[selection.part][1]
    grid = token_grid(
        [report.tokens[place] for place in shown],
        list(shown),
        rows,
        what="layer",
        corner="Layer",
        caption=f"Layers by tokens: share of the residual stream's norm {about}",
        scale=scale,
        at=position,
        row=layer,
        value="share",
        id="embeddings-grid",
    )
    head = [
        html.H2("Written into the residual stream"),
        html.Span("click a cell for its features", className="unit"),
        html.Span(
            [legend(scale, "activation", "share of the stream's norm"), define("per_layer_share")],
            className="legend-with-help push",
        ),
    ]
    foot = html.Div([column_turner(shown, n), grid_saves()], className="grid-foot")
    return html.Section([html.Header(head), grid, foot], className="panel heatmap-part")


def _bars(writes: "pd.DataFrame", position: int, theme: Theme) -> html.Section:
    text = str(writes.loc[writes["position"] == position, "token"].iloc[0])
    figure = per_layer_bars(writes, position, theme=theme)
    figure.update_layout(
        title=None,
        margin={"t": 46, "b": 40, "l": 50, "r": 4},
        legend={"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "orientation": "v", "font": {"size": 11}},
    )
    figure.update_yaxes(title=None)
    words = f"share of the residual stream's norm that table and projection wrote at {text!r}, by layer"
    return panel(
        "Table against computed part",
        chart(figure, id="embeddings-chart", height=CHART_HEIGHT, words=words),
        term="per_layer_parts",
        unit="share of the stream's norm, by layer",
    )


def _one(here: "pd.DataFrame", layer: int, text: str) -> html.Section:
    row = here[here["layer"] == layer].iloc[0]
    rows = [
        [
            PARTS[part][0],
            html.Td(number(float(row[part])), title=exact(float(row[part]))),
            html.Td(percent(float(row[f"share_{part}"])), title=exact(float(row[f"share_{part}"]))),
        ]
        for part in PARTS
    ]
    table = stacking_table("Parts", ("Part", "Norm", "Share"), rows, numeric={1, 2}, className="compact")
    return html.Section(
        [html.Header([html.H2(["At ", token(text)]), html.Span(f"layer {layer}", className="unit")]), table],
        className="panel",
    )


def _features(written: Written, index: "FeatureIndex", position: int, layer: int) -> html.Section:
    report = written.report
    assert report is not None
    if written.problem:
        words: Any = [
            f"{written.problem} Choose an index of such an SAE in the header to see which features the writes push."
        ]
        return panel("Along which features", html.P(words, className="muted small"), term="per_layer_effect")
    table = report.features
    own = table[(table["position"] == position) & (table["layer"] == layer)]
    if own.empty:
        words = [
            "No feature of ", html.Code(written.hook), " fires here that this layer's write reaches: the SAE sees what "
            "was written up to the layer it reads, and BOS is left out.",
        ]  # fmt: skip
        return panel("Along which features", html.P(words, className="muted small"), term="per_layer_effect")
    most = float(own[["table", "projection"]].abs().to_numpy().max()) or 1.0
    largest = float(own["value"].max()) or 1.0
    rows = []
    for row in records(own):
        link = named_feature(index, int(row["feature"]))
        pushes = [signed_bar(float(row[part]), most) for part in PARTS]
        rows.append([link, plain_bar(float(row["value"]), largest), *pushes])
    drawn = stacking_table(
        "Features", ("Feature", "Fires", "Table", "Projection"), rows, className="pushed-features compact"
    )
    return panel("Along which features", drawn, term="per_layer_effect", unit=written.hook)
