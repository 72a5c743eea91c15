"""The pure half of shuffling: where chosen rows come from, and the schedule of a buffer that mixes them.

A schedule is a sequence of events over the slots of a buffer: `Fill` puts rows into slots, `Give` hands slots out.
For a store it is known without reading a single activation, so it can be skipped to any place in no time. A live
source tells its rows only as they come, with their values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np

from activations.buffers import taken
from activations.errors import InvalidInputError, NonFiniteError
from activations.source import ActivationBatch, ActivationSource
from activations.store import ActivationStore

__all__ = [
    "Chooser",
    "Feed",
    "Fill",
    "Give",
    "LiveFeed",
    "Piece",
    "StoreFeed",
    "Values",
    "mix",
    "permute",
    "skip",
    "stream",
]

SCAN_ROWS = 2**20
MEDIAN_ROWS = 2**24
"""The median norm is taken over at most about so many rows, in stretches spread evenly over the store."""
SKIP_FILLS = 64
LIVE_MEDIAN_ROWS = 2**16

Values = dict[str, Any]
"""Rows by hook: numpy arrays, or torch tensors where the source gives those."""


class Fill(NamedTuple):
    """Put rows into slots of the buffer."""

    slots: np.ndarray
    rows: np.ndarray
    values: Values | None
    """None until they are read."""


class Give(NamedTuple):
    """Hand out the rows in these slots, in this order."""

    slots: np.ndarray


class Piece(NamedTuple):
    """Chosen rows, ascending, that lie together in the source."""

    rows: np.ndarray
    values: Values | None


def permute(
    pieces: Iterator[Piece], n_rows: int, seed: int, passes: int | None, groups: np.ndarray | None = None
) -> Iterator[Fill | Give]:
    """Fill all rows in, once; then every pass is a permutation of them, or, given the group of each, of as many of each
    group as the smallest has, drawn anew for each pass."""
    filled = 0
    for rows, values in pieces:
        yield Fill(np.arange(filled, filled + len(rows)), rows, values)
        filled += len(rows)
    for number in count() if passes is None else range(passes):
        rng = np.random.default_rng([seed, number])
        yield Give(rng.permutation(n_rows if groups is None else equal_shares(groups, rng)))


def equal_shares(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of as many members of each group as the smallest has, drawn without repeats."""
    counts = np.bincount(groups)
    smallest = int(counts[counts > 0].min())
    return np.concatenate(
        [rng.choice(np.flatnonzero(groups == code), smallest, replace=False) for code in np.flatnonzero(counts)]
    )


def mix(pieces: Iterator[Piece], capacity: int, share: float, rng: np.random.Generator) -> Iterator[Fill | Give]:
    """One pass through a buffer of `capacity` rows: when it is full a random `share` of it makes room for what comes;
    at the end the rest is handed out."""
    step = max(1, int(capacity * share))
    free = np.arange(capacity)
    for rows, values in pieces:
        done = 0
        while done < len(rows):
            if not len(free):
                free = rng.choice(capacity, step, replace=False)
                yield Give(free)
            part = slice(done, done + len(free))
            taken, free = np.split(free, [len(rows[part])])
            yield Fill(taken, rows[part], None if values is None else {hook: v[part] for hook, v in values.items()})
            done += len(taken)
    is_left = np.ones(capacity, bool)
    is_left[free] = False
    yield Give(rng.permutation(np.flatnonzero(is_left)))


def stream(
    pieces: Callable[[np.random.Generator], Iterator[Piece]],
    capacity: int,
    share: float,
    seed: int,
    passes: int | None,
    no_row: str,
) -> Iterator[Fill | Give]:
    """`mix` pass after pass, for a source that tells its rows only as they come. Where a pass fits into the buffer it
    stays there: the passes that follow are permutations of it, as those of `permute`, and read nothing.

    Raises:
        InvalidInputError: a pass is over and there was no row in it; the message is `no_row`.
    """
    for number in count() if passes is None else range(passes):
        rng = np.random.default_rng([seed, number])
        n_rows = 0
        for event in mix(pieces(rng), capacity, share, rng):
            n_rows += len(event.rows) if isinstance(event, Fill) else 0
            yield event
        if not n_rows:
            raise InvalidInputError(no_row)
        if n_rows <= capacity:
            for later in count(number + 1) if passes is None else range(number + 1, passes):
                yield Give(np.random.default_rng([seed, later]).permutation(n_rows))
            return


