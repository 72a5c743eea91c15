"""What each token's row in each layer's own table did for a next token: a choice of it, and layers by tokens."""

from typing import TYPE_CHECKING

from dash import html

from dashboards.components.controls import define
from dashboards.components.firings import prediction_chips
from dashboards.components.prompt_state import scale_of
from dashboards.components.states import skeleton
from dashboards.components.strip import legend, token
from dashboards.components.token_grid import grid_saves, token_grid
from dashboards.format import exact, number
from dashboards.models import Written

if TYPE_CHECKING:
    from scope.attribution.tables import TableEffects

__all__ = ["draw_table_effects"]

HEIGHTS = (24, 200)


def draw_table_effects(
    written: Written,
    target: int | None,
    effects: "TableEffects | None",
    *,
    waiting: bool,
    shown: range,
    at: int,
    layer: int,
) -> html.Section:
    """The part of the page.

    Args:
        written: the prompt, and what may come next.
        target: id of the next token that is asked about.
        effects: what is known of it.
        waiting: whether it is being computed.
        shown: the tokens that are drawn.
        at: the selected token.
        layer: the selected layer.
    """
    head = [
        html.H2("What the tables did for a next token"),
        html.Span("each row at zero, the rest reacting", className="unit"),
    ]
    body = [prediction_chips(written.next_tokens, target)]
    if target is not None and effects is None and waiting:
        body.append(skeleton(*HEIGHTS))
    if target is not None and effects is not None:
        scale = scale_of(effects.table["effect"].to_numpy()) or 1.0
        signs = [legend(scale, "effect", "effect on the logit"), define("table_effect")]
        head.append(html.Span(signs, className="legend-with-help push"))
        body += [
            _sum(written, target, effects),
            _grid(written, effects, scale, shown, at, layer),
            html.Div(grid_saves(), className="grid-foot"),
        ]
    return html.Section([html.Header(head), *body], className="panel heatmap-part table-effects")


def _sum(written: Written, target: int, effects: "TableEffects") -> html.P:
    def shown(value: float) -> html.Span:
        return html.Span(number(value), className="number", title=exact(value))

    known = [token(one.text) for one in written.next_tokens if one.token_id == target] or [f"token {target}"]
    words = ["The logit of ", *known, ", less the mean over all tokens, is ", shown(effects.value)]
    words += ["; without the tables it would be "]
    return html.P([*words, shown(effects.without), "."], className="muted small")


def _grid(written: Written, effects: "TableEffects", scale: float, shown: range, at: int, layer: int) -> html.Div:
    assert written.report is not None
    wide = effects.table.pivot(index="layer", columns="position", values="effect")
    cells = wide.reindex(index=range(written.facts.n_layers), columns=list(shown)).fillna(0.0).to_numpy()
    rows = [{"id": one, "name": f"layer {one}", "v": cells[one].tolist()} for one in reversed(range(len(cells)))]
    return token_grid(
        [written.report.tokens[place] for place in shown],
        list(shown),
        rows,
        what="layer",
        corner="Layer",
        caption="Layers by tokens: what the token's row in the layer's table did for the next token's logit",
        scale=scale,
        kind="effect",
        at=at,
        row=layer,
        value="effect",
        id="table-effects-grid",
    )
