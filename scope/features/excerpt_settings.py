"""How much of an index an excerpt holds (`scope.features.excerpt`)."""

from dataclasses import dataclass

from scope.errors import InvalidInputError
from scope.features.layout import N_TOKENS

__all__ = ["ExcerptSettings"]

MOST = 127
"""Examples, or tokens on one side of one: numbers of them are kept in a byte."""


@dataclass(frozen=True)
class ExcerptSettings:
    """How much of an index an excerpt holds; the defaults take about 330 bytes a feature."""

    top: int = 10
    """Strongest examples of a feature, no two of which end in the same eight tokens."""
    per_band: int = 3
    """Examples of each quantile band of its strengths, drawn at random."""
    before: int = 24
    """Tokens that an example shows before its own."""
    after: int = 12
    """Tokens that an example shows after its own."""
    tokens: int = 8
    """Tokens that a feature fires on, by summed strength."""
    seed: int = 0
    """Of the examples of bands."""

    def __post_init__(self) -> None:
        small = {"top": self.top, "per_band": self.per_band, "before": self.before, "after": self.after}
        for name, value in small.items():
            if not 0 <= value <= MOST:
                raise InvalidInputError(f"{name} is {value}; expected 0 to {MOST}.")
        if not 1 <= self.tokens <= N_TOKENS:
            raise InvalidInputError(f"tokens is {self.tokens}; an index keeps 1 to {N_TOKENS}.")
