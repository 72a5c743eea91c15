"""Shuffled batches from a source, in bounded memory.

1. *Select*: rows are chosen by their flags (BOS, special tokens and held-out documents are left out by default) and,
   if asked, by norm against the median of the rows that the flags leave. Balanced over modalities, a pass is of as many
   rows of each as the rarest has, and draws those of the others anew.
2. If all chosen rows fit in memory they are read once, and each pass is a new permutation of them.
3. Otherwise a pass takes blocks of consecutive rows (about 1 MiB) in random order into a buffer. Whenever the buffer
   is full, a random quarter of it is handed out, and its slots take the rows that come next. At the end of a pass the
   buffer is drained: each chosen row comes exactly once a pass.
4. Threads read ahead what fills the buffer next. What is handed out is cut into batches of constant size, over the
   ends of passes.

The order depends on the seed and the source, never on timing, so that a run can go on exactly at any batch (`start`).

A source that can only be read in order (a live model) goes through the same buffer in its own order. Where a pass fits
into the buffer it is read once only, and from then on shuffled as in step 2. The buffer lies where the source's values
lie: on the host, or on the GPU of a live model. To go on at a batch, such a source is read from the beginning: exact,
but a model computes again what was consumed before.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from activations.buffers import RowBuffer, concatenated
from activations.errors import InvalidInputError, UnknownNameError
from activations.mixing import Feed, Fill, Give, LiveFeed, StoreFeed, Values, mix, permute, skip, stream
from activations.pipeline import Channel, Worker
from activations.source import ActivationSource, RowFlag
from activations.spec import BALANCES
from activations.store import ActivationStore

__all__ = ["Selection", "ShuffledBatch", "ShuffledBatches"]

DEFAULT_MEMORY_BYTES = 2**30
GIVEN_SHARE = 0.25
"""Part of the buffer that is handed out at once; the reader is as much ahead."""
MIN_READ_AHEAD = 4
READERS = 4
"""Blocks that are read at once: in random order nothing else keeps a disk busy."""
EVENT_BYTES = 2**20
LIVE_EVENT_BYTES = (2**22, 2**26)
"""Bytes that a live source is asked for at once, at least and at most. Each piece costs a few launches a hook, and rows
of many hooks are wide."""
LIVE_EVENT_SHARE = 256
"""So many pieces fill the memory."""
MAX_LIVE_PIECE = 4096
BOOKKEEPING_BYTES = 24
"""Per row of the buffer: its id, and its place in lists of slots."""
NUMPY_DTYPES: dict[str, Any] = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}

NO_FLAGS = RowFlag(0)


@dataclass(frozen=True)
class Selection:
    """Which rows are used."""

    exclude_flags: RowFlag = RowFlag.BOS | RowFlag.SPECIAL | RowFlag.HELD_OUT
    """Rows with any of these flags are left out."""
    require_flags: RowFlag = NO_FLAGS
    """Rows without all of these flags are left out (`HELD_OUT` for metrics)."""
    max_norm_ratio: float | None = None
    """Rows whose norm is above so many times the median are left out, at any of the hooks; None keeps them."""
    balance: Literal["none", "modality"] = "none"
    """"modality": each pass takes as many rows of text, of images and of sounds as there are of the rarest of them,
    drawn anew from the others. Of a store with media alone."""

    def __post_init__(self) -> None:
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 0:
            raise InvalidInputError(f"max_norm_ratio is {self.max_norm_ratio}; expected more than 0, or None.")
        if self.balance not in BALANCES:
            raise UnknownNameError("balance", self.balance, BALANCES)
        if self.exclude_flags & self.require_flags:
            raise InvalidInputError("The selection both excludes and requires a flag, which leaves no row.")

    @property
    def balanced(self) -> bool:
        """Whether a pass takes the same number of rows of each modality."""
        return self.balance == "modality"

    def by_flags(self, flags: np.ndarray) -> np.ndarray:
        """Rows (bool) that the flags leave."""
        required = np.uint8(self.require_flags)
        return ((flags & np.uint8(self.exclude_flags)) == 0) & ((flags & required) == required)


class ShuffledBatch(NamedTuple):
    """Some rows in random order."""

    rows: np.ndarray
    """Row ids, int64 `(n,)`."""
    values: Any
    """`(n, *feature_shape)` in the storage dtype (bfloat16 as uint16 bits), or a torch tensor on its device where the
    source gives those; if several hooks were asked for, a dict of such."""


class ShuffledBatches:
    """An iterable of `ShuffledBatch`; each `iter()` begins anew at batch `start`.

    Args:
        source: where rows come from; an `ActivationStore` is read in random order.
        hooks: a hook name, or several, whose rows stay aligned.
        batch_size: rows in a batch; only the last of all may be shorter.
        seed: of all randomness.
        passes: how often each row comes; None goes on for ever.
        tokens: stop after so many rows; None for no such limit.
        select: which rows are used.
        memory_bytes: bound on the activations held in memory, about.
        start: batches to skip, so that a run goes on exactly where it was after so many.

    Raises:
        InvalidInputError: the selection leaves no row (of a live source: raised after the first pass over it), or a
            size makes no sense.
        UnknownNameError: a hook that the source does not have.
    """

    def __init__(
        self,
        source: ActivationSource,
        hooks: str | Sequence[str],
        batch_size: int,
        seed: int,
        *,
        passes: int | None = None,
        tokens: int | None = None,
        select: Selection = Selection(),  # frozen
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        start: int = 0,
    ) -> None:
        self.hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        if batch_size < 1 or start < 0 or not self.hooks:
            raise InvalidInputError(
                f"batch_size is {batch_size}, start is {start}, and there are {len(self.hooks)} hooks; expected at "
                "least 1 row in a batch, a start of 0 or more, and a hook."
            )
        self.batch_size, self.seed, self.passes, self.tokens, self.start = batch_size, seed, passes, tokens, start
        self._single = isinstance(hooks, str)
        dtype = NUMPY_DTYPES[source.dtype]
        self._no_rows = {hook: np.empty((0, *source.hook_shape(hook)), dtype) for hook in self.hooks}
        row_bytes = sum(math.prod(empty.shape[1:]) for empty in self._no_rows.values()) * np.dtype(dtype).itemsize
        fitting = memory_bytes // (row_bytes + BOOKKEEPING_BYTES)
        streamed = max(1, int(fitting / (1 + GIVEN_SHARE)))
        event_bytes = EVENT_BYTES
        self._feed: Feed
        if isinstance(source, ActivationStore):
            self._feed = StoreFeed(source, self.hooks, select)
        else:
            piece_bytes = min(max(memory_bytes // LIVE_EVENT_SHARE, LIVE_EVENT_BYTES[0]), LIVE_EVENT_BYTES[1])
            piece = min(MAX_LIVE_PIECE, max(1, piece_bytes // row_bytes))
            event_bytes = piece * row_bytes
            self._feed = LiveFeed(source, self.hooks, select, piece, median_rows=streamed)
        self._no_row = f"The selection leaves no row of {source!r}: {select}."
        n_rows = self._feed.n_chosen
        if n_rows == 0:
            raise InvalidInputError(self._no_row)
        self.in_memory = n_rows is not None and n_rows <= fitting
        """Whether all chosen rows are known to fit in memory, so that each pass is a full shuffle."""
        self.capacity = n_rows if n_rows is not None and self.in_memory else streamed
        if n_rows is None and tokens is not None:  # what a live source is not asked for, its model need not compute
            self.capacity = min(self.capacity, max(batch_size, tokens))
        """Rows in the buffer."""
        self._read_ahead = max(MIN_READ_AHEAD, int(self.capacity * GIVEN_SHARE * row_bytes / event_bytes))
        if self.in_memory:
            self._read_ahead = MIN_READ_AHEAD

    @property
    def n_rows(self) -> int | None:
        """Rows in one pass; None for a live source."""
        return self._feed.n_rows

    @property
    def norm_limits(self) -> Mapping[str, float]:
        """The largest norm of a row that is used, by hook, where the selection bounds norms."""
        return self._feed.limits

    def __iter__(self) -> Iterator[ShuffledBatch]:
        rows_of = np.empty(self.capacity, np.int64)
        buffer = RowBuffer(self.capacity, self._no_rows)
        dropping = self.start * self.batch_size if self._feed.n_rows is None else 0
        left = math.inf if self.tokens is None else self.tokens - self.start * self.batch_size
        held: list[tuple[np.ndarray, Values]] = []
        n_held = 0
        with closing(self._events()) as events:
            for event in events:
                if isinstance(event, Fill):
                    rows_of[event.slots] = event.rows
                    buffer.put(event.slots, event.values or {})
                    continue
                slots = event.slots[dropping:]
                dropping -= min(dropping, len(event.slots))
                while len(slots) and left > 0:
                    taken, slots = np.split(slots, [int(min(self.batch_size - n_held, left))])
                    left -= len(taken)
                    n_held += len(taken)
                    held.append((rows_of[taken], buffer.take(taken)))
                    if n_held == self.batch_size:
                        yield self._joined(held)
                        held, n_held = [], 0
                if left <= 0:
                    break
        if held:
            yield self._joined(held)

    def _joined(self, held: list[tuple[np.ndarray, Values]]) -> ShuffledBatch:
        rows = concatenated([rows for rows, _ in held])
        values = {hook: concatenated([values[hook] for _, values in held]) for hook in self.hooks}
        return ShuffledBatch(rows, values[self.hooks[0]] if self._single else values)

    def _schedule(self) -> Iterator[Fill | Give]:
        if self.in_memory:
            yield from permute(self._feed.pieces(None), self.capacity, self.seed, self.passes, self._feed.groups)
            return
        if self._feed.n_rows is None:
            yield from stream(self._feed.pieces, self.capacity, GIVEN_SHARE, self.seed, self.passes, self._no_row)
            return
        for number in count() if self.passes is None else range(self.passes):
            rng = np.random.default_rng([self.seed, number])
            yield from mix(self._feed.pieces(rng), self.capacity, GIVEN_SHARE, rng)

    def _events(self) -> Generator[Fill | Give, None, None]:
        """The schedule with values, read ahead by threads that end with this generator."""
        events = self._schedule()
        if self._feed.n_rows is not None:
            events = skip(events, self.start * self.batch_size, self.capacity)
        channel: Channel[tuple[Fill | Give, Future[Values] | None]] = Channel(self._read_ahead)
        pool = ThreadPoolExecutor(READERS, "read")

        def read() -> None:
            for event in events:
                reading = None
                if isinstance(event, Fill) and event.values is None:
                    reading = pool.submit(self._feed.read, event.rows)
                channel.put((event, reading))
            channel.close()

        reader = Worker("reader", read, channel.close)
        reader.start()
        try:
            for event, reading in channel:
                if isinstance(event, Fill) and reading is not None:
                    event = event._replace(values=reading.result())
                yield event
        finally:
            channel.stop()
            reader.join_fully()
            pool.shutdown(cancel_futures=True)
        if reader.error is not None:
            raise reader.error
