"""What is selected on the prompt page, as its address says, and the numbers that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.prompts import Analysis
from dashboards.pushes import METHODS, Push, PushAsked
from dashboards.queries import feature_name, table_row

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["MEASURES", "Measure", "PromptView", "Selection", "scale_of", "whole_number", "whole_numbers"]

ROWS = 24
"""Features that the heatmap shows at first."""


@dataclass(frozen=True)
class Measure:
    """A number that a firing has."""

    column: str
    """Of `PromptView.firings`."""
    words: str
    term: str
    """In the glossary."""
    button: str


MEASURES = {
    "strength": Measure("value", "firing strength", "strength", "By strength"),
    "corrected": Measure("corrected", "density-corrected strength, bits", "corrected", "By corrected strength"),
    "effect": Measure("effect", "effect on the logit", "effect", "By effect"),
}


def whole_number(query: Mapping[str, Any], name: str) -> int | None:
    """A whole number of an address; None where there is none that can be read."""
    text = str(query.get(name, ""))
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def whole_numbers(query: Mapping[str, Any], name: str, most: int = 32) -> tuple[int, ...]:
    """Whole numbers of an address, separated by commas, each once."""
    parts = str(query.get(name, "")).split(",")[: 4 * most]
    numbers = [whole_number({"one": part}, "one") for part in parts]
    return tuple(dict.fromkeys(number for number in numbers if number is not None))[:most]


@dataclass(frozen=True)
class Selection:
    """What is selected; what cannot be read is left open."""

    token: int | None = None
    token2: int | None = None
    """A token of the second prompt."""
    feature: int | None = None
    target: int | None = None
    """Id of the chosen next token."""
    against: int | None = None
    """Another next token: then the difference of the two logits is attributed."""
    method: str = "direct"
    """One of `dashboards.pushes.METHODS`: how."""
    after: int | None = None
    """After which position; the last one where none is. The direct effect has one of its own for each token."""
    sort: str = ""
    """One of `MEASURES`; by default the effect where a next token is chosen, else the strength."""
    pins: tuple[int, ...] = ()
    """Pinned features."""
    at: tuple[int, ...] = ()
    """Positions of pinned tokens."""
    columns: str = ""
    """ "pinned": the heatmap shows the pinned tokens only."""
    start: int | None = None
    """First token that the heatmap shows."""
    rows: int = ROWS
    differs: str = ""
    """Of two prompts: "a", "b" or "changed" for a part of the features that differ."""

    @classmethod
    def of(cls, query: Mapping[str, Any] | None) -> "Selection":
        """The selection of an address."""
        query = query or {}
        sort, method = str(query.get("sort", "")), str(query.get("method", ""))
        return cls(
            token=whole_number(query, "token"),
            token2=whole_number(query, "token2"),
            feature=whole_number(query, "feature"),
            target=whole_number(query, "target"),
            against=whole_number(query, "against"),
            method=method if method in METHODS else "direct",
            after=whole_number(query, "after"),
            sort=sort if sort in MEASURES else "",
            pins=whole_numbers(query, "pins"),
            at=tuple(sorted(whole_numbers(query, "at"))),
            columns=str(query.get("columns", "")),
            start=whole_number(query, "from"),
            rows=min(max(whole_number(query, "rows") or ROWS, 1), 200),
            differs=str(query.get("differs", "")),
        )

    @property
    def push(self) -> PushAsked | None:
        """The next token that is attributed, and how."""
        if self.target is None:
            return None
        after = None if self.method == "direct" else self.after
        return PushAsked(self.target, self.against, self.method, after)


@dataclass(frozen=True, eq=False)
class PromptView:
    """Everything that the drawing needs."""

    index: "FeatureIndex"
    analysis: Analysis
    push: Push | None
    """Known once the target's effects have been computed."""
    selection: Selection

    @property
    def position(self) -> int:
        """The selected token; the last one where none is, or where the text has become shorter."""
        chosen = self.selection.token
        last = self.analysis.n_tokens - 1
        return last if chosen is None or chosen > last else chosen

    @property
    def feature(self) -> int | None:
        """The feature shown across the tokens, if it exists."""
        chosen = self.selection.feature
        return chosen if chosen is not None and chosen < self.index.d_sae else None

    @property
    def pins(self) -> tuple[int, ...]:
        """Pinned features that exist."""
        return tuple(feature for feature in self.selection.pins if feature < self.index.d_sae)

    @property
    def pinned_tokens(self) -> tuple[int, ...]:
        """Positions of pinned tokens that exist."""
        return tuple(place for place in self.selection.at if place < self.analysis.n_tokens)

    @property
    def sort(self) -> str:
        """The name of the measure that orders and colours."""
        if self.push is None:
            return self.selection.sort if self.selection.sort != "effect" else "strength"
        return self.selection.sort or "effect"

    @property
    def measure(self) -> Measure:
        """The measure that orders and colours."""
        found = MEASURES[self.sort or "strength"]
        if found.column != "effect" or self.push is None:
            return found
        return replace(found, words=self.push.how.words, term=self.push.how.term)

    @cached_property
    def firings(self) -> "pd.DataFrame":
        """Every firing: position, feature, value, corrected, and effect where a next token is chosen."""
        from scope.features.prompt_compare import corrected_strengths

        table = self.analysis.features.table[["position", "feature", "value"]]
        table = table.assign(corrected=corrected_strengths(table, self.index))
        if self.push is None:
            return table
        effects = self.push.table[["position", "feature", "effect"]]
        return table.merge(effects, on=["position", "feature"], how="left").fillna({"effect": 0.0})

    def across(self) -> np.ndarray:
        """One number per token: the measure of the selected feature, or of all together."""
        table = self.firings if self.feature is None else self.firings[self.firings["feature"] == self.feature]
        values = np.zeros(self.analysis.n_tokens)
        np.add.at(values, table["position"].to_numpy(dtype=int), table[self.measure.column].to_numpy(dtype=float))
        return values

    def name_of(self, feature: int, n: int = 5) -> str:
        """A feature's label or top tokens."""
        return feature_name(table_row(self.index, feature), n) or "no tokens"


def scale_of(values: np.ndarray, clip: bool = True) -> float:
    """The value with the full colour. A few tokens (sinks) can be a hundred times as strong as the rest; they are cut
    off where that happens."""
    size = np.abs(values[values != 0])
    if not len(size):
        return 0.0
    largest = float(size.max())
    return min(largest, 4 * float(np.quantile(size, 0.9))) if clip else largest
