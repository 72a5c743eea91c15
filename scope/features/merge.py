"""The second phase of a build: the segments' sorted runs become one list per feature.

1. Count each feature's firings in every run, which is sorted, by bisection; that gives `indptr`.
2. Walk through the features in blocks of at most `budget` firings: gather the block's part of every run, repack it
   with row ids of the whole index, sort it as integers.
3. A single feature with more firings than that is cut by strength: bfloat16 has 65,536 values, their counts say where
   to cut, and equal values need no sorting, since runs are in row order.

An index that grows gives its old lists as one more run (`ListRun`): they are sorted the same way.

Memory is 24 bytes per firing of the budget, and 8 bytes per feature of each run for where its features start: with the
default segments, of 2^23 firings, a four-hundredth of what the run has on the disk.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from activations.source import bf16_to_float32
from scope.features.firings import KEY_BITS, bits_for, order_key, unpack
from scope.features.lists import ListReader
from scope.features.segments import Segment

__all__ = ["ListRun", "Piece", "Run", "SegmentRun", "merge_runs", "open_runs"]


class Run(Protocol):
    """Firings by feature, within a feature the strongest first, equal ones by row."""

    @property
    def indptr(self) -> np.ndarray:
        """int64 `(d_sae + 1,)`: where each feature starts."""
        ...

    def packed(self, low: int, high: int, first_feature: int, row_bits: int) -> np.ndarray:
        """The firings from `low` to `high`, packed with features counted from `first_feature` and row ids of the whole
        index."""
        ...

    def keys(self, low: int, high: int) -> np.ndarray:
        """The same firings' order keys, uint16."""
        ...

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest strength of each feature that fires, float32."""
        ...


class SegmentRun(NamedTuple):
    """The packed, sorted firings of one segment."""

    content: np.ndarray
    """uint64, usually memory-mapped."""
    row_bits: int
    first_row: int
    indptr: np.ndarray

    def packed(self, low: int, high: int, first_feature: int, row_bits: int) -> np.ndarray:
        content = self.content[low:high]
        rows = (content & np.uint64((1 << self.row_bits) - 1)) + np.uint64(self.first_row)
        rest = (content >> np.uint64(self.row_bits)) - np.uint64(first_feature << KEY_BITS)
        return (rest << np.uint64(row_bits)) | rows

    def keys(self, low: int, high: int) -> np.ndarray:
        return (self.content[low:high] >> np.uint64(self.row_bits)).astype(np.uint16)

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        fires = self.indptr[1:] > self.indptr[:-1]
        first = unpack(self.content[self.indptr[:-1][fires]], self.row_bits).values
        last = unpack(self.content[self.indptr[1:][fires] - 1], self.row_bits).values
        return bf16_to_float32(last), bf16_to_float32(first)


class ListRun(NamedTuple):
    """The feature lists of an index."""

    rows: ListReader
    values: ListReader
    indptr: np.ndarray
    low: np.ndarray
    """float32 `(d_sae,)`: the smallest strength of each feature."""
    high: np.ndarray

    def packed(self, low: int, high: int, first_feature: int, row_bits: int) -> np.ndarray:
        features = np.arange(first_feature, len(self.indptr) - 1)
        features = features[: int(np.searchsorted(self.indptr, high)) - first_feature]
        lengths = np.diff(np.clip(self.indptr[first_feature : first_feature + len(features) + 1], low, high))
        packed = np.repeat((features - first_feature).astype(np.uint64) << np.uint64(KEY_BITS), lengths)
        packed |= order_key(self.values.read(low, high))
        packed <<= np.uint64(row_bits)
        packed |= self.rows.read(low, high).astype(np.uint64)
        return packed

    def keys(self, low: int, high: int) -> np.ndarray:
        return order_key(self.values.read(low, high))

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        fires = self.indptr[1:] > self.indptr[:-1]
        return self.low[fires], self.high[fires]


class Piece(NamedTuple):
    """A stretch of the merged lists: whole features, or part of a single one."""

    start: int
    """Place of the first firing in the merged lists."""
    first_feature: int
    features: np.ndarray
    """uint32 `(n,)`, ascending."""
    rows: np.ndarray
    """uint64 `(n,)`."""
    values: np.ndarray
    """bfloat16 bits, uint16 `(n,)`, strongest first within a feature."""
    complete: bool
    """Whether the last feature ends here."""


def open_runs(segments: Sequence[Segment], paths: Sequence[Path], d_sae: int) -> list[Run]:
    """The runs of segments, memory-mapped."""
    runs: list[Run] = []
    for segment, path in zip(segments, paths, strict=True):
        if segment.firing_stop == segment.firing_start:
            continue
        packed = np.asarray(np.memmap(path, dtype=np.uint64, mode="r"))
        shift = np.uint64(segment.row_bits + KEY_BITS)
        starts = np.searchsorted(packed, np.arange(d_sae, dtype=np.uint64) << shift)
        indptr = np.append(starts, len(packed)).astype(np.int64)
        runs.append(SegmentRun(packed, segment.row_bits, segment.start, indptr))
    return runs


def merge_runs(runs: Sequence[Run], d_sae: int, n_rows: int, budget: int) -> Iterator[Piece]:
    """The merged lists in order, at most `budget` firings at a time."""
    indptr = sum((run.indptr for run in runs), np.zeros(d_sae + 1, np.int64))
    row_bits = bits_for(n_rows)
    widest = 2 ** min(16, 64 - KEY_BITS - row_bits)
    first = 0
    while first < d_sae:
        fitting = int(np.searchsorted(indptr, indptr[first] + budget, side="right")) - 1
        stop = min(max(fitting, first + 1), first + widest, d_sae)
        if indptr[stop] - indptr[first] > budget:
            yield from _cut_feature(runs, first, int(indptr[first]), row_bits, budget)
        elif indptr[stop] > indptr[first]:
            yield _gather(runs, first, stop, int(indptr[first]), row_bits)
        first = stop


def _gather(runs: Sequence[Run], first: int, stop: int, start: int, row_bits: int) -> Piece:
    """Features `first` to `stop`, whole."""
    parts = [run.packed(int(run.indptr[first]), int(run.indptr[stop]), first, row_bits) for run in runs]
    return _sorted_piece(parts, start, first, row_bits, complete=True)


def _cut_feature(runs: Sequence[Run], feature: int, start: int, row_bits: int, budget: int) -> Iterator[Piece]:
    """One feature, cut by strength."""
    bounds = [(int(run.indptr[feature]), int(run.indptr[feature + 1])) for run in runs]
    counts = np.zeros(2**KEY_BITS, np.int64)
    for run, (low, high) in zip(runs, bounds, strict=True):
        for place in range(low, high, budget):
            counts += np.bincount(run.keys(place, min(high, place + budget)), minlength=2**KEY_BITS)
    ends = np.concatenate([[0], counts.cumsum()])
    n = int(ends[-1])
    starts = [low for low, _ in bounds]
    key = 0
    while key < 2**KEY_BITS:
        fitting = int(np.searchsorted(ends, ends[key] + budget, side="right")) - 1
        stop = max(fitting, key + 1)
        done = int(ends[key])
        stops = [_place_of(run, stop, low, high) for run, low, (_, high) in zip(runs, starts, bounds, strict=True)]
        slices = list(zip(runs, starts, stops, strict=True))
        if ends[stop] - done <= budget:
            if ends[stop] > done:
                parts = [run.packed(low, high, feature, row_bits) for run, low, high in slices]
                yield _sorted_piece(parts, start + done, feature, row_bits, complete=ends[stop] == n)
        else:
            for run, low, high in slices:
                for place in range(low, high, budget):
                    part = run.packed(place, min(high, place + budget), feature, row_bits)
                    done += len(part)
                    last = done == n
                    yield _sorted_piece([part], start + done - len(part), feature, row_bits, complete=last)
        key, starts = stop, stops


def _place_of(run: Run, key: int, low: int, high: int) -> int:
    """The first place from `low` to `high`, all of one feature, whose order key is `key` or more."""
    return low + bisect_left(range(low, high), key, key=lambda place: int(run.keys(place, place + 1)[0]))


def _sorted_piece(parts: list[np.ndarray], start: int, first_feature: int, row_bits: int, complete: bool) -> Piece:
    packed = np.concatenate(parts)
    packed.sort()
    features, values, rows = unpack(packed, row_bits)
    features += np.uint32(first_feature)
    return Piece(start, first_feature, features, rows, values, bool(complete))
