"""A document's tokens, cut into windows, and which of them are rows: steps 1 and 2 of a plan (`activations.plan`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from activations.chats import CHAT_COLUMNS
from activations.documents import Document, is_held_out
from activations.selection import Choosing, WindowTokens
from activations.source import RowFlag

__all__ = ["CHAT_COLUMNS", "TOKEN_COLUMNS", "Cut", "Windowing", "cut_document"]

TOKEN_COLUMNS = {"token_id": "int32", "sequence": "int64", "position": "int32", "flags": "uint8"}
"""Per-token columns and their dtypes; `position` counts from the window's start, BOS included."""
NOBODY = {"role": 0, "kind": 0, "message": -1}
"""What BOS is of a chat."""


@dataclass(frozen=True)
class Windowing:
    """How documents are cut into rows."""

    context_size: int
    bos_token_id: int | None
    special_token_ids: frozenset[int]
    rows_per_group: int
    max_tokens: int | None = None
    """Rows in all, at most; None for all of the text."""
    max_document_tokens: int | None = None

    def __post_init__(self) -> None:
        assert self.text_tokens_per_window >= 1

    @property
    def text_tokens_per_window(self) -> int:
        return self.context_size - (self.bos_token_id is not None)


class Cut(NamedTuple):
    """A document's rows."""

    columns: Mapping[str, np.ndarray]
    """`sequence` counts from the document's first."""
    window_starts: np.ndarray
    """First row of each window, relative to the document's first; windows without rows are not counted."""
    window_offsets: np.ndarray
    """Place of each window's first token in the document, BOS not counted."""
    windows: Sequence[Mapping[str, np.ndarray]]
    """`token_id` of all tokens of each window, and of chats what they are, where only some are rows."""
    is_windowed: bool
    """Whether the document is longer than a window."""


def cut_document(
    tokens: np.ndarray,
    spoken: Mapping[str, np.ndarray],
    document: Document,
    windowing: Windowing,
    max_rows: int | None,
    choosing: Choosing | None,
) -> Cut | None:
    """The rows of a document's tokens, at most `max_rows`; None without tokens. `spoken`: of a chat `CHAT_COLUMNS`."""
    if not len(tokens):
        return None
    per_window, has_bos = windowing.text_tokens_per_window, windowing.bos_token_id is not None
    n_windows = -(-len(tokens) // per_window)
    if has_bos:
        before = np.arange(n_windows) * per_window
        tokens = np.insert(tokens, before, windowing.bos_token_id)  # type: ignore[arg-type]
        n = len(tokens) - n_windows
        spoken = {name: np.insert(values[:n], before, NOBODY[name]) for name, values in spoken.items()}
    row = np.arange(len(tokens))
    position, window = row % windowing.context_size, row // windowing.context_size
    columns = {
        "token_id": tokens,
        "sequence": window,
        "position": position,
        "flags": _flags(tokens, position, document, windowing),
        **{name: values[: len(tokens)] for name, values in spoken.items()},
    }
    kinds = TOKEN_COLUMNS | CHAT_COLUMNS
    columns = {name: values.astype(kinds[name]) for name, values in columns.items()}
    if choosing is None or choosing.selection.keeps_all:
        columns = {name: values[:max_rows] for name, values in columns.items()}
        starts = np.arange(n_windows) * windowing.context_size
        starts = starts[starts < len(columns["token_id"])]
        return Cut(columns, starts, np.arange(len(starts)) * per_window, (), len(starts) > 1)
    return _chosen(columns, windowing, max_rows, choosing)


def _chosen(columns: Mapping[str, np.ndarray], windowing: Windowing, max_rows: int | None, choosing: Choosing) -> Cut:
    """The rows that a selection chooses among all tokens of a document."""
    window, position = columns["sequence"], columns["position"]
    offset = window * windowing.text_tokens_per_window
    document_position = offset + np.maximum(position - (windowing.bos_token_id is not None), 0)
    tokens = WindowTokens(
        columns["token_id"], position, document_position, columns["flags"], columns.get("role"), columns.get("kind")
    )
    chosen = np.flatnonzero(choosing.selection.chosen(tokens, choosing.matches))[:max_rows]
    kept, starts, numbers = np.unique(window[chosen], return_index=True, return_inverse=True)
    parts = [slice(start, start + windowing.context_size) for start in (kept * windowing.context_size).tolist()]
    whole = [name for name in columns if name == "token_id" or name in CHAT_COLUMNS]
    windows = [{name: columns[name][part] for name in whole} for part in parts]
    chosen_columns = {name: values[chosen] for name, values in columns.items()}
    chosen_columns["sequence"] = numbers.astype(TOKEN_COLUMNS["sequence"])
    is_windowed = bool(window[-1] > 0)
    return Cut(chosen_columns, starts, kept * windowing.text_tokens_per_window, windows, is_windowed)


def _flags(tokens: np.ndarray, position: np.ndarray, document: Document, windowing: Windowing) -> np.ndarray:
    flags = np.full(len(tokens), RowFlag.HELD_OUT if is_held_out(document) else 0, np.uint8)
    special = np.isin(tokens, np.array(sorted(windowing.special_token_ids), np.int64))
    if windowing.bos_token_id is not None:
        special &= position > 0
        flags[position == 0] |= np.uint8(RowFlag.BOS)
    flags[special] |= np.uint8(RowFlag.SPECIAL)
    return flags
