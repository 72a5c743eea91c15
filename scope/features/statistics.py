"""Statistics of every feature, gathered while the merged lists stream by.

`ListStatistics.add` takes the pieces of `merge.merge_runs` in order and adds up, per feature: the sum and the sum of
squares of its strengths, its histogram, its quantiles, firings and summed strength by language, by source and, of
chats, by role and by kind, the sum of its positions and how they spread. `TokenStatistics` does the same by token id
and keeps the strongest tokens, `SpreadStatistics` counts windows and documents. All sums are float64.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from activations.source import bf16_to_float32
from scope.features.layout import N_BINS, N_TOKENS
from scope.features.merge import Piece, Run

__all__ = [
    "QUANTILES",
    "Codes",
    "ListStatistics",
    "RowLookup",
    "SpreadStatistics",
    "TokenStatistics",
    "divergence_bits",
    "entropy_bits",
    "extremes",
    "position_bins",
    "wilson",
]

QUANTILES = (0.5, 0.9, 0.99)
Z_95 = 1.959963984540054
TOKEN_BITS = 32
N_POSITION_BINS = 34
OFTEN = 5
"""Firings of a feature on a token from which on their mean says something."""


class RowLookup(NamedTuple):
    """What a row is, by row id."""

    token_id: np.ndarray
    position: np.ndarray
    sequence: np.ndarray
    language: np.ndarray
    """Language number by sequence."""
    source: np.ndarray
    """Source number by sequence."""
    document: np.ndarray
    """Document by sequence, ascending."""
    n_languages: int
    n_sources: int
    spoken: "Mapping[str, Codes]"
    """Of chats by "role" and "kind", of media by "modality": which of the groups that have rows each row is of."""


class Codes(NamedTuple):
    """Groups of rows, by row."""

    code: np.ndarray
    """By row id, a code as in `activations.chats` and `activations.media`."""
    number_of: np.ndarray
    """By code, its place among those that have rows."""
    n: int
    """How many have."""


def extremes(runs: Sequence[Run], d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest strength of each feature, float32 `(d_sae,)`; 0 where it never fires."""
    low, high = np.full(d_sae, np.inf, np.float32), np.full(d_sae, -np.inf, np.float32)
    for run in runs:
        fires = run.indptr[1:] > run.indptr[:-1]
        smallest, largest = run.extremes()
        high[fires] = np.maximum(high[fires], largest)
        low[fires] = np.minimum(low[fires], smallest)
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
        self.size_sum = np.zeros(d_sae)
        """Of |strength|."""
        self.position_sum = np.zeros(d_sae)
        self.by_position = np.zeros((d_sae, N_POSITION_BINS), np.int64)
        """Firings by `position_bins`."""
        self.quantiles = np.full((d_sae, len(QUANTILES)), np.nan)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self.by_language = np.zeros((d_sae, lookup.n_languages), np.int64)
        self.strength_by_language = np.zeros((d_sae, lookup.n_languages))
        self.by_source = np.zeros((d_sae, lookup.n_sources), np.int64)
        self.strength_by_source = np.zeros((d_sae, lookup.n_sources))
        self.by_spoken = {name: np.zeros((d_sae, codes.n), np.int64) for name, codes in lookup.spoken.items()}
        """Firings by role, kind and modality."""
        self.strength_by_spoken = {name: np.zeros((d_sae, codes.n)) for name, codes in lookup.spoken.items()}

    def add(self, piece: Piece) -> None:
        """Take in the next piece of the merged lists."""
        values = bf16_to_float32(piece.values).astype(np.float64)
        rows = piece.rows.astype(np.int64)
        starts = np.flatnonzero(np.diff(piece.features, prepend=np.uint32(piece.features[0] + 1)))
        present = piece.features[starts].astype(np.int64)
        local = np.repeat(np.arange(len(present)), np.diff(starts, append=len(values)))
        self.sum[present] += np.add.reduceat(values, starts)
        self.sum_of_squares[present] += np.add.reduceat(values**2, starts)
        self.size_sum[present] += np.add.reduceat(np.abs(values), starts)
        position = self._lookup.position[rows]
        self.position_sum[present] += np.add.reduceat(position.astype(np.float64), starts)
        self.by_position[present] += _counts(local, position_bins(position), len(present), N_POSITION_BINS)
        # Multiplied first, so that a value on an edge falls into the upper bin whatever the width.
        bins = (values - self._low[present][local]) * N_BINS / self._width[present][local]
        self.histogram[present] += _counts(local, np.minimum(bins.astype(np.int64), N_BINS - 1), len(present), N_BINS)
        self._take_quantiles(piece.start, present, values)
        sequences = self._lookup.sequence[rows]
        groups = [
            (self._lookup.language[sequences], self.by_language, self.strength_by_language),
            (self._lookup.source[sequences], self.by_source, self.strength_by_source),
        ]
        for name, codes in self._lookup.spoken.items():
            own = codes.number_of[codes.code[rows]]
            groups.append((own, self.by_spoken[name], self.strength_by_spoken[name]))
        for code, counts, strengths in groups:
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

    Tokens rank by the absolute value of their summed strength; `N_TOKENS` are kept. As many are kept by the absolute
    value of their mean strength, among tokens that the feature fires on `OFTEN` times or more (among all, where there
    is none).

    Args:
        d_sae: number of features.
        token_id: by row.
        rows_by_token: indexed rows of each token id.
    """

    def __init__(self, d_sae: int, token_id: np.ndarray, rows_by_token: np.ndarray) -> None:
        self._token_id = token_id
        self._token_share = rows_by_token / max(int(rows_by_token.sum()), 1)
        self._pending: list[_TokenGroups] = []
        self.tokens = np.full((d_sae, N_TOKENS), -1, np.int32)
        self.counts = np.zeros((d_sae, N_TOKENS), np.int64)
        self.strengths = np.zeros((d_sae, N_TOKENS))
        self.mean_tokens = np.full((d_sae, N_TOKENS), -1, np.int32)
        self.means = np.zeros((d_sae, N_TOKENS))
        self.top_share = np.full(d_sae, np.nan)
        self.entropy = np.full(d_sae, np.nan)
        self.divergence = np.full(d_sae, np.nan)
        """As `divergence_bits`, of the firings' tokens from the indexed rows'."""

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
        tokens = groups.tokens[order]
        plain = np.add.reduceat(share * np.log2(share / self._token_share[tokens]), starts)
        self.divergence[present] = _corrected(plain, lengths, np.add.reduceat(counts, starts))
        rank = np.arange(len(features)) - np.repeat(starts, lengths)
        kept = rank < N_TOKENS
        place = (features[kept], rank[kept])
        self.tokens[place] = tokens[kept]
        self.counts[place] = counts[kept]
        self.strengths[place] = groups.strengths[order][kept]
        self._keep_by_mean(features, tokens, counts, groups.strengths[order] / counts, starts)

    def _keep_by_mean(
        self, features: np.ndarray, tokens: np.ndarray, counts: np.ndarray, means: np.ndarray, starts: np.ndarray
    ) -> None:
        often = counts >= OFTEN
        none = ~np.logical_or.reduceat(often, starts)
        often |= np.repeat(none, np.diff(starts, append=len(features)))
        features, tokens, means = features[often], tokens[often], means[often]
        order = np.lexsort((tokens, -np.abs(means), features))
        features = features[order]
        starts = np.flatnonzero(np.concatenate([[True], features[1:] != features[:-1]]))
        rank = np.arange(len(features)) - np.repeat(starts, np.diff(starts, append=len(features)))
        kept = rank < N_TOKENS
        place = (features[kept], rank[kept])
        self.mean_tokens[place] = tokens[order][kept]
        self.means[place] = means[order][kept]


def _join(parts: list[_TokenGroups]) -> _TokenGroups:
    """The groups of one feature that came in several pieces."""
    tokens, place = np.unique(np.concatenate([part.tokens for part in parts]), return_inverse=True)
    counts = np.bincount(place, weights=np.concatenate([part.counts for part in parts])).astype(np.int64)
    strengths = np.bincount(place, weights=np.concatenate([part.strengths for part in parts]))
    return _TokenGroups(np.full(len(tokens), parts[0].features[0]), tokens, counts, strengths)


class SpreadStatistics:
    """In how many windows and documents of each language a feature fires: how far its firings are independent.

    Args:
        d_sae: number of features.
        lookup: what the rows are.
    """

    def __init__(self, d_sae: int, lookup: RowLookup) -> None:
        self._lookup = lookup
        self._pending: list[np.ndarray] = []
        self.windows = np.zeros((d_sae, lookup.n_languages), np.int64)
        self.documents = np.zeros((d_sae, lookup.n_languages), np.int64)

    def add(self, piece: Piece) -> None:
        """Take in the next piece of the merged lists."""
        packed = (piece.features - np.uint32(piece.first_feature)).astype(np.uint64) << np.uint64(40)
        packed |= self._lookup.sequence[piece.rows.astype(np.int64)].astype(np.uint64)
        packed.sort()
        pairs = packed[np.concatenate([[True], packed[1:] != packed[:-1]])]
        if self._pending or not piece.complete:
            # One feature in several pieces: the same window may be in each.
            self._pending = [np.union1d(pairs, self._pending[0])] if self._pending else [pairs]
            if not piece.complete:
                return
            pairs, self._pending = self._pending[0], []
        feature = (pairs >> np.uint64(40)).astype(np.int64)
        sequence = (pairs & np.uint64(2**40 - 1)).astype(np.int64)
        document, language = self._lookup.document[sequence], self._lookup.language[sequence]
        first = np.concatenate([[True], (feature[1:] != feature[:-1]) | (document[1:] != document[:-1])])
        n, n_languages = int(feature[-1]) + 1, self._lookup.n_languages
        here = slice(piece.first_feature, piece.first_feature + n)
        self.windows[here] += _counts(feature, language, n, n_languages)
        self.documents[here] += _counts(feature[first], language[first], n, n_languages)


def position_bins(position: np.ndarray) -> np.ndarray:
    """The bin of each place in a window: 0, 1, 2, 3, then 4-7, 8-15, 16-31, and so on."""
    return np.where(position < 4, position, np.frexp(position.astype(np.float64))[1] + 1).astype(np.int64)


def divergence_bits(counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How far each row of counts `(n, m)` departs from what `rows` `(m,)` are like, in bits; NaN for a row of zeros.

    The Kullback-Leibler divergence of the counts' shares from the rows', sum of p log2(p / q), less what chance alone
    adds to it, (m - 1) / (2 ln 2 n) for n firings over m bins that have rows (Miller 1955, "Note on the bias of
    information estimates"), and at least 0.
    """
    total = counts.sum(axis=1)
    share = counts / np.maximum(total, 1)[:, None]
    there = counts > 0
    expected = np.where(rows > 0, rows / max(int(rows.sum()), 1), 1.0)
    log = np.log2(share / expected, out=np.zeros_like(share), where=there)
    return _corrected((share * log).sum(axis=1), int(np.count_nonzero(rows)), total)


