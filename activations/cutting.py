"""A document's tokens, cut into windows, and which of them are rows: steps 1 and 2 of a plan (`activations.plan`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from activations.chats import CHAT_COLUMNS
from activations.documents import Document, is_held_out
from activations.errors import InvalidInputError
from activations.media import MEDIA_COLUMNS, MODALITIES, NO_MEDIUM, window_breaks
from activations.selection import Choosing, WindowTokens
from activations.source import RowFlag

__all__ = ["CHAT_COLUMNS", "TOKEN_COLUMNS", "Cut", "Windowing", "cut_document"]

TOKEN_COLUMNS = {"token_id": "int32", "sequence": "int64", "position": "int32", "flags": "uint8"}
"""Per-token columns and their dtypes; `position` counts from the window's start, BOS included."""
NOTHING = {"role": 0, "kind": 0, "message": -1, **NO_MEDIUM}
"""What BOS is of a chat, and of a text with media."""


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
    media: Sequence[Sequence[tuple[int, int, int]]] = ()
    """Of a text with media, by window: number in the document, place of the first soft token in the window, and how
    many soft tokens, of each medium."""


def cut_document(
    tokens: np.ndarray,
    beside: Mapping[str, np.ndarray],
    document: Document,
    windowing: Windowing,
    max_rows: int | None,
    choosing: Choosing | None,
) -> Cut | None:
    """The rows of a document's tokens, at most `max_rows`; None without tokens. `beside`: of a chat `CHAT_COLUMNS`, of
    a text with media `MEDIA_COLUMNS`."""
    if not len(tokens):
        return None
    has_bos = windowing.bos_token_id is not None
    before = _window_starts(len(tokens), beside, document, windowing)
    n_windows = len(before)
    if has_bos:
        tokens = np.insert(tokens, before, windowing.bos_token_id)  # type: ignore[arg-type]
        n = len(tokens) - n_windows
        beside = {name: np.insert(values[:n], before, NOTHING[name]) for name, values in beside.items()}
    starts = before + np.arange(n_windows) * has_bos
    row = np.arange(len(tokens))
    window = np.repeat(np.arange(n_windows), np.diff(starts, append=len(tokens)))
    position = row - starts[window]
    columns = {
        "token_id": tokens,
        "sequence": window,
        "position": position,
        "flags": _flags(tokens, position, document, windowing),
        **{name: values[: len(tokens)] for name, values in beside.items()},
    }
    if "modality" in columns:
        columns["flags"] = _media_flags(columns["flags"], columns["modality"])
    kinds = TOKEN_COLUMNS | CHAT_COLUMNS | MEDIA_COLUMNS
    columns = {name: values.astype(kinds[name]) for name, values in columns.items()}
    if "modality" not in columns and (choosing is None or choosing.selection.keeps_all):
        columns = {name: values[:max_rows] for name, values in columns.items()}
        starts = starts[starts < len(columns["token_id"])]
        return Cut(columns, starts, before[: len(starts)], (), len(starts) > 1)
    assert choosing is not None
    return _chosen(columns, starts, before, windowing, max_rows, choosing)


def _window_starts(
    n_tokens: int, beside: Mapping[str, np.ndarray], document: Document, windowing: Windowing
) -> np.ndarray:
    """Where windows begin among a document's tokens."""
    per_window = windowing.text_tokens_per_window
    if "medium" not in beside:
        return np.arange(0, n_tokens, per_window)
    try:
        return np.array(window_breaks(beside["medium"][:n_tokens], per_window))
    except ValueError as error:
        number, length = error.args
        medium = document.media[number].name
        raise InvalidInputError(
            f"The document {document.title or medium!r} holds {medium}, which "
            f"takes {length:,} tokens, and a window has room for {per_window:,}. Give a context_size of at least "
            f"{length + windowing.context_size - per_window:,}."
        ) from error


def _chosen(
    columns: Mapping[str, np.ndarray],
    window_starts: np.ndarray,
    offsets: np.ndarray,
    windowing: Windowing,
    max_rows: int | None,
    choosing: Choosing,
) -> Cut:
    """The rows that a selection chooses among all tokens of a document.

    Args:
        columns: of all tokens.
        window_starts: where windows begin among them.
        offsets: place of each window's first token in the document, BOS not counted.
        windowing, max_rows, choosing: as of `cut_document`.
    """
    window, position = columns["sequence"], columns["position"]
    document_position = offsets[window] + np.maximum(position - (windowing.bos_token_id is not None), 0)
    tokens = WindowTokens(
        columns["token_id"], position, document_position, columns["flags"], columns.get("role"), columns.get("kind")
    )
    chosen = np.flatnonzero(choosing.selection.chosen(tokens, choosing.matches))[:max_rows]
    kept, starts, numbers = np.unique(window[chosen], return_index=True, return_inverse=True)
    ends = np.append(window_starts[1:], len(window))
    parts = [slice(*edges) for edges in zip(window_starts[kept].tolist(), ends[kept].tolist(), strict=True)]
    whole = [name for name in columns if name == "token_id" or name in CHAT_COLUMNS]
    windows = [{name: columns[name][part] for name in whole} for part in parts]
    media = [_media_in(columns, part) for part in parts] if "modality" in columns else ()
    chosen_columns = {name: values[chosen] for name, values in columns.items()}
    chosen_columns["sequence"] = numbers.astype(TOKEN_COLUMNS["sequence"])
    return Cut(chosen_columns, starts, offsets[kept], windows, bool(window[-1] > 0), media)


def _media_in(columns: Mapping[str, np.ndarray], window: slice) -> list[tuple[int, int, int]]:
    """The media of a window: number in the document, place of the first soft token in the window, soft tokens."""
    medium = np.where(columns["modality"][window] > 0, columns["medium"][window], -1)
    numbers, first, counts = np.unique(medium, return_index=True, return_counts=True)
    found = zip(numbers.tolist(), first.tolist(), counts.tolist(), strict=True)
    return [one for one in found if one[0] >= 0]


def _flags(tokens: np.ndarray, position: np.ndarray, document: Document, windowing: Windowing) -> np.ndarray:
    flags = np.full(len(tokens), RowFlag.HELD_OUT if is_held_out(document) else 0, np.uint8)
    special = np.isin(tokens, np.array(sorted(windowing.special_token_ids), np.int64))
    if windowing.bos_token_id is not None:
        special &= position > 0
        flags[position == 0] |= np.uint8(RowFlag.BOS)
    flags[special] |= np.uint8(RowFlag.SPECIAL)
    return flags


def _media_flags(flags: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """With the bits of soft tokens, which stand for what is seen or heard and are no special tokens."""
    soft = modality > 0
    flags = np.where(soft, flags & ~np.uint8(RowFlag.SPECIAL), flags)
    flags[modality == MODALITIES.index("image")] |= np.uint8(RowFlag.IMAGE)
    flags[modality == MODALITIES.index("audio")] |= np.uint8(RowFlag.AUDIO)
    return flags
