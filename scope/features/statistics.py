"""Statistics of every feature, gathered while the merged lists stream by.

`ListStatistics.add` takes the pieces of `merge.merge_runs` in order and adds up, per feature: the sum and the sum of
squares of its strengths, its histogram, its quantiles, firings and summed strength by language and by source, the sum
of its positions. `TokenStatistics` does the same by token id and keeps the strongest tokens. All sums are float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from activations.source import bf16_to_float32
from scope.features.layout import N_BINS, N_TOKENS
from scope.features.merge import Piece, Run

__all__ = ["QUANTILES", "ListStatistics", "RowLookup", "TokenStatistics", "entropy_bits", "extremes", "wilson"]

QUANTILES = (0.5, 0.9, 0.99)
Z_95 = 1.959963984540054
TOKEN_BITS = 32


class RowLookup(NamedTuple):
    """What a row is, by row id."""

    token_id: np.ndarray
    position: np.ndarray
    sequence: np.ndarray
    language: np.ndarray
    """Language number by sequence."""
    source: np.ndarray
    """Source number by sequence."""
    n_languages: int
    n_sources: int


def extremes(runs: Sequence[Run], d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest strength of each feature, float32 `(d_sae,)`; 0 where it never fires."""
    from scope.features.firings import unpack

    low, high = np.full(d_sae, np.inf, np.float32), np.full(d_sae, -np.inf, np.float32)
    for run in runs:
        fires = run.indptr[1:] > run.indptr[:-1]
        first = unpack(run.packed[run.indptr[:-1][fires]], run.row_bits).values
        last = unpack(run.packed[run.indptr[1:][fires] - 1], run.row_bits).values
        high[fires] = np.maximum(high[fires], bf16_to_float32(first))
        low[fires] = np.minimum(low[fires], bf16_to_float32(last))
    return np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, 0)


class ListStatistics:
    """Sums over each feature's firings.

    Args:
        indptr: int64 `(d_sae + 1,)`, where each feature's list starts.
        low, high: `extremes`.
        lookup: what the rows are.
    """

    def __init__(self, indptr: np.ndarray, low: np.ndarray, high: np.ndarray, lookup: RowLookup) -> None:
        d_sae = len(indptr) - 1
        self._indptr = indptr
        self._lookup = lookup
        self._low = np.minimum(low, 0).astype(np.float64)
        self._width = np.maximum(high, 0) - self._low
        self.sum = np.zeros(d_sae)
        self.sum_of_squares = np.zeros(d_sae)
        self.position_sum = np.zeros(d_sae)
        self.quantiles = np.full((d_sae, len(QUANTILES)), np.nan)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self.by_language = np.zeros((d_sae, lookup.n_languages), np.int64)
        self.strength_by_language = np.zeros((d_sae, lookup.n_languages))
        self.by_source = np.zeros((d_sae, lookup.n_sources), np.int64)
        self.strength_by_source = np.zeros((d_sae, lookup.n_sources))

    def add(self, piece: Piece) -> None:
        """Take in the next piece of the merged lists."""
        values = bf16_to_float32(piece.values).astype(np.float64)
        rows = piece.rows.astype(np.int64)
        starts = np.flatnonzero(np.diff(piece.features, prepend=np.uint32(piece.features[0] + 1)))
        present = piece.features[starts].astype(np.int64)
        local = np.repeat(np.arange(len(present)), np.diff(starts, append=len(values)))
        self.sum[present] += np.add.reduceat(values, starts)
        self.sum_of_squares[present] += np.add.reduceat(values**2, starts)
        self.position_sum[present] += np.add.reduceat(self._lookup.position[rows].astype(np.float64), starts)
        # Multiplied first, so that a value on an edge falls into the upper bin whatever the width.
        bins = (values - self._low[present][local]) * N_BINS / self._width[present][local]
        self.histogram[present] += _counts(local, np.minimum(bins.astype(np.int64), N_BINS - 1), len(present), N_BINS)
        self._take_quantiles(piece.start, present, values)
        sequences = self._lookup.sequence[rows]
        for codes, counts, strengths in (
            (self._lookup.language, self.by_language, self.strength_by_language),
            (self._lookup.source, self.by_source, self.strength_by_source),
        ):
            code = codes[sequences]
            counts[present] += _counts(local, code, len(present), counts.shape[1])
            strengths[present] += _counts(local, code, len(present), counts.shape[1], weights=values)

    def _take_quantiles(self, start: int, present: np.ndarray, values: np.ndarray) -> None:
        n = self._indptr[present + 1] - self._indptr[present]
        for column, quantile in enumerate(QUANTILES):
            place = self._indptr[present] + np.rint((1 - quantile) * (n - 1)).astype(np.int64) - start
            here = (place >= 0) & (place < len(values))
            self.quantiles[present[here], column] = values[place[here]]


