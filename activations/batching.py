"""The model's work on one row group: which windows run, and which of them together.

1. A group's windows run up to the group's last row. A window that began in an earlier group runs from its start and
   only the rows that are this group's are kept: models are causal, so every row has its whole past, and a group's
   result depends on nothing but the plan. A window with media runs whole: in some models the tokens of an image see
   each other, so that one depends on what comes after it.
2. Windows are sorted by length and cut into batches under a budget of tokens, padding counted, so that padding and
   the fixed cost of a batch are least. A model that needs no padding gets them as they come, in as few batches as hold
   them, all about as large.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from activations.media import PlacedMedium

__all__ = ["Batch", "Window", "chosen_windows", "even_cuts", "group_windows", "pack_batches"]

OVERHEAD_SHARE = 32
"""A batch costs about this part of a full one besides its tokens (1.7B parameters on an H100: 730 tokens of 32,768)."""


class Window(NamedTuple):
    """What the model runs of one window for one row group."""

    tokens: np.ndarray
    """From the window's start to its end or the group's last row, int32."""
    first_row: int
    """Row of the group at which `tokens[skip]` stands."""
    skip: int
    """Tokens that lie in earlier groups: computed, and dropped."""
    kept: np.ndarray | None = None
    """Which tokens are rows of the group (ascending places in `tokens`), where not all after `skip` are."""
    media: Sequence[PlacedMedium] = ()


class Batch(NamedTuple):
    """Windows that run together, and where their rows go."""

    windows: list[np.ndarray]
    rows: np.ndarray
    """Rows of the group, int64, in the order of the windows' kept tokens."""
    kept: np.ndarray | None
    """Which of the windows' tokens are kept (bool), None for all."""
    media: list[Sequence[PlacedMedium]] | None = None
    """Of each window; None where no window has any."""


def group_windows(token_ids: np.ndarray, positions: np.ndarray, group_start: int) -> list[Window]:
    """The windows of a row group.

    Args:
        token_ids: int32, from the start of the group's first window (which may lie in an earlier group) to its end.
        positions: position within the window of each.
        group_start: index in these arrays of the group's first row.
    """
    starts = np.flatnonzero(positions == 0)
    ends = np.append(starts[1:], len(token_ids))
    return [
        Window(token_ids[start:end], max(0, start - group_start), max(0, group_start - start))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def chosen_windows(
    windows: Sequence[np.ndarray],
    sequences: np.ndarray,
    positions: np.ndarray,
    first_row: int,
    media: Sequence[Sequence[PlacedMedium]] | None = None,
) -> list[Window]:
    """The windows of rows that are only some of their windows' tokens. Nothing after the last of them is run, but where
    there are media.

    Args:
        windows: all tokens of each window that has rows, in order.
        sequences: window number of each row, ascending.
        positions: position within the window of each row.
        first_row: row of the group at which these rows begin.
        media: of each window.
    """
    shown = [()] * len(windows) if media is None else media
    starts = np.flatnonzero(np.diff(sequences, prepend=-1))
    ends = np.append(starts[1:], len(sequences))
    return [
        Window(tokens if own else tokens[: positions[end - 1] + 1], first_row + start, 0, positions[start:end], own)
        for tokens, own, start, end in zip(windows, shown, starts.tolist(), ends.tolist(), strict=True)
    ]


def pack_batches(windows: Sequence[Window], batch_size: int, padded: bool = True) -> list[Batch]:
    """Windows in batches of up to `batch_size` tokens; a longer one runs alone.

    Args:
        windows: the windows.
        batch_size: tokens in a batch, padding included.
        padded: whether the model pads what runs together to the longest of them.
    """
    if not padded:
        ends = even_cuts([len(window.tokens) for window in windows], batch_size)
        return [_batch(list(windows[start:end])) for start, end in pairwise([0, *ends])]
    ordered = sorted(windows, key=lambda window: -len(window.tokens))
    ends = _cheapest_cuts(np.array([len(window.tokens) for window in ordered], np.int64), batch_size)
    return [_batch(ordered[start:end]) for start, end in pairwise([0, *ends])]


def even_cuts(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Where to cut windows, in order, into the fewest batches that fit; of those the ones whose largest is smallest."""
    capacities = range(batch_size + 1)
    fewest = len(_filled(lengths, batch_size))
    enough = bisect_left(capacities, True, key=lambda capacity: len(_filled(lengths, capacity)) <= fewest)
    return _filled(lengths, enough)


def _filled(lengths: Sequence[int], capacity: int) -> list[int]:
    """Ends of batches that each take what still fits; a longer window runs alone."""
    ends: list[int] = []
    filled = capacity
    for end, length in enumerate(lengths, start=1):
        if filled + length > capacity:
            ends.append(end)
            filled = 0
        ends[-1] = end
        filled += length
    return ends


def _cheapest_cuts(lengths: np.ndarray, batch_size: int) -> list[int]:
    """Where to cut windows of falling length into batches, so that padded tokens and batches cost least together.

    Dynamic programming: the best batches of the first i windows end in one that starts at some j < i, so
    `cost[i] = min over j of cost[j] + lengths[j] (i - j) + overhead`.
    """
    overhead = batch_size // OVERHEAD_SHARE
    cost = np.zeros(len(lengths) + 1)
    starts = np.zeros(len(lengths) + 1, np.int64)
    for end in range(1, len(lengths) + 1):
        # With the shortest window a batch holds most: earlier starts would not fit.
        earliest = max(0, end - max(1, batch_size // max(1, int(lengths[end - 1]))))
        padded = lengths[earliest:end] * (end - np.arange(earliest, end))
        fits = padded <= batch_size
        fits[-1] = True
        totals = np.where(fits, cost[earliest:end] + padded + overhead, np.inf)
        best = int(np.argmin(totals))
        cost[end], starts[end] = totals[best], earliest + best
    ends = [len(lengths)] if len(lengths) else []
    while ends and starts[ends[-1]] > 0:
        ends.append(int(starts[ends[-1]]))
    return ends[::-1]


def _batch(windows: list[Window]) -> Batch:
    masks = [_mask(window) for window in windows]
    rows = [window.first_row + np.arange(np.count_nonzero(mask)) for window, mask in zip(windows, masks, strict=True)]
    kept = np.concatenate(masks)
    media = [window.media for window in windows] if any(window.media for window in windows) else None
    return Batch([window.tokens for window in windows], np.concatenate(rows), None if kept.all() else kept, media)


def _mask(window: Window) -> np.ndarray:
    """Which of the window's tokens are rows of the group (bool)."""
    if window.kept is None:
        return np.arange(len(window.tokens)) >= window.skip
    mask = np.zeros(len(window.tokens), bool)
    mask[window.kept] = True
    return mask
