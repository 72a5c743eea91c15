"""One generation of a model that denoises: what stood at each position at each step, coloured by a feature.

All of it is in the address, and every move is a link: nothing here has a callback.
"""

from typing import TYPE_CHECKING

from dash import html

from dashboards.components import states
from dashboards.components.charts import HISTOGRAM_HEIGHT, chart, theme_of_request
from dashboards.components.controls import panel
from dashboards.components.generation_view import generation_view
from dashboards.context import Context
from dashboards.generations import generation
from dashboards.links import View, features_link, generation_link
from dashboards.marks import marks_of
from dashboards.pages import Page
from dashboards.queries import feature_id
from scope.errors import InvalidInputError
from scope.features.denoising import commit_table
from scope.figures import commit_bars

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["render"]


def render(context: Context, view: View) -> Page:
    """The page of one canvas of one generation."""
    entry = context.entry(view)
    index = context.index(entry.id)
    if not index.states:
        content = states.empty(
            "No text was denoised here",
            "The texts of this index were read as they are. A model that denoises is captured step by step, and its "
            "index shows what each feature does while a text comes about.",
            command="scope denoise --model MODEL --data prompts.jsonl --hook HOOK --out STORE.zarr",
        )
        back = html.P(html.A("To the features", href=features_link(entry.id)))
        return Page(html.Div([content, back]), "Generation", "features")
    feature = feature_id(index, view.get("feature")) if view.get("feature") else None
    shown = generation(
        index,
        _whole(view, "document"),
        _whole(view, "block") or 0,
        _whole(view, "from") or 0,
        feature,
    )
    content = html.Div([generation_view(entry.id, shown, marks_of(index).labels), _commits(index)])
    address = "" if view.index else generation_link(entry.id, **view.query)
    return Page(content, f"Generation {shown.document}", "features", address)


def _commits(index: "FeatureIndex") -> html.Section:
    """When the tokens of all generations of the index are committed."""
    table = commit_table(index)
    drawn = chart(
        commit_bars(table, theme=theme_of_request()),
        id="generation-commits",
        height=HISTOGRAM_HEIGHT,
        words=f"Share of the tokens of all generations that is committed at each of {len(table) - 1} steps",
    )
    return panel("All generations of this index", drawn, term="commit", unit="share of tokens by commit step")


def _whole(view: View, name: str) -> int | None:
    """A whole number of the address; None where it says nothing of it."""
    text = view.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidInputError(f"{name} is {text!r} in this address; expected a whole number.")
    return int(text)
