"""Which features fire together.

For each feature: take the rows that it fires on (all of them up to `SAMPLE`; beyond that every m-th of its list, which
is sorted by strength, so the sample has strong and weak firings in their proportions), read what else fires there from
the token lists, count, and keep the `N_COFIRING` features with the largest Jaccard similarity

    J(a, b) = n_ab / (n_a + n_b - n_ab),

where n_ab is scaled up from the sample.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scope.features.layout import N_COFIRING

__all__ = ["SAMPLE", "Cofiring", "cofiring_features", "count_features"]

SAMPLE = 2**14
"""Rows looked at per feature, at most; a conditional rate is then known to 0.8 percentage points or better (95%)."""
READ_AHEAD = 2**20


class Cofiring(NamedTuple):
    """The strongest co-firing features of each feature."""

    features: np.ndarray
    """int32 `(d_sae, N_COFIRING)`, by Jaccard, -1 where there are no more."""
    both: np.ndarray
    """float64 `(d_sae, N_COFIRING)`: rows on which both fire, an estimate where the feature's rows were sampled."""


def count_features(rows: np.ndarray, indptr: np.ndarray, feature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which features fire on some rows, and on how many of them each.

    Args:
        rows: row ids, int64.
        indptr, feature: the token lists; only the parts that are needed are touched.
    Returns:
        Feature ids, ascending, and counts.
    """
    starts = indptr[rows]
    lengths = indptr[rows + 1] - starts
    if len(rows) and lengths.min() == lengths.max():
        places = (starts[:, None] + np.arange(lengths[0])).reshape(-1)
    else:
        ends = np.cumsum(lengths)
        places = np.arange(int(lengths.sum())) + np.repeat(starts - (ends - lengths), lengths)
    found = feature[places]
    if 4 * len(found) < int(found.max(initial=0)):
        return np.unique(found, return_counts=True)
    counts = np.bincount(found)
    others = np.flatnonzero(counts)
    return others, counts[others]


class _Ahead:
    """Reads a list of rows from one end to the other, `READ_AHEAD` at a time."""

    def __init__(self, rows_of: Callable[[int, int], np.ndarray], end: int) -> None:
        self._rows_of, self._end = rows_of, end
        self._start, self._rows = 0, np.empty(0, np.int64)

    def sample(self, start: int, stop: int, step: int) -> np.ndarray:
        """Every `step`-th row from `start` to `stop`, int64."""
        parts = []
        while start < stop:
            if start >= self._start + len(self._rows):
                self._start, self._rows = start, self._rows_of(start, min(start + READ_AHEAD, self._end))
            here = min(stop, self._start + len(self._rows))
            part = self._rows[start - self._start : here - self._start : step]
            parts.append(part.astype(np.int64))
            start += len(part) * step
        return np.concatenate(parts)


def cofiring_features(
    list_indptr: np.ndarray,
    rows_of: Callable[[int, int], np.ndarray],
    indptr: np.ndarray,
    feature: np.ndarray,
    progress: Callable[[int], None] | None = None,
) -> Cofiring:
    """The co-firing features of every feature.

    Args:
        list_indptr: int64 `(d_sae + 1,)`, where each feature's list starts.
        rows_of: row ids of the feature lists between two places.
        indptr, feature: the token lists.
        progress: called with the number of features done.
    """
    d_sae = len(list_indptr) - 1
    n = np.diff(list_indptr)
    features = np.full((d_sae, N_COFIRING), -1, np.int32)
    both = np.zeros((d_sae, N_COFIRING))
    lists = _Ahead(rows_of, int(list_indptr[-1]))
    for one in np.flatnonzero(n):
        step = -(-int(n[one]) // SAMPLE)
        rows = lists.sample(int(list_indptr[one]), int(list_indptr[one + 1]), step)
        rows.sort()
        others, counts = count_features(rows, indptr, feature)
        kept = others != one
        others, counts = others[kept].astype(np.int64), counts[kept] * (n[one] / len(rows))
        jaccard = counts / (n[one] + n[others] - counts)
        if len(others) > N_COFIRING:
            strong = jaccard >= np.partition(jaccard, -N_COFIRING)[-N_COFIRING]
            others, counts, jaccard = others[strong], counts[strong], jaccard[strong]
        order = np.lexsort((others, -jaccard))[:N_COFIRING]
        features[one, : len(order)] = others[order]
        both[one, : len(order)] = counts[order]
        if progress is not None and one % 256 == 255:
            progress(int(one) + 1)
    return Cofiring(features, both)