def skip(events: Iterator[Fill | Give], n_rows: int, capacity: int) -> Iterator[Fill | Give]:
    """A schedule without values from the point on at which `n_rows` rows are handed out, begun by filling in what the
    buffer holds there."""
    rows_of = np.full(capacity, -1)
    for event in events:
        if n_rows > 0:
            if isinstance(event, Fill):
                rows_of[event.slots] = event.rows
                continue
            n_rows -= len(event.slots)
            if n_rows > 0:
                continue
            slots = np.argsort(rows_of, kind="stable")
            slots = slots[rows_of[slots] >= 0]
            for part in np.array_split(slots, SKIP_FILLS):
                yield Fill(part, rows_of[part], None)
            event = Give(event.slots[len(event.slots) + n_rows :])
        yield event


class Chooser(Protocol):
    """Which rows are used, by their flags."""

    @property
    def max_norm_ratio(self) -> float | None: ...

    @property
    def balanced(self) -> bool: ...

    def by_flags(self, flags: np.ndarray) -> np.ndarray: ...


class Feed(Protocol):
    """Chosen rows of a source, piece by piece."""

    limits: dict[str, float]
    """Largest norm of a row that is used, by hook; empty where the selection does not bound norms."""

    groups: np.ndarray | None
    """The group of each chosen row in order, where a pass takes the same number of each."""

    @property
    def n_rows(self) -> int | None:
        """Rows of a pass."""
        ...

    @property
    def n_chosen(self) -> int | None:
        """Rows that passes take theirs from."""
        ...

    def pieces(self, rng: np.random.Generator | None) -> Iterator[Piece]:
        """The rows of a pass: blocks in random order; all chosen rows in the source's order if there is no
        generator."""
        ...

    def read(self, rows: np.ndarray) -> Values:
        """Activations of ascending rows."""
        ...