def _counts(
    local: np.ndarray, code: np.ndarray, n_features: int, n_codes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    flat = np.bincount(local * n_codes + code, weights=weights, minlength=n_features * n_codes)
    return flat.reshape(n_features, n_codes)


class _TokenGroups(NamedTuple):
    """Firings grouped by (feature, token id), ascending."""

    features: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    strengths: np.ndarray


class TokenStatistics:
    """Each feature's firings by token id: the strongest tokens, and how the firings spread over all.

    Tokens rank by the absolute value of their summed strength; `N_TOKENS` are kept.
    """

    def __init__(self, d_sae: int, token_id: np.ndarray) -> None:
        self._token_id = token_id
        self._pending: list[_TokenGroups] = []
        self.tokens = np.full((d_sae, N_TOKENS), -1, np.int32)
        self.counts = np.zeros((d_sae, N_TOKENS), np.int64)
        self.strengths = np.zeros((d_sae, N_TOKENS))
        self.top_share = np.full(d_sae, np.nan)
        self.entropy = np.full(d_sae, np.nan)

    def add(self, piece: Piece) -> None:
        """Take in the next piece of the merged lists."""
        groups = self._group(piece)
        if self._pending or not piece.complete:
            self._pending.append(groups)
            if not piece.complete:
                return
            groups, self._pending = _join(self._pending), []
        self._keep(groups)

    def _group(self, piece: Piece) -> _TokenGroups:
        # feature | token | bfloat16 bits: one sort groups the firings and carries their strengths along.
        packed = (piece.features - np.uint32(piece.first_feature)).astype(np.uint64) << np.uint64(TOKEN_BITS + 16)
        packed |= self._token_id[piece.rows.astype(np.int64)].astype(np.uint64) << np.uint64(16)
        packed |= piece.values
        packed.sort()
        values = bf16_to_float32((packed & np.uint64(0xFFFF)).astype(np.uint16)).astype(np.float64)
        group = packed >> np.uint64(16)
        starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
        group = group[starts]
        return _TokenGroups(
            (group >> np.uint64(TOKEN_BITS)).astype(np.int64) + piece.first_feature,
            (group & np.uint64(2**TOKEN_BITS - 1)).astype(np.int64),
            np.diff(starts, append=len(values)),
            np.add.reduceat(values, starts),
        )

    def _keep(self, groups: _TokenGroups) -> None:
        size = np.abs(groups.strengths)
        # Groups come by feature and token, so one stable sort by feature and size does; positive floats sort as bits.
        key = (groups.features - groups.features[0]).astype(np.uint64) << np.uint64(32)
        key |= ~size.astype(np.float32).view(np.uint32)
        order = np.argsort(key, kind="stable")
        features, size = groups.features[order], size[order]
        starts = np.flatnonzero(np.concatenate([[True], features[1:] != features[:-1]]))
        present = features[starts]
        lengths = np.diff(starts, append=len(features))
        self.top_share[present] = size[starts] / np.add.reduceat(size, starts)
        counts = groups.counts[order]
        share = counts / np.repeat(np.add.reduceat(counts, starts), lengths)
        self.entropy[present] = np.abs(np.add.reduceat(-share * np.log2(share), starts))
        rank = np.arange(len(features)) - np.repeat(starts, lengths)
        kept = rank < N_TOKENS
        place = (features[kept], rank[kept])
        self.tokens[place] = groups.tokens[order][kept]
        self.counts[place] = counts[kept]
        self.strengths[place] = groups.strengths[order][kept]


def _join(parts: list[_TokenGroups]) -> _TokenGroups:
    """The groups of one feature that came in several pieces."""
    tokens, place = np.unique(np.concatenate([part.tokens for part in parts]), return_inverse=True)
    counts = np.bincount(place, weights=np.concatenate([part.counts for part in parts])).astype(np.int64)
    strengths = np.bincount(place, weights=np.concatenate([part.strengths for part in parts]))
    return _TokenGroups(np.full(len(tokens), parts[0].features[0]), tokens, counts, strengths)


def wilson(k: np.ndarray, n: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The 95% score interval of a rate k / n (Wilson 1927); 0 to 1 where n is 0."""
    k, n = np.asarray(k, float), np.asarray(n, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = k / n
        centre = (rate + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * np.sqrt(rate * (1 - rate) / n + Z_95**2 / (4 * n**2))
    low = np.where(n > 0, np.clip(centre - half, 0, 1), 0.0)
    high = np.where(n > 0, np.clip(centre + half, 0, 1), 1.0)
    return np.where(k == 0, 0.0, low), np.where((k == n) & (n > 0), 1.0, high)


def entropy_bits(weights: np.ndarray) -> np.ndarray:
    """Entropy in bits of each row of `(n, m)` weights taken as a distribution; NaN for a row of zeros."""
    total = weights.sum(axis=1, keepdims=True)
    share = np.divide(weights, total, out=np.zeros_like(weights, dtype=float), where=total > 0)
    log = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total[:, 0] > 0, np.abs(-(share * log).sum(axis=1)), np.nan)
