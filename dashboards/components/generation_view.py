"""One generation: steps down, positions across, in each cell the token as it stood, coloured by a feature."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.controls import define, icon, link_button
from dashboards.components.strip import legend
from dashboards.format import count, number
from dashboards.generations import POSITIONS, Generation
from dashboards.links import feature_link, generation_link
from scope.figures.text import visible_token

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["generation_view"]

STATES = {
    "prompt": "given",
    "masked": "noise or mask",
    "committing": "committed at this step",
    "committed": "committed before",
}
"""What the legend calls each state."""


def generation_view(index: str, shown: Generation, names: Mapping[int, str]) -> html.Div:
    """The content of the page; `names` are what features are called."""
    return html.Div(
        className="generation-page",
        children=[
            _head(index, shown),
            _text(shown),
            _colour(index, shown, names),
            html.Div(className="generation-tools", children=[_canvases(index, shown), _legend(shown)]),
            _grid(shown),
            _turner(index, shown),
        ],
    )


def _query(shown: Generation, **changes: object) -> dict[str, object]:
    kept = {"document": shown.document, "block": shown.block or None, "feature": shown.feature}
    return {**kept, **changes}


def _head(index: str, shown: Generation) -> html.Header:
    moves = [
        link_button(
            icon(name),
            href=generation_link(index, document=other, feature=shown.feature),
            label=words,
            className="icon-only",
            **{"data-key": key},
        )
        for name, other, words, key in (
            ("left", shown.previous, "Previous generation", "ArrowLeft"),
            ("right", shown.next, "Next generation", "ArrowRight"),
        )
    ]
    return html.Header(
        className="feature-head",
        children=[
            html.Div(
                [
                    html.H1(["Generation ", html.Span(str(shown.document), className="number")]),
                    html.P(
                        f"{shown.origin} · seed {shown.seed} · {count(shown.n_documents)} generations in this index",
                        className="small muted",
                    ),
                ]
            ),
            html.Div(moves, className="feature-moves"),
        ],
    )


def _text(shown: Generation) -> html.P:
    """The prompt, and the text behind the gap."""
    gap = [html.Span(" … ", className="gap", title="what was generated"), html.Bdi(shown.suffix)]
    rest = gap if shown.suffix else [html.Span(" …", className="gap", title="what was generated")]
    return html.P([html.Bdi(shown.prompt), *rest], className="generation-prompt", dir="auto")


def _colour(index: str, shown: Generation, names: Mapping[int, str]) -> html.P:
    """Which feature colours the cells, and others that fire here; the same positions stay in view."""
    here = {"from": shown.first or None}
    parts: list[Any] = []
    if shown.feature is None:
        parts.append(html.Span("Coloured by no feature yet. "))
    else:
        chosen = html.A(f"feature {shown.feature}", href=feature_link(index, shown.feature))
        name = [" ", html.Bdi(names[shown.feature])] if shown.feature in names else []
        without = html.A("no colour", href=generation_link(index, **_query(shown, feature=None, **here)))
        parts += ["Coloured by ", chosen, *name, " (", without, "). "]
    others = [one for one in shown.strongest if one != shown.feature]
    if others:
        parts.append("Strongest on this canvas: ")
        for place, one in enumerate(others):
            words = f"Colour by feature {one} {names.get(one, '')}".strip()
            link = generation_link(index, **_query(shown, feature=one, **here))
            parts += [", " if place else "", html.A(str(one), href=link, title=words, **{"aria-label": words})]
    return html.P(parts, className="small")


def _canvases(index: str, shown: Generation) -> html.Nav | None:
    """Links to the canvases of the text; None where it is one."""
    if shown.n_blocks == 1:
        return None
    links = [
        html.A(
            f"canvas {block}",
            href=generation_link(index, **_query(shown, block=block or None)),
            className="chip",
            **({"aria-current": "true"} if block == shown.block else {}),
        )
        for block in range(shown.n_blocks)
    ]
    return html.Nav(links, className="chips", **{"aria-label": "Canvases"})


def _legend(shown: Generation) -> html.Div:
    """What marks and colours mean."""
    colours = [] if shown.feature is None else [legend(shown.scale)]
    marks = [html.Span(words, className="mark", **{"data-state": state}) for state, words in STATES.items()]
    return html.Div([*marks, define("commit"), *colours], className="generation-legend small")


def _grid(shown: Generation) -> html.Div:
    cells = shown.cells
    steps = [(step, cells[cells["step"] == step]) for step in sorted(set(cells["step"].tolist()))]
    first = steps[0][1]
    head = [html.Th("step", scope="col", className="corner")]
    head += [html.Th(str(position), scope="col") for position in first["position"]]
    final = [html.Th("end", scope="row")]
    final += [html.Td(visible_token(str(token)), dir="auto", **{"data-state": "final"}) for token in first["final"]]
    table = html.Table(
        [
            html.Caption(
                f"Tokens of canvas {shown.block} at each of {len(steps)} steps of denoising",
                className="visually-hidden",
            ),
            html.Thead(html.Tr(head)),
            html.Tbody([*(_step(step, own, shown) for step, own in steps), html.Tr(final, className="final")]),
        ]
    )
    return html.Div(
        table,
        className="generation-grid",
        tabIndex=0,
        role="region",
        **{"aria-label": "Tokens by step and position"},
    )


def _step(step: int, own: "pd.DataFrame", shown: Generation) -> html.Tr:
    cells: list[Any] = [html.Th(str(step), scope="row")]
    columns = (own[name] for name in ("position", "token", "state", "value", "commit_step"))
    for position, token, state, value, commit in zip(*columns, strict=True):
        said = f"step {step}, position {position}: {STATES[state]}"
        said += "" if commit < 0 else f"; committed for good at step {commit}"
        said += "" if shown.feature is None else f"; strength {number(value)}"
        share = min(1.0, float(value) / shown.scale) if shown.scale > 0 else 0.0
        lit = {"style": {"--v": f"{share:.3f}"}, "data-on": "act"} if share > 0 else {}
        cells.append(html.Td(visible_token(str(token)), title=said, dir="auto", **{"data-state": state}, **lit))
    return html.Tr(cells)


def _turner(index: str, shown: Generation) -> html.Div | None:
    """Links to the positions before and after; None where all are shown."""
    if shown.length <= POSITIONS:
        return None
    last = min(shown.length, shown.first + POSITIONS) - 1
    parts: list[Any] = [html.Span(f"positions {shown.first} to {last} of {count(shown.length)}")]
    if shown.first > 0:
        before = generation_link(index, **_query(shown, **{"from": shown.first - POSITIONS}))
        parts.insert(0, html.A("← earlier", href=before))
    if last + 1 < shown.length:
        parts.append(html.A("later →", href=generation_link(index, **_query(shown, **{"from": last + 1}))))
    return html.Div(parts, className="turner small muted")
