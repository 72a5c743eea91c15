"""Examples: one firing in its context, and how those worth showing are chosen among all firings of a feature.

A context never leaves the window that the model saw, and BOS is left out of it. Where the store holds only some of a
window's tokens it shows these, one after the other. The strongest firings of a feature are
often the same phrase again and again: `choose` passes over a firing whose last `DISTINCT_TOKENS` tokens, its own the
last of them, equal those of a stronger one, and takes only a few from one window.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from activations.source import RowFlag
from scope.errors import InvalidInputError
from scope.features.media import shown_tokens

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = [
    "BANDS",
    "CHARACTER_TOKENS",
    "Example",
    "Examples",
    "Firings",
    "Ranked",
    "band_ranks",
    "choose",
    "ranked_firings",
    "sample_band",
    "show",
]

BANDS = ((0.9, 1.0), (0.75, 0.9), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
"""Quantile bands of a feature's firings, the strongest first."""

DISTINCT_TOKENS = 8
MAX_CONSIDERED = 2**16
"""Firings that are looked at for examples worth showing, at most."""
CHARACTER_TOKENS = 3
"""Tokens that the rest of a split character can take, on either side."""


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
    """Share of the feature's firings that are not stronger, 1 - rank / n_firings."""
    medium: int | None = None
    """Which of the document's images and sounds the firing's token is a soft token of."""

    @property
    def token(self) -> str:
        """The token that the example is about."""
        return self.tokens[self.centre]

    def _repr_html_(self) -> str:
        from scope.features.html import examples_html

        return examples_html([self], max(self.values))


class Examples(tuple[Example, ...]):
    """A tuple of examples of one feature that shows itself well in a notebook, all on one colour scale."""

    __slots__ = ()

    def __new__(cls, examples: Iterable[Example] = ()) -> "Examples":
        return super().__new__(cls, examples)

    def _repr_html_(self) -> str:
        from scope.features.html import examples_html

        return examples_html(self, max((max(example.values) for example in self), default=0.0))


class Ranked(NamedTuple):
    """A firing and its place among all firings of its feature."""

    rank: int
    row: int
    value: float


class Firings(NamedTuple):
    """Some of a feature's firings, the strongest first, `(n,)` each."""

    ranks: np.ndarray
    """Places among all firings of the feature."""
    rows: np.ndarray
    values: np.ndarray


def ranked_firings(
    reader: "IndexReader", feature: int, kept: Callable[[np.ndarray], np.ndarray] | None = None
) -> Iterator[Firings]:
    """A feature's firings, the strongest first, in growing pieces.

    Args:
        kept: says of row ids which to take firings from, bool `(n,)`; None for all.
    """
    start, size, n = 0, 256, reader.n_firings_of(feature)
    while start < n:
        rows, values = reader.firing_arrays(feature, start, min(start + size, n))
        ranks = np.arange(start, start + len(rows))
        if kept is not None:
            here = kept(rows)
            ranks, rows, values = ranks[here], rows[here], values[here]
        if len(rows):
            yield Firings(ranks, rows, values)
        start, size = start + size, min(4 * size, 2**16)


def choose(reader: "IndexReader", pieces: Iterable[Firings], n: int, distinct: bool, per_sequence: int) -> list[Ranked]:
    """The first `n` firings worth showing."""
    chosen: list[Ranked] = []
    contexts: set[int] = set()
    taken: Counter[int] = Counter()
    considered = 0
    for piece in pieces:
        sequences = reader.row_column("sequence").take(piece.rows)
        own = _contexts(reader, piece.rows, sequences).tolist() if distinct else [0] * len(piece.rows)
        for place, (sequence, context) in enumerate(zip(sequences.tolist(), own, strict=True)):
            if len(chosen) >= n or considered >= MAX_CONSIDERED:
                return chosen
            considered += 1
            if taken[sequence] >= per_sequence or (distinct and context in contexts):
                continue
            contexts.add(context)
            taken[sequence] += 1
            chosen.append(Ranked(int(piece.ranks[place]), int(piece.rows[place]), float(piece.values[place])))
    return chosen


