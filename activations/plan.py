"""From documents to rows: the plan of a capture.

1. A document becomes consecutive windows that do not overlap: BOS (where the tokenizer has one) and up to
   `context_size - 1` of its tokens. The last one may be shorter; a window never holds two documents.
2. The windows' tokens, in order, are the rows. Row group g is the rows `[g R, (g + 1) R)`, whatever windows they
   belong to. A sequence (window) or document is listed in the group in which it starts.
3. Each planned group says where the next one goes on (`PlanState`), so that a plan can be continued at any group, and
   with another text at the end: then a last group that is not full is planned again with what follows its rows.

How a group's windows are run is in `activations.batching`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from activations.source import RowFlag
from activations.text import Document, TextSource, is_held_out

__all__ = ["TOKEN_COLUMNS", "PlanState", "PlannedGroup", "Windowing", "plan_groups"]

ENCODE_DOCUMENTS = 64
ENCODE_CHARACTERS = 2**18
TOKEN_COLUMNS = {"token_id": "int32", "sequence": "int64", "position": "int32", "flags": "uint8"}
"""Per-token columns and their dtypes; `position` counts from the window's start, BOS included."""


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


@dataclass(frozen=True)
class PlanState:
    """Where planning stands at the end of a row group."""

    ordinal: int = 0
    """Ordinal in the text source of the document that the next row belongs to."""
    rows_done: int = 0
    """Rows of that document that lie in earlier groups."""
    n_rows: int = 0
    n_sequences: int = 0
    """Sequences started so far; the same for the counts below."""
    n_documents: int = 0
    windowed_documents: int = 0
    """Documents that were longer than a window."""
    empty_documents: int = 0
    """Documents without text, which are left out."""
    complete: bool = False
    """Whether there are no more rows."""


class PlannedGroup(NamedTuple):
    """The rows of one row group."""

    group: int
    row_start: int
    row_stop: int
    columns: Mapping[str, np.ndarray]
    """By name as in `TOKEN_COLUMNS`, each `(row_stop - row_start,)`."""
    sequences: Mapping[str, list[Any]]
    """Columns `sequence, document, start_row, n_rows, document_offset` (in tokens)."""
    documents: Mapping[str, list[Any]]
    """Columns `document, title, source, language, license, extra, n_tokens, held_out`."""
    state: PlanState


@dataclass
class _Tally:
    """Documents without text met so far."""

    count: int


class _DocumentRows(NamedTuple):
    """A document, tokenised and cut into windows."""

    document: Document
    ordinal: int
    number: int
    """Number among the documents that have text."""
    row_start: int
    first_sequence: int
    window_starts: np.ndarray
    """First row of each window, relative to `row_start`."""
    columns: Mapping[str, np.ndarray]
    n_tokens: int
    windowed_before: int
    empty_before: int

    @property
    def n_rows(self) -> int:
        return len(self.columns["token_id"])

    @property
    def is_windowed(self) -> bool:
        return len(self.window_starts) > 1


def plan_groups(
    text: TextSource,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    windowing: Windowing,
    state: PlanState = PlanState(),  # frozen
    tail: PlannedGroup | None = None,
) -> Iterator[PlannedGroup]:
    """Row groups from `state` to the end of the text or `max_tokens`, the last one with `state.complete`.

    Args:
        text: where the documents come from.
        encode: token ids (int32) of each text, without special tokens added.
        windowing: how they are cut.
        state: of the last group that is planned already.
        tail: that group, where it is not full and is to be filled up with this text.
    """
    size = windowing.rows_per_group
    pending: list[_DocumentRows] = []
    row = state.n_rows if tail is None else tail.row_start
    empty = _Tally(state.empty_documents)
    for document in _document_rows(text, encode, windowing, state, empty):
        pending.append(document)
        # A group is emitted once a row after it is known: only then is it known not to be the last.
        while document.row_start + document.n_rows > row + size:
            yield _following(tail, _planned_group(pending, row, row + size, size, complete=False))
            row, tail = row + size, None
            pending = [kept for kept in pending if kept.row_start + kept.n_rows > row]
    if pending:
        end = pending[-1].row_start + pending[-1].n_rows
        last = _following(tail, _planned_group(pending, row, end, size, complete=True))
        yield last._replace(state=replace(last.state, empty_documents=empty.count))


def _following(tail: PlannedGroup | None, planned: PlannedGroup) -> PlannedGroup:
    """A planned group with the rows and tables of `tail`, its beginning, in front."""
    if tail is None:
        return planned
    return planned._replace(
        columns={name: np.concatenate([tail.columns[name], values]) for name, values in planned.columns.items()},
        sequences={name: [*tail.sequences[name], *values] for name, values in planned.sequences.items()},
        documents={name: [*tail.documents[name], *values] for name, values in planned.documents.items()},
    )