class StoreFeed:
    """Blocks of a store in any order. One bit a row remembers which are chosen."""

    def __init__(self, store: ActivationStore, hooks: Sequence[str], chooser: Chooser) -> None:
        self.store, self.hooks = store, hooks
        self.limits: dict[str, float] = {}
        store.require_whole()
        self._end = min(map(store.rows_of, hooks))
        # Blocks are runs of inner chunks, which are read and verified whole anyway.
        self._block = max(map(store.block_rows, hooks))
        stretches = [(start, min(self._end, start + SCAN_ROWS)) for start in range(0, self._end, SCAN_ROWS)]
        by_flags = [chooser.by_flags(store.flags(start, stop)) for start, stop in stretches]
        if chooser.max_norm_ratio is not None and any(chosen.any() for chosen in by_flags):
            self._bound_norms(stretches, by_flags, chooser.max_norm_ratio)
        self._bits = np.packbits(np.concatenate([*by_flags, np.zeros(0, bool)]))
        self._n_chosen = self._n_rows = sum(int(chosen.sum()) for chosen in by_flags)
        self.groups: np.ndarray | None = None
        self._codes: np.ndarray | None = None
        if chooser.balanced:
            self._group(stretches, by_flags)

    @property
    def n_rows(self) -> int | None:
        return self._n_rows

    @property
    def n_chosen(self) -> int | None:
        return self._n_chosen

    def pieces(self, rng: np.random.Generator | None) -> Iterator[Piece]:
        all_bits = self._bits if rng is None or self._codes is None else self._drawn(self._codes, rng)
        n_blocks = -(-self._end // self._block)
        for block in (np.arange(n_blocks) if rng is None else rng.permutation(n_blocks)).tolist():
            start, stop = block * self._block, min(self._end, (block + 1) * self._block)
            bits = np.unpackbits(all_bits[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
            rows = start + np.flatnonzero(bits)
            if len(rows):
                yield Piece(rows, None)

    def read(self, rows: np.ndarray) -> Values:
        return {hook: self.store.read_rows(hook, rows) for hook in self.hooks}

    def _group(self, stretches: list[tuple[int, int]], chosen: list[np.ndarray]) -> None:
        """Tell the modalities of the chosen rows apart, a byte a row."""
        if not self.store.has_media:
            raise InvalidInputError(
                f"{self.store.path} has no images or sounds, so there is nothing to balance. Leave balance out."
            )
        self._codes = np.concatenate(
            [
                np.where(rows, 1 + self.store.column("modality", start, stop), 0).astype(np.uint8)
                for (start, stop), rows in zip(stretches, chosen, strict=True)
            ]
        )
        self.groups = self._codes[self._codes > 0]
        counts = np.bincount(self.groups)
        there = counts[counts > 0]
        self._n_rows = len(there) * int(there.min()) if len(there) else 0

    def _drawn(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The rows of a balanced pass, a bit each: how many of a group come from each stretch is drawn first, so that
        no more than a stretch is looked at."""
        stretches = [slice(start, start + SCAN_ROWS) for start in range(0, len(codes), SCAN_ROWS)]
        drawn = np.zeros(len(codes), bool)
        present = np.flatnonzero(np.bincount(self.groups)) if self.groups is not None else ()
        for code in present:
            counts = [int(np.count_nonzero(codes[stretch] == code)) for stretch in stretches]
            shares = rng.multivariate_hypergeometric(counts, self._n_rows // len(present), method="marginals")
            for stretch, share in zip(stretches, shares.tolist(), strict=True):
                places = np.flatnonzero(codes[stretch] == code)
                drawn[stretch.start + rng.choice(places, share, replace=False)] = True
        return np.packbits(drawn)

    def _bound_norms(self, stretches: list[tuple[int, int]], chosen: list[np.ndarray], ratio: float) -> None:
        step = max(1, len(stretches) * SCAN_ROWS // MEDIAN_ROWS)
        for hook in self.hooks:
            sample = [
                self.store.norms(hook, start, stop)[rows]
                for (start, stop), rows in zip(stretches[::step], chosen[::step], strict=True)
            ]
            self.limits[hook] = ratio * float(np.median(np.concatenate(sample)))
        for hook, limit in self.limits.items():
            for (start, stop), rows in zip(stretches, chosen, strict=True):
                rows &= self.store.norms(hook, start, stop) <= limit


class LiveFeed:
    """A source that is read in its own order. The median norm is that of its first rows.

    Args:
        source: the source.
        hooks: names of its hooks.
        chooser: which rows are used.
        piece_rows: rows that are asked for at once.
        median_rows: rows that the median norm is taken over, or all there are; as many are held back until it is known.
    """

    def __init__(
        self, source: ActivationSource, hooks: Sequence[str], chooser: Chooser, piece_rows: int, median_rows: int
    ) -> None:
        self.source, self.hooks, self.chooser = source, hooks, chooser
        self.piece_rows, self.median_rows = piece_rows, min(median_rows, LIVE_MEDIAN_ROWS)
        self.limits: dict[str, float] = {}
        self.groups: np.ndarray | None = None
        if chooser.balanced:
            raise InvalidInputError(
                "Rows can be balanced by modality from a store alone, which knows how many there are of each."
            )

    @property
    def n_rows(self) -> int | None:
        return None

    @property
    def n_chosen(self) -> int | None:
        return None

    def pieces(self, rng: np.random.Generator | None) -> Iterator[Piece]:
        waiting: list[tuple[Piece, Mapping[str, np.ndarray]]] | None = None
        if self.chooser.max_norm_ratio is not None and not self.limits:
            waiting = []
        for batch in self.source.batches(self.hooks, self.piece_rows):
            self._require_finite(batch)
            chosen = np.flatnonzero(self.chooser.by_flags(batch.flags))
            values = taken({hook: batch.activations[hook] for hook in self.hooks}, chosen)
            piece = Piece(batch.rows[chosen], values)
            norms = {hook: batch.norms[hook][chosen] for hook in self.hooks}
            if waiting is None:
                yield self._within_limits(piece, norms)
                continue
            waiting.append((piece, norms))
            if sum(len(piece.rows) for piece, _ in waiting) >= self.median_rows:
                yield from self._released(waiting)
                waiting = None
        if waiting:
            yield from self._released(waiting)

    def read(self, rows: np.ndarray) -> Values:
        raise AssertionError("a live source hands its values over with its rows")

    def _require_finite(self, batch: ActivationBatch) -> None:
        for hook in self.hooks:
            finite = np.isfinite(batch.norms[hook])
            if not finite.all():
                row = int(batch.rows[np.argmin(finite)])
                locate = getattr(self.source, "document_at", None)
                document = locate(row) if locate is not None else {}
                where = f", in the document {document['title']!r}" if document.get("title") else ""
                raise NonFiniteError(f"The hook {hook} gave a NaN or Inf at row {row:,}{where}.")

    def _released(self, waiting: list[tuple[Piece, Mapping[str, np.ndarray]]]) -> Iterator[Piece]:
        assert self.chooser.max_norm_ratio is not None
        for hook in self.hooks:
            norms = np.concatenate([norms[hook] for _, norms in waiting])
            if len(norms):
                self.limits[hook] = self.chooser.max_norm_ratio * float(np.median(norms))
        for piece, by_hook in waiting:
            yield self._within_limits(piece, by_hook)

    def _within_limits(self, piece: Piece, norms: Mapping[str, np.ndarray]) -> Piece:
        kept = np.ones(len(piece.rows), bool)
        for hook, limit in self.limits.items():
            kept &= norms[hook] <= limit
        assert piece.values is not None
        if kept.all():
            return piece
        places = np.flatnonzero(kept)
        return Piece(piece.rows[places], taken(piece.values, places))
