"""What fires on many scattered rows, counted from the token lists.

The rows' firings lie one row after the other; a few thousand rows at a time are gathered and counted, so that memory
does not grow with them. Rows of about one length, as a TopK dictionary makes them, are gathered as blocks.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from activations.source import bf16_to_float32
from scope.features.beside import both

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["Sums", "count_features", "fires_on", "sum_strengths"]

PIECE = 2**15
"""Firings to gather at once: what fits into a core's own cache."""
MANY_ROWS = 2**15
"""Rows from which on two threads count."""
SURPLUS = 1.25
"""Blocks of the longest row's length may hold so many times what the rows hold."""


class Sums(NamedTuple):
    """Over some rows, by feature, `(d_sae,)` each."""

    counts: np.ndarray
    """int64, rows on which it fires."""
    strengths: np.ndarray
    """float64, its summed strength."""
    largest: np.ndarray
    """float32, its largest strength; -inf where it does not fire."""


def count_features(reader: "IndexReader", rows: np.ndarray) -> np.ndarray:
    """On how many of the rows, ascending, each feature fires, int64 `(d_sae,)`."""
    if len(rows) < MANY_ROWS:
        return _count_features(reader, rows)
    half = len(rows) // 2
    parts = both(lambda: _count_features(reader, rows[:half]), lambda: _count_features(reader, rows[half:]))
    return parts[0] + parts[1]


def _count_features(reader: "IndexReader", rows: np.ndarray) -> np.ndarray:
    counts = np.zeros(reader.d_sae, np.int64)
    feature = reader.array("by_token/feature")
    for starts, lengths in _pieces(reader, rows):
        feature.check_spans(starts, starts + lengths)
        _count(counts, feature.memory, starts, lengths)
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


def fires_on(reader: "IndexReader", feature: int, rows: np.ndarray) -> np.ndarray:
    """Whether a feature fires on each of the rows, bool `(n,)`."""
    array = reader.array("by_token/feature")
    parts = [np.empty(0, bool)]
    for starts, lengths in _pieces(reader, rows):
        array.check_spans(starts, starts + lengths)
        blocks = _blocks(array.memory, starts, lengths)
        fires = np.zeros(len(starts), bool)
        if blocks is None:
            found = np.flatnonzero(_gather(array.memory, starts, lengths) == feature)
            fires[np.searchsorted(np.cumsum(lengths), found, side="right")] = True
        else:
            of, place = np.nonzero(blocks == feature)
            fires[of[place < lengths[of]]] = True
        parts.append(fires)
    return np.concatenate(parts)


def _pieces(reader: "IndexReader", rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where the rows' firings start and how many there are, some rows at a time."""
    starts, stops = reader.firing_spans(rows)
    lengths = stops - starts
    # A counter has an entry for each feature: pieces are not to be smaller than that.
    size = max(PIECE, reader.d_sae)
    at_once = max(1, size * len(rows) // max(int(lengths.sum()), 1))
    for first in range(0, len(rows), at_once):
        yield starts[first : first + at_once], lengths[first : first + at_once]


def _count(counts: np.ndarray, flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
    """Add how often each feature stands in some spans."""
    blocks = _blocks(flat, starts, lengths)
    if blocks is None:
        counts += np.bincount(_gather(flat, starts, lengths), minlength=len(counts))
        return
    counts += np.bincount(blocks.reshape(-1), minlength=len(counts))
    # What shorter rows have too much of is taken off again.
    longest = blocks.shape[1]
    short = np.flatnonzero(lengths < longest)
    np.subtract.at(counts, _gather(flat, starts[short] + lengths[short], longest - lengths[short]), 1)


def _blocks(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """The entries of some spans, `(n, longest)`, with what follows a shorter one; None where that would be much."""
    longest = int(lengths.max())
    fits = int(starts[-1]) + longest <= len(flat)  # the last one starts last
    if not longest or not fits or longest * len(lengths) > SURPLUS * int(lengths.sum()):
        return None
    blocks: np.ndarray = np.lib.stride_tricks.sliding_window_view(flat, longest)[starts]
    return blocks


def _gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The entries of some spans of a flat array, one span after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    gathered: np.ndarray = flat[np.arange(total) + np.repeat(starts - (ends - lengths), lengths)]
    return gathered
