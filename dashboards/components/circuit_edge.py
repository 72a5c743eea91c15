"""A selected edge on the circuit page: tested in the model by itself, predicted beside measured."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.controls import button, define
from dashboards.components.progress import progress_box
from dashboards.format import count, exact, number

if TYPE_CHECKING:
    from scope.attribution.verdicts import Verdicts
    from scope.attribution.verification import Verification

__all__ = ["test_part", "tested"]

COLUMNS = (
    ("Predicted", "predicted", "By the edge"),
    ("Measured", "measured", "In the model, attention and norms live"),
    ("Attention held", "measured_frozen", "In the model, attention patterns held"),
    ("Random", "measured_random", "Something else written there, as strongly"),
)
SET_TO = {0.0: "set to 0", 2.0: "doubled"}


def test_part() -> html.Section:
    """The button that tests an edge, and the place for what it shows."""
    return html.Section(
        id="circuit-test-part",
        className="circuit-list circuit-test",
        hidden=True,
        children=[
            html.H3(["Does this edge hold in the model? ", define("path_patching")]),
            html.Div([button("Test the edge", id="circuit-test-run", className="tiny")], className="chips"),
            progress_box("circuit-test"),
            html.Div(id="circuit-test-result"),
        ],
    )


def tested(found: "Verification", judged: "Verdicts", source: int, target: int) -> html.Div | None:
    """What testing an edge has shown; nothing where it was not tested.

    Args:
        found: what path patching has measured.
        judged: which edges hold.
        source: the node that the edge comes from.
        target: the node that it goes to.
    """
    pairs, verdicts = found.pairs, judged.pairs
    own = pairs[(pairs["source"] == source) & (pairs["target"] == target)].sort_values("factor")
    verdict = verdicts[(verdicts["source"] == source) & (verdicts["target"] == target)]
    if own.empty or verdict.empty:
        return None
    slope, holds = float(verdict["slope"].iloc[0]), bool(verdict["holds"].iloc[0])
    rows = [
        html.Tr(
            [
                html.Th(SET_TO.get(row["factor"], f"times {number(row['factor'])}"), scope="row"),
                *(_change(row[name], holds if name == "measured" else None) for _, name, _ in COLUMNS),
            ]
        )
        for row in own.to_dict("records")
    ]
    head = html.Tr(
        [
            html.Th("Source", scope="col"),
            *(html.Th(title, scope="col", className="number", title=words) for title, _, words in COLUMNS),
        ]
    )
    beside = verdicts[verdicts["source"] == source]
    return html.Div(
        className="circuit-tested",
        children=[
            html.P(
                [
                    html.Strong(
                        "It holds" if holds else "It does not hold",
                        className="circuit-holds" if holds else "circuit-fails",
                    ),
                    ": measured is ",
                    html.Span(number(slope), className="number", title=exact(slope)),
                    " times what the edge predicts, over both runs",
                    "." if all(_same_sign(row) for row in own.to_dict("records")) else ", and not always of its sign.",
                ]
            ),
            html.Table([html.Thead(head), html.Tbody(rows)]),
            html.P(
                f"Change of the target. Tested with it: all edges out of its source, of which "
                f"{count(int(beside['holds'].sum()))} of {count(len(beside))} hold "
                f"(random: {count(int(beside['holds_random'].sum()))}).",
                className="small muted",
            ),
        ],
    )


def _same_sign(row: Mapping[Hashable, Any]) -> bool:
    return bool(row["predicted"] * row["measured"] > 0)


def _change(value: Any, holds: bool | None) -> html.Td:
    verdict = "" if holds is None else " circuit-holds" if holds else " circuit-fails"
    sign = "+" if value > 0 else ""
    return html.Td(f"{sign}{number(float(value))}", className=f"number{verdict}", title=exact(float(value)))
