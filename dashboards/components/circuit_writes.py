"""What a feature of a cross-layer transcoder writes, layer by layer, as bars."""

from typing import TYPE_CHECKING

from dash import html

from dashboards.components.controls import define
from dashboards.components.firings import plain_bar, signed_bar
from dashboards.components.strip import token
from dashboards.format import number

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["writes"]


def writes(table: "pd.DataFrame", words: str, logit: str) -> html.Section:
    """How strongly a feature writes each layer, and what that adds to a logit.

    Args:
        table: layer, norm, effect, as `scope.attribution.layer_writes` gives them for one feature.
        words: the feature.
        logit: what the token of the logit reads.
    """
    longest = float(table["norm"].max()) or 1.0
    most = float(table["effect"].abs().max()) or 1.0
    rows = [
        html.Tr(
            [
                html.Th(f"L{layer}", scope="row"),
                html.Td(plain_bar(norm, longest)),
                html.Td(signed_bar(effect, most)),
            ]
        )
        for layer, norm, effect in zip(*(table[name].tolist() for name in ("layer", "norm", "effect")), strict=True)
    ]
    head = [
        html.Th("Layer", scope="col"),
        html.Th("Norm of its decoder", scope="col"),
        html.Th(["Effect on ", html.Q(token(logit))], scope="col"),
    ]
    total = float(table["effect"].sum())
    return html.Section(
        className="circuit-list circuit-writes",
        children=[
            html.H3(["What it writes, layer by layer ", define("layer_writes")]),
            html.P(html.Bdi(words), className="small muted"),
            html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)]),
            html.P(
                f"On the logit {'+' if total > 0 else ''}{number(total)} in all, by every way through the stream and "
                "attention.",
                className="small muted",
            ),
        ],
    )
