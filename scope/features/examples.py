"""Examples: one firing in its context, and how those worth showing are chosen among all firings of a feature."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Example", "Examples"]


@dataclass(frozen=True)
class Example:
    """One firing of a feature with the tokens around it. The context never leaves the window that the model saw."""

    feature: int
    row: int
    """Row id of the firing in the index (and in the store that it was built from)."""
    value: float
    """Firing strength: feature activation x norm of the decoder row, in the model's own units."""
    tokens: tuple[str, ...]
    """Display strings of the context, the firing's own token included; spaces and line breaks as they are."""
    values: tuple[float, ...]
    """This feature's firing strength on each of `tokens`; 0 where it does not fire."""
    centre: int
    """Which of `tokens` the firing is on."""
    start_row: int
    """Row id of `tokens[0]`; the others follow without gaps."""
    document: int
    title: str
    source: str
    language: str
    position: int
    """Place of the firing's token in its window, BOS being 0."""
    document_position: int
    """Place of the firing's token in its document, in tokens, without BOS."""
    rank: int
    """Place among all firings of the feature by strength, 0 the strongest."""
    quantile: float
    """Share of the feature's firings that are weaker or later in rank, 1 - rank / n_firings."""

    @property
    def token(self) -> str:
        """The token that the example is about."""
        return self.tokens[self.centre]

    def _repr_html_(self) -> str:
        raise NotImplementedError


class Examples(tuple[Example, ...]):
    """A tuple of examples of one feature that shows itself well in a notebook, all on one colour scale."""

    def __new__(cls, examples: Sequence[Example] = ()) -> "Examples":
        return super().__new__(cls, examples)

    def _repr_html_(self) -> str:
        raise NotImplementedError
