"""The model's work on one row group: which windows run, and which of them together.

1. A group's windows run up to the group's last row. A window that began in an earlier group runs from its start and
   only the rows that are this group's are kept: models are causal, so every row has its whole past, and a group's
   result depends on nothing but the plan.
2. Windows are sorted by length and packed into batches under a budget of tokens, padding counted. Where fewer tokens
   a batch give no more batches, they are spread evenly: a small last batch costs nearly as much as a full one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Batch", "Window", "group_windows", "pack_batches"]

BUDGETS_TRIED = 16


class Window(NamedTuple):
    """What the model runs of one window for one row group."""

    tokens: np.ndarray
    """From the window's start to its end or the group's last row, int32."""
    first_row: int
    """Row of the group at which `tokens[skip]` stands."""
    skip: int
    """Tokens that lie in earlier groups: computed, and dropped."""


class Batch(NamedTuple):
    """Windows that run together, and where their rows go."""

    windows: list[np.ndarray]
    rows: np.ndarray
    """Rows of the group, int64, in the order of the windows' kept tokens."""
    kept: np.ndarray | None
    """Which of the windows' tokens are kept (bool), None for all."""


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


def pack_batches(windows: Sequence[Window], batch_size: int) -> list[Batch]:
    """Windows by falling length in batches of up to `batch_size` tokens, padding counted; a longer one runs alone."""
    ordered = sorted(windows, key=lambda window: -len(window.tokens))
    batches = _packed(ordered, batch_size)
    even = sum(len(some) * len(some[0].tokens) for some in batches) // max(1, len(batches))
    for budget in range(even, batch_size, max(1, batch_size // BUDGETS_TRIED)):
        evener = _packed(ordered, budget)
        if len(evener) == len(batches):
            batches = evener
            break
    return [_batch(some) for some in batches]


def _packed(ordered: Sequence[Window], budget: int) -> list[list[Window]]:
    batches: list[list[Window]] = []
    for window in ordered:
        if batches and len(batches[-1][0].tokens) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _batch(windows: list[Window]) -> Batch:
    rows = [window.first_row + np.arange(len(window.tokens) - window.skip) for window in windows]
    kept = None
    if any(window.skip for window in windows):
        kept = np.concatenate([np.arange(len(window.tokens)) >= window.skip for window in windows])
    return Batch([window.tokens for window in windows], np.concatenate(rows), kept)
