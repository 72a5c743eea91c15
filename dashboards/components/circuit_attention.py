"""Attention on the circuit page: the heads of an edge or a node, and the pairs that made a head look where it did."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.circuit_jobs import HeadPlace
from dashboards.components.controls import button, define
from dashboards.components.stats import stat, stats
from dashboards.components.strip import legend, token, token_strip
from dashboards.format import exact, number, percent, plural
from dashboards.links import feature_link

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.query_key import QkPairs

__all__ = ["heads", "pairs"]

MAX_HEADS = 12
MAX_KINDS = 8
KINDS = {
    "embedding": "embedding",
    "table": "per-layer tables",
    "feature": "features",
    "elsewhere": "features of other keys",
    "attention": "what earlier heads wrote",
    "error": "errors",
    "skip": "linear part",
    "bias": "biases",
}


def heads(
    table: "pd.DataFrame", words: str, tokens: Sequence[str], query: int, *, of_edge: bool = True
) -> html.Section:
    """The heads that carry an edge, or that write what a node reads.

    Args:
        table: layer, head, key, weight, the largest first.
        words: the edge or the node.
        tokens: the prompt's.
        query: position of the edge's target, or of the node.
        of_edge: an edge, and not a node.
    """
    total = float(table["weight"].sum())
    shown = table[table["weight"].abs() > 0].head(MAX_HEADS)
    most = float(shown["weight"].abs().max()) if len(shown) else 1.0
    rows = []
    columns = (shown[name].tolist() for name in ("layer", "head", "key", "weight"))
    for layer, head, key, weight in zip(*columns, strict=True):
        alone = layer < 0
        why = HeadPlace(layer, head, query, key)
        rows.append(
            html.Tr(
                [
                    html.Td("no head", title="Along the residual stream alone")
                    if alone
                    else html.Td(f"L{layer} head {head}"),
                    html.Td("" if alone else html.Div(token(tokens[key]), className="circuit-label")),
                    _weight(weight, most),
                    html.Td(percent(weight / total) if total else "–", className="number"),
                    html.Td(
                        None
                        if alone
                        else button(
                            "Why",
                            className="tiny",
                            title="Why this head looked there",
                            **{
                                "data-head": str(why),
                                "aria-pressed": "false",
                                "aria-label": f"Why layer {layer} head {head} looked at position {key}",
                            },
                        )
                    ),
                ]
            )
        )
    names = (("By way of", False), ("Reads", False), ("Weight", True), ("Share", True))
    title, term = ("Heads that carry the edge ", "edge_heads") if of_edge else ("Heads that write it ", "node_heads")
    return html.Section(
        className="circuit-list",
        children=[
            html.H3([title, define(term)]),
            html.P(html.Bdi(words), className="small muted"),
            html.Table(
                [
                    html.Thead(
                        html.Tr(
                            [
                                *(
                                    html.Th(name, scope="col", className="number" if right else None)
                                    for name, right in names
                                ),
                                html.Td(),
                            ]
                        )
                    ),
                    html.Tbody(rows),
                ]
            ),
            html.P(
                f"In all {number(total)}, of {plural(len(table) - 1, 'head')} and the stream.", className="small muted"
            ),
        ],
    )


def pairs(
    found: "QkPairs",
    place: HeadPlace,
    tokens: Sequence[str],
    names: Mapping[str, Sequence[str]],
    indexes: Mapping[int, str],
) -> html.Div:
    """Why a head looked from one token at another.

    Args:
        found: the pairs.
        place: the head, the query and the key.
        tokens: the prompt's.
        names: of "query" and "key", what the feature of each row is called; "" where nothing is known.
        indexes: by layer the index of its features.
    """
    attention = found.attention
    strip = token_strip(
        tokens[: place.query + 1],
        attention,
        scale=max(attention) or 1.0,
        kind="count",
        selected=place.key,
        label="Where the head looked. Arrow keys ask about another key.",
        pick=True,
        extra={"head": f"{place.layer}.{place.head}.{place.query}"},
    )
    return html.Div(
        className="circuit-why",
        children=[
            html.Header(
                className="page-head",
                children=[
                    html.H2(
                        [
                            f"Why layer {place.layer} head {place.head} looked from ",
                            html.Q(token(tokens[place.query])),
                            " at ",
                            html.Q(token(tokens[place.key])),
                        ]
                    ),
                    define("qk_pairs"),
                ],
            ),
            stats(
                [
                    stat("attention", percent(attention[place.key]), title=exact(attention[place.key])),
                    stat("score", number(found.score), title=exact(found.score), note="before the softmax"),
                    stat(
                        "above the other keys" if found.relative >= 0 else "below the other keys",
                        _signed(found.relative),
                        title=exact(found.relative),
                        note=f"mean of {plural(found.n_others, 'key')}" if found.n_others else "there is none",
                    ),
                ]
            ),
            html.Div(
                [
                    strip,
                    html.P(
                        "Coloured by how much the head attends to each token. Choose another to ask about it.",
                        className="small muted",
                    ),
                    legend(max(attention), "count", "attention"),
                ],
                className="circuit-keys",
            ),
            html.Div(
                className="columns circuit-why-columns",
                children=[_pairs_table(found, names, indexes), _kinds_table(found)],
            ),
        ],
    )


def _pairs_table(found: "QkPairs", names: Mapping[str, Sequence[str]], indexes: Mapping[int, str]) -> html.Section:
    table = found.table
    most = float(table["relative"].abs().max()) or 1.0
    rows = []
    for place, row in enumerate(table.to_dict("records")):
        ends = [
            _node(row[f"{side}_kind"], row[f"{side}_layer"], row[f"{side}_feature"], names[side][place], indexes)
            for side in ("query", "key")
        ]
        rows.append(html.Tr([*ends, _weight(row["relative"], most), _weight(row["weight"], None)]))
    head = [
        html.Th("At the query", scope="col"),
        html.Th("At the key", scope="col"),
        html.Th("Relative", scope="col", className="number", title="Set against its mean over the other keys"),
        html.Th("Weight", scope="col", className="number", title="Of the score itself"),
    ]
    return html.Section(
        className="circuit-list",
        children=[
            html.H3(f"The {plural(len(table), 'pair')} with the most relative weight"),
            html.Div(
                html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)]),
                className="scroll circuit-why-table",
                tabIndex=0,
                role="region",
                **{"aria-label": "Pairs that made the head look there"},
            ),
        ],
    )


def _kinds_table(found: "QkPairs") -> html.Section:
    kinds = found.kinds[found.kinds["relative"] != 0].head(MAX_KINDS)
    most = float(kinds["relative"].abs().max()) if len(kinds) else 1.0
    rows = [
        html.Tr([html.Td(f"{KINDS[row['query_kind']]} × {KINDS[row['key_kind']]}"), _weight(row["relative"], most)])
        for row in kinds.to_dict("records")
    ]
    names = html.Tr([html.Th("Query × key", scope="col"), html.Th("Relative", scope="col", className="number")])
    return html.Section(
        className="circuit-list",
        children=[
            html.H3("By kind"),
            html.Table([html.Thead(names), html.Tbody(rows)]),
            html.P(
                f"All pairs together {_signed(found.relative)}. Errors are what the transcoders miss; what earlier "
                "heads wrote, and biases, are not split further.",
                className="small muted",
            ),
        ],
    )


def _node(kind: str, layer: int, feature: int, name: str, indexes: Mapping[int, str]) -> html.Td:
    """What a pair is about on one side; a feature leads to its page, where the workspace has an index of it."""
    words = {
        "embedding": "embedding",
        "table": f"L{layer} table",
        "feature": f"L{layer} feature {feature}",
        "elsewhere": f"L{layer} features of other keys",
        "attention": f"L{layer} heads",
        "error": f"L{layer} error",
        "skip": f"L{layer} linear part",
        "bias": "biases",
    }[kind]
    linked = kind == "feature" and layer in indexes
    parts: list[Any] = [html.A(words, href=feature_link(indexes[layer], feature)) if linked else words]
    if name:
        parts.append(html.Div(html.Bdi(name), className="small muted circuit-label", title=name))
    return html.Td(parts)


def _weight(value: float, most: float | None) -> html.Td:
    """A weight with its sign; with a bar where there is a largest one to set it against."""
    bar = {"style": {"--v": f"{abs(value) / most:.3f}"}} if most else {}
    sign = f"circuit-weight {'negative' if value < 0 else 'positive'}" if most else ""
    return html.Td(_signed(value), className=f"number {sign}".strip(), title=exact(value), **bar)


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"
