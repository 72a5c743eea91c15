"""Examples of a feature: the text with its firings, where it is from, how strong; a snippet or the whole document."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dash import html

from dashboards.components.controls import button, icon
from dashboards.components.strip import token_strip
from dashboards.format import exact, number
from dashboards.links import feature_link
from dashboards.queries import ExampleGroup
from scope.features.examples import Example

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["example_card", "example_groups", "example_skeleton", "one_document"]

CARRIED = "in context logits try whole"
"""What of the address stays when only the document changes."""

AFTER = 12
"""Tokens that an example shows after its own."""


Shown = Callable[[Example], Any]
"""What is shown of the image or the sound that an example is in."""


def example_card(
    example: Example, index: str | None, scale: float, whole: bool = False, shown: Shown | None = None
) -> html.Article:
    """One example; `scale` is the feature's maximum, the same for all its examples.

    Args:
        example: what to show.
        index: the index that it is from; None of an excerpt's, whose text no index holds: what else fires there, and
            the rest of the document, cannot be asked for.
        scale: the strength with the full colour.
        whole: show its document, which assets/45_document.js reads a part at a time once it comes into view.
        shown: makes the figure of an image or a sound that the example is in.
    """
    origin = " · ".join(part for part in (example.title, example.source, example.language) if part)
    text = _document(example, index, scale) if whole and index else _snippet(example, index, scale, origin)
    place = f"position {example.document_position:,}"
    figure = None if shown is None or example.medium is None else shown(example)
    return html.Article(
        className="example whole" if whole else "example",
        children=[
            text if figure is None else html.Div([figure, text], className="beside-medium"),
            html.Div(
                className="example-side",
                children=[
                    html.Div(
                        number(example.value), className="value number", title=f"firing strength {exact(example.value)}"
                    ),
                    html.Div(
                        _actions(example, index, scale, f"{origin} · {place}", whole), className="example-actions"
                    ),
                ],
            ),
            html.Div([*_isolated(example, index), place], className="from"),
        ],
    )


def _isolated(example: Example, index: str | None) -> list[Any]:
    """Where an example is from; a title that runs right to left keeps its direction to itself, and asks for examples
    of its document alone."""
    title = html.Bdi(example.title or f"document {example.document}")
    link = (
        title
        if index is None
        else html.A(
            title,
            href=feature_link(index, example.feature, document=example.document),
            title="Only examples from this document",
            **{"data-stay": "true", "data-carry": CARRIED},
        )
    )
    parts = [html.Bdi(part) for part in (example.source, example.language) if part]
    return [piece for part in (link, *parts) for piece in (part, " · ")]


def one_document(index: "FeatureIndex", feature: int, document: int) -> html.P:
    """Says that all examples are from one document, with the way back to those of all."""
    about = index.documents.loc[index.documents["document"] == document, "title"]
    title = str(about.iloc[0]) if len(about) and about.iloc[0] else f"document {document}"
    back = html.A(
        "Show all documents",
        href=feature_link(index.id, feature),
        **{"data-stay": "true", "data-carry": CARRIED},
    )
    return html.P(["Strongest first in ", html.Bdi(html.Strong(title)), " alone. ", back], className="small only-one")


def _snippet(example: Example, index: str | None, scale: float, origin: str) -> html.Div:
    row = {} if index is None else {"r": example.start_row, "i": index}
    return token_strip(
        example.tokens,
        example.values,
        scale=scale,
        centre=example.centre,
        label=f"Example from {origin}, strength {number(example.value)}. Arrow keys step through the tokens.",
        extra={
            **row,
            "f": example.feature,
            "p": example.document_position,
            "from": origin,
            "more": _cut(example),
        },
    )


def _document(example: Example, index: str, scale: float) -> html.Div:
    return html.Div(
        className="document",
        role="region",
        tabIndex=0,
        **{"data-document": _spec(example, index, scale), "aria-label": f"The document {example.title}"},
        children=example_skeleton(),
    )


def _spec(example: Example, index: str, scale: float) -> str:
    asked = {"index": index, "feature": example.feature, "document": example.document, "row": example.row, "m": scale}
    return json.dumps(asked)


def _actions(example: Example, index: str | None, scale: float, where: str, whole: bool) -> list[Any]:
    copy = button(
        icon("copy"),
        label="Copy the text",
        className="icon-only tiny",
        **{"data-copy-example": f"feature {example.feature}, strength {exact(example.value)}, {where}"},
    )
    if whole or index is None:
        return [copy]
    unfold = button(
        icon("document"),
        label="Show the whole document",
        className="icon-only tiny",
        **{"data-unfold": _spec(example, index, scale), "aria-expanded": "false"},
    )
    return [unfold, copy]


def example_skeleton() -> html.Div:
    """Lines where text will stand."""
    return html.Div([html.Div(className="skeleton", style={"height": 18}) for _ in range(4)], className="lines")


def _cut(example: Example) -> tuple[bool, bool]:
    """Whether the window that the model saw goes on before and after what is shown. Position 0 is BOS; how long the
    window is the example does not say, so one that shows all the tokens it asked for is taken to go on."""
    return example.position - example.centre > 1, len(example.tokens) - 1 - example.centre >= AFTER


def example_groups(
    groups: Sequence[ExampleGroup], index: str | None, scale: float, whole: bool = False, shown: Shown | None = None
) -> html.Div:
    """Examples under their headings, as `example_card` shows them; of whole documents, each document once under a
    heading."""
    children: list[html.H3 | html.Article] = []
    for group in groups:
        if group.title:
            children.append(html.H3(group.title))
        seen: set[int] = set()
        for example in group.examples:
            if whole and example.document in seen:
                continue
            seen.add(example.document)
            children.append(example_card(example, index, scale, whole, shown))
    return html.Div(children, className="examples")