def _contexts(reader: "IndexReader", rows: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """A hash of each row's last `DISTINCT_TOKENS` tokens, its own the last, within its window; uint64 `(n,)`."""
    windows = reader.windows
    first = windows.start_row[windows.place[sequences]]
    first = first + (reader.row_column("flags").take(first) & int(RowFlag.BOS) > 0)
    places = rows[:, None] - np.arange(DISTINCT_TOKENS)
    inside = places >= first[:, None]
    column = reader.row_column("token_id")
    tokens = column.take(np.where(inside, places, rows[:, None]).reshape(-1)).reshape(places.shape)
    hashes: np.ndarray = (np.where(inside, tokens + 1, 0).astype(np.uint64) * _FACTORS).sum(axis=1, dtype=np.uint64)
    return hashes


_FACTORS = np.random.default_rng(0).integers(1, 2**63, DISTINCT_TOKENS, dtype=np.uint64) * 2 + 1
"""Odd 64-bit numbers, one for each place of a context."""


def band_ranks(feature: int, total: int, low: float, high: float, n: int, seed: int) -> list[int]:
    """Places of `n` of a feature's `total` firings, drawn at random, without repeats, between two quantiles of its
    strength, the strongest first. The same arguments give the same places."""
    if not 0 <= low < high <= 1:
        raise InvalidInputError(f"The band goes from quantile {low} to {high}; expected 0 <= low < high <= 1.")
    first, last = round((1 - high) * total), round((1 - low) * total)
    return sorted(Random(f"{seed} {feature} {first} {last}").sample(range(first, last), min(n, last - first)))


def sample_band(reader: "IndexReader", feature: int, low: float, high: float, n: int, seed: int) -> list[Ranked]:
    """The firings of `band_ranks`."""
    ranks = band_ranks(feature, reader.n_firings_of(feature), low, high, n, seed)
    rows, values = reader.firings_at(feature, np.array(ranks, np.int64))
    return [Ranked(*firing) for firing in zip(ranks, rows.tolist(), values.tolist(), strict=True)]


def show(reader: "IndexReader", feature: int, firings: Sequence[Ranked], window: tuple[int, int]) -> Examples:
    """Firings with their contexts."""
    before, after = window
    if before < 0 or after < 0:
        raise InvalidInputError(f"The window is {window}; expected numbers of tokens before and after, 0 or more.")
    return Examples(_example(reader, feature, firing, before, after) for firing in firings)


def _example(reader: "IndexReader", feature: int, firing: Ranked, before: int, after: int) -> Example:
    row = firing.row
    window = reader.row_window(row)
    start, stop = max(window.start, row - before), min(window.stop, row + after + 1)
    # Read a little more than is shown, so that a character cut at the edge still shows.
    outer = max(window.start, start - CHARACTER_TOKENS), min(window.stop, stop + CHARACTER_TOKENS)
    tokens = shown_tokens(reader, np.arange(*outer))[start - outer[0] : stop - outer[0]]
    document = reader.document_info(window.document)
    position = int(reader.row_column("position").slice(row, row + 1)[0])
    return Example(
        feature=feature,
        row=row,
        value=firing.value,
        tokens=tuple(tokens),
        values=tuple(reader.values_on(feature, start, stop).tolist()),
        centre=row - start,
        start_row=start,
        document=window.document,
        title=document.title,
        source=document.source,
        language=document.language,
        position=position,
        document_position=window.document_offset + position - reader.has_bos,
        rank=firing.rank,
        quantile=1 - firing.rank / reader.n_firings_of(feature),
        medium=_medium(reader, row),
    )


def _medium(reader: "IndexReader", row: int) -> int | None:
    if "modality" not in reader.spoken or not reader.row_column("modality").slice(row, row + 1)[0]:
        return None
    return int(reader.row_column("medium").slice(row, row + 1)[0])
