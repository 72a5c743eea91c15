"""What fires on many scattered rows, counted from the token lists.

The rows' firings lie one row after the other; a few thousand rows at a time are gathered and counted, so that memory
does not grow with them. Rows of one length, as a TopK dictionary makes them, are gathered as blocks.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from activations.source import bf16_to_float32

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["Sums", "count_features", "sum_strengths"]

PIECE = 2**15
"""Firings to gather at once: what fits into a core's own cache."""


class Sums(NamedTuple):
    """Over some rows, by feature, `(d_sae,)` each."""

    counts: np.ndarray
    """int64, rows on which it fires."""
    strengths: np.ndarray
    """float64, its summed strength."""
    largest: np.ndarray
    """float32, its largest strength; -inf where it does not fire."""


def count_features(reader: "IndexReader", rows: np.ndarray) -> np.ndarray:
    """On how many of the rows each feature fires, int64 `(d_sae,)`."""
    counts = np.zeros(reader.d_sae, np.int64)
    feature = reader.array("by_token/feature")
    for starts, lengths in _pieces(reader, rows):
        feature.check_spans(starts, starts + lengths)
        counts += np.bincount(_gather(feature.memory, starts, lengths), minlength=reader.d_sae)
    return counts


def sum_strengths(reader: "IndexReader", rows: np.ndarray) -> Sums:
    """As `count_features`, with the strengths."""
    counts = np.zeros(reader.d_sae, np.int64)
    strengths = np.zeros(reader.d_sae)
    largest = np.full(reader.d_sae, -np.inf, np.float32)
    feature, value = reader.array("by_token/feature"), reader.array("by_token/value")
    for starts, lengths in _pieces(reader, rows):
        for array in (feature, value):
            array.check_spans(starts, starts + lengths)
        features = _gather(feature.memory, starts, lengths)
        values = bf16_to_float32(_gather(value.memory, starts, lengths))
        counts += np.bincount(features, minlength=reader.d_sae)
        strengths += np.bincount(features, weights=values, minlength=reader.d_sae)
        np.maximum.at(largest, features, values)
    return Sums(counts, strengths, largest)


def _pieces(reader: "IndexReader", rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where the rows' firings start and how many there are, some rows at a time."""
    starts, stops = reader.firing_spans(rows)
    lengths = stops - starts
    # A counter has an entry for each feature: pieces are not to be smaller than that.
    size = max(PIECE, reader.d_sae)
    at_once = max(1, size * len(rows) // max(int(lengths.sum()), 1))
    for first in range(0, len(rows), at_once):
        yield starts[first : first + at_once], lengths[first : first + at_once]


def _gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The entries of some spans of a flat array, one span after the other."""
    length = int(lengths[0])
    if length and int(lengths.min()) == int(lengths.max()) == length:
        return np.lib.stride_tricks.sliding_window_view(flat, length)[starts].reshape(-1)
    ends = np.cumsum(lengths)
    places = np.arange(int(ends[-1])) + np.repeat(starts - (ends - lengths), lengths)
    gathered: np.ndarray = flat[places]
    return gathered