def _document_rows(
    text: TextSource,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    windowing: Windowing,
    state: PlanState,
    empty: "_Tally",
) -> Iterator[_DocumentRows]:
    """The documents from `state` on that have text, until `max_tokens` rows are there."""
    resumed = state.rows_done > 0
    row = state.n_rows - state.rows_done
    sequence = state.n_sequences - -(-state.rows_done // windowing.context_size)
    number = state.n_documents - resumed
    windowed = state.windowed_documents
    for ordinal, document, tokens in _encoded(text, encode, state.ordinal):
        if len(tokens) == 0:
            empty.count += 1
            continue
        left = None if windowing.max_tokens is None else windowing.max_tokens - row
        if left is not None and left <= 0:
            return
        starts, columns, n_tokens = _cut(tokens[: windowing.max_document_tokens], document, windowing, sequence, left)
        if resumed and ordinal == state.ordinal:
            windowed -= len(starts) > 1  # the state counts it already
        yield _DocumentRows(document, ordinal, number, row, sequence, starts, columns, n_tokens, windowed, empty.count)
        windowed += len(starts) > 1
        row += len(columns["token_id"])
        sequence += len(starts)
        number += 1


def _encoded(
    text: TextSource, encode: Callable[[Sequence[str]], list[np.ndarray]], start: int
) -> Iterator[tuple[int, Document, np.ndarray]]:
    """Each document with its ordinal and tokens, encoded some documents at a time."""
    some: list[Document] = []
    characters = 0
    ordinal = start

    def flush() -> Iterator[tuple[int, Document, np.ndarray]]:
        texts = [document.text for document in some if document.text.strip()]
        encoded = iter(encode(texts) if texts else [])
        for offset, document in enumerate(some):
            tokens = next(encoded) if document.text.strip() else np.empty(0, np.int32)
            yield ordinal + offset, document, tokens

    for document in text.documents(start):
        some.append(document)
        characters += len(document.text)
        if len(some) >= ENCODE_DOCUMENTS or characters >= ENCODE_CHARACTERS:
            yield from flush()
            ordinal += len(some)
            some, characters = [], 0
    yield from flush()


def _cut(
    tokens: np.ndarray, document: Document, windowing: Windowing, first_sequence: int, max_rows: int | None
) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """Window starts (rows), token columns and number of tokens of a document, cut after `max_rows` rows."""
    per_window = windowing.text_tokens_per_window
    n_windows = -(-len(tokens) // per_window)
    starts = np.arange(n_windows) * windowing.context_size
    if windowing.bos_token_id is not None:
        tokens = np.insert(tokens, np.arange(n_windows) * per_window, windowing.bos_token_id)
    tokens = tokens[:max_rows]
    starts = starts[starts < len(tokens)]
    row = np.arange(len(tokens))
    position = row % windowing.context_size
    flags = np.full(len(tokens), RowFlag.HELD_OUT if is_held_out(document) else 0, np.uint8)
    special = np.isin(tokens, np.array(sorted(windowing.special_token_ids), np.int64))
    n_tokens = len(tokens)
    if windowing.bos_token_id is not None:
        special &= position > 0
        flags[position == 0] |= np.uint8(RowFlag.BOS)
        n_tokens -= len(starts)
    flags[special] |= np.uint8(RowFlag.SPECIAL)
    columns = {
        "token_id": tokens,
        "sequence": first_sequence + row // windowing.context_size,
        "position": position,
        "flags": flags,
    }
    return starts, {name: columns[name].astype(dtype) for name, dtype in TOKEN_COLUMNS.items()}, n_tokens


def _planned_group(pending: list[_DocumentRows], start: int, stop: int, size: int, complete: bool) -> PlannedGroup:
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_COLUMNS}
    sequences: dict[str, list[Any]] = {
        name: [] for name in ("sequence", "document", "start_row", "n_rows", "document_offset")
    }
    documents: dict[str, list[Any]] = {
        name: [] for name in ("document", "title", "source", "language", "license", "extra", "n_tokens", "held_out")
    }
    for item in pending:
        first, last = max(0, start - item.row_start), min(item.n_rows, stop - item.row_start)
        for name, values in columns.items():
            values.append(item.columns[name][first:last])
        if item.row_start >= start and last > 0:
            _list_document(item, documents)
        _list_sequences(item, first, last, sequences)
    return PlannedGroup(
        group=start // size,
        row_start=start,
        row_stop=stop,
        columns={name: np.concatenate(values) for name, values in columns.items()},
        sequences=sequences,
        documents=documents,
        state=_state_at(pending, stop, complete),
    )


def _list_document(item: _DocumentRows, table: dict[str, list[Any]]) -> None:
    document = item.document
    table["document"].append(item.number)
    for name in ("title", "source", "language", "license"):
        table[name].append(getattr(document, name))
    table["extra"].append(json.dumps(document.extra, sort_keys=True) if document.extra else "")
    table["n_tokens"].append(item.n_tokens)
    table["held_out"].append(is_held_out(document))


def _list_sequences(item: _DocumentRows, first: int, last: int, table: dict[str, list[Any]]) -> None:
    ends = np.append(item.window_starts[1:], item.n_rows)
    has_bos = item.columns["flags"][0] & RowFlag.BOS
    for window, (start, end) in enumerate(zip(item.window_starts.tolist(), ends.tolist(), strict=True)):
        if first <= start < last:
            table["sequence"].append(item.first_sequence + window)
            table["document"].append(item.number)
            table["start_row"].append(item.row_start + start)
            table["n_rows"].append(end - start)
            table["document_offset"].append(start - window if has_bos else start)


def _state_at(pending: list[_DocumentRows], stop: int, complete: bool) -> PlanState:
    last = next(item for item in reversed(pending) if item.row_start < stop)
    started = int(np.searchsorted(last.window_starts, stop - last.row_start))
    following = next((item for item in pending if item.row_start + item.n_rows > stop), None)
    return PlanState(
        ordinal=last.ordinal + 1 if following is None else following.ordinal,
        rows_done=0 if following is None else max(0, stop - following.row_start),
        n_rows=stop,
        n_sequences=last.first_sequence + started,
        n_documents=last.number + 1,
        windowed_documents=last.windowed_before + last.is_windowed,
        empty_documents=last.empty_before if following is None else following.empty_before,
        complete=complete,
    )
