"""Examples of a feature: the text with its firings, where it is from, how strong."""

from collections.abc import Sequence

from dash import html

from dashboards.components.strip import token_strip
from dashboards.format import exact, number
from dashboards.queries import ExampleGroup
from scope.features.examples import Example

__all__ = ["example_card", "example_groups"]

AFTER = 12
"""Tokens that an example shows after its own."""


def example_card(example: Example, index: str, scale: float) -> html.Article:
    """One example; `scale` is the feature's maximum, the same for all its examples."""
    origin = " · ".join(part for part in (example.title, example.source, example.language) if part)
    strip = token_strip(
        example.tokens,
        example.values,
        scale=scale,
        centre=example.centre,
        label=f"Example from {origin}, strength {number(example.value)}. Arrow keys step through the tokens.",
        extra={
            "r": example.start_row,
            "f": example.feature,
            "i": index,
            "p": example.document_position,
            "from": origin,
            "more": _cut(example),
        },
    )
    where = f"{origin} · position {example.document_position:,}"
    return html.Article(
        className="example",
        children=[
            strip,
            html.Div(number(example.value), className="value number", title=f"firing strength {exact(example.value)}"),
            html.Div(where, className="from", dir="auto"),
        ],
    )


def _cut(example: Example) -> tuple[bool, bool]:
    """Whether the window that the model saw goes on before and after what is shown. Position 0 is BOS; how long the
    window is the example does not say, so one that shows all the tokens it asked for is taken to go on."""
    return example.position - example.centre > 1, len(example.tokens) - 1 - example.centre >= AFTER


def example_groups(groups: Sequence[ExampleGroup], index: str, scale: float) -> html.Div:
    """Examples under their headings."""
    children: list[html.H3 | html.Article] = []
    for group in groups:
        if group.title:
            children.append(html.H3(group.title))
        children += [example_card(example, index, scale) for example in group.examples]
    return html.Div(children, className="examples")