def _corrected(plain: np.ndarray, bins: np.ndarray | int, n: np.ndarray) -> np.ndarray:
    """A divergence in bits without what chance adds to it; NaN where nothing was counted."""
    corrected = np.maximum(plain - (bins - 1) / (2 * np.log(2) * np.maximum(n, 1)), 0)
    return np.where(n > 0, corrected, np.nan)


def wilson(k: np.ndarray, n: np.ndarray | float, z: float = Z_95) -> tuple[np.ndarray, np.ndarray]:
    """The score interval of a rate k / n (Wilson 1927), 95% wide where z is not given; 0 to 1 where n is 0. Both may be
    fractions: counts of what is independent (`scope.features.languages`)."""
    k, n = np.asarray(k, float), np.asarray(n, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = k / n
        centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    low = np.where(n > 0, np.clip(centre - half, 0, 1), 0.0)
    high = np.where(n > 0, np.clip(centre + half, 0, 1), 1.0)
    return np.where(k == 0, 0.0, low), np.where((k == n) & (n > 0), 1.0, high)


def entropy_bits(weights: np.ndarray) -> np.ndarray:
    """Entropy in bits of each row of `(n, m)` weights taken as a distribution; NaN for a row of zeros."""
    total = weights.sum(axis=1, keepdims=True)
    share = np.divide(weights, total, out=np.zeros_like(weights, dtype=float), where=total > 0)
    log = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total[:, 0] > 0, np.abs(-(share * log).sum(axis=1)), np.nan)
