"""From documents to rows: the plan of a capture.

1. A document becomes consecutive windows that do not overlap: BOS (where the tokenizer has one) and up to
   `context_size - 1` of its tokens. The last one may be shorter, and one before an image or a sound that would not fit
   into the rest of it; a window never holds two documents.
2. The windows' tokens, in order, are the rows; where a selection chooses among them (`activations.selection`), those
   that it chooses, and a window or document of which it chooses none is left out. Row group g is the rows
   `[g R, (g + 1) R)`, whatever windows they belong to. A sequence (window) or document is listed in the group in which
   it starts.
3. Each planned group says where the next one goes on (`PlanState`), so that a plan can be continued at any group, and
   with another text at the end: then a last group that is not full is planned again with what follows its rows.

How a document is cut is in `activations.cutting`, how a group's windows are run in `activations.batching`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from activations.chats import CHAT_COLUMNS
from activations.cutting import TOKEN_COLUMNS, Cut, Windowing, cut_document
from activations.media import MEDIA_TABLE, MediumContent
from activations.selection import Choosing
from activations.source import RowFlag
from activations.text import Document, TextSource, is_held_out

__all__ = [
    "TOKEN_COLUMNS",
    "CutDocument",
    "PlanState",
    "PlannedGroup",
    "Windowing",
    "group_documents",
    "plan_groups",
]

ENCODE_DOCUMENTS = 64
FIRST_CHARACTERS, ENCODE_CHARACTERS = 2**15, 2**18
"""Text that is encoded at once: little at first, so that the model need not wait for it, then more."""
MEDIUM_CHARACTERS = 2**13
"""What a medium counts for among these."""


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
    """Documents without text, or without a token that is chosen, which are left out."""
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
    windows: Mapping[str, list[Any]] = {}  # nobody writes to it
    """Columns `sequence, tokens` and, of chats, `roles, kinds, messages`: whole windows, where only some of their
    tokens are rows, or media among them."""
    media: Mapping[str, list[Any]] = {}  # nobody writes to it
    """Columns as in `MEDIA_TABLE`: the media of these windows."""


@dataclass
class _Tally:
    """Documents met so far that have no rows."""

    count: int


class _DocumentRows(NamedTuple):
    """A document, tokenised and cut into windows."""

    document: Document
    ordinal: int
    number: int
    """Number among the documents that have rows."""
    row_start: int
    first_sequence: int
    cut: Cut
    columns: Mapping[str, np.ndarray]
    windowed_before: int
    empty_before: int
    media: Sequence[MediumContent]

    @property
    def n_rows(self) -> int:
        return len(self.columns["token_id"])

    @property
    def n_tokens(self) -> int:
        """Rows but BOS."""
        return int(((self.columns["flags"] & RowFlag.BOS) == 0).sum())


class CutDocument(NamedTuple):
    """A document that is about to be cut into windows."""

    document: Document
    ordinal: int
    """Place in the text source."""
    has_tokens: bool
    cut: "_CutTo"
    """Makes its rows, at most so many; called once, and only if they are wanted."""
    media: Sequence[MediumContent] = ()


class _CutTo(Protocol):
    def __call__(self, *, max_rows: int | None) -> Cut | None: ...


class _Encoded(NamedTuple):
    document: Document
    ordinal: int
    tokens: np.ndarray
    beside: Mapping[str, np.ndarray]
    """Of a chat `CHAT_COLUMNS`, of a text with media `MEDIA_COLUMNS`."""
    media: Sequence[MediumContent]


def plan_groups(
    text: TextSource,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    windowing: Windowing,
    state: PlanState = PlanState(),  # frozen
    tail: PlannedGroup | None = None,
    choosing: Choosing | None = None,
) -> Iterator[PlannedGroup]:
    """Row groups from `state` to the end of the text or `max_tokens`, the last one with `state.complete`.

    Args:
        text: where the documents come from.
        encode: token ids (int32) of each text, without special tokens added.
        windowing: how they are cut.
        state: of the last group that is planned already.
        tail: that group, where it is not full and is to be filled up with this text.
        choosing: which tokens become rows, and how chats are encoded; None for all tokens of plain text.
    """

    def cuts() -> Iterator[CutDocument]:
        for document, ordinal, tokens, beside, media in _encoded(text, encode, state.ordinal, choosing):
            kept = tokens[: _limit(windowing.max_document_tokens, beside)]
            cut = partial(cut_document, kept, beside, document, windowing, choosing=choosing)
            yield CutDocument(document, ordinal, len(tokens) > 0, cut, media)

    return group_documents(cuts(), windowing.rows_per_group, windowing.max_tokens, state, tail)


def group_documents(
    documents: Iterator[CutDocument],
    size: int,
    max_rows: int | None,
    state: PlanState = PlanState(),  # frozen
    tail: PlannedGroup | None = None,
) -> Iterator[PlannedGroup]:
    """Row groups of `size` rows from `state` to the end of the documents or `max_rows`, as `plan_groups`.

    Args:
        documents: from the one on that `state.ordinal` says.
        size: rows of a group.
        max_rows: rows in all, at most.
        state, tail: as of `plan_groups`.
    """
    pending: list[_DocumentRows] = []
    row = state.n_rows if tail is None else tail.row_start
    empty = _Tally(state.empty_documents)
    for document in _document_rows(documents, max_rows, state, empty):
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
        windows={name: [*tail.windows[name], *values] for name, values in planned.windows.items()},
        media={name: [*tail.media[name], *values] for name, values in planned.media.items()},
    )


def _document_rows(
    documents: Iterator[CutDocument], max_rows: int | None, state: PlanState, empty: "_Tally"
) -> Iterator[_DocumentRows]:
    """The documents from `state` on that have rows, until `max_rows` rows are there."""
    resumed = state.rows_done > 0
    row = state.n_rows - state.rows_done
    sequence = state.n_sequences
    number = state.n_documents - resumed
    windowed = state.windowed_documents
    for document, ordinal, has_tokens, cut_to, media in documents:
        left = None if max_rows is None else max_rows - row
        if has_tokens and left is not None and left <= 0:
            return
        cut = cut_to(max_rows=left)
        if cut is None or not len(cut.window_starts):
            empty.count += 1
            continue
        if resumed and ordinal == state.ordinal:  # the state counts it, and what of it is done, already
            windowed -= cut.is_windowed
            sequence -= int(np.searchsorted(cut.window_starts, state.rows_done))
        columns = {**cut.columns, "sequence": sequence + cut.columns["sequence"]}
        yield _DocumentRows(document, ordinal, number, row, sequence, cut, columns, windowed, empty.count, media)
        windowed += cut.is_windowed
        row += len(columns["token_id"])
        sequence += len(cut.window_starts)
        number += 1


def _limit(max_tokens: int | None, beside: Mapping[str, np.ndarray]) -> int | None:
    """Tokens of a document that are used, at most: no medium is cut in two."""
    medium = beside.get("medium")
    if max_tokens is None or medium is None or max_tokens >= len(medium) or medium[max_tokens] < 0:
        return max_tokens
    return max_tokens - int((medium[:max_tokens] == medium[max_tokens]).sum())


def _encoded(
    text: TextSource,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    start: int,
    choosing: Choosing | None,
) -> Iterator[_Encoded]:
    """Each document with its ordinal and tokens, encoded some documents at a time."""
    some: list[Document] = []
    characters, enough = 0, FIRST_CHARACTERS
    ordinal = start

    def flush() -> Iterator[_Encoded]:
        written = [document for document in some if not document.is_empty]
        encoded = iter(_tokens_of(written, encode, choosing) if written else ())
        for offset, document in enumerate(some):
            tokens, beside, media = (np.empty(0, np.int32), {}, ()) if document.is_empty else next(encoded)
            yield _Encoded(document, ordinal + offset, tokens, beside, media)

    for document in text.documents(start):
        some.append(document)
        characters += len(document.text) + MEDIUM_CHARACTERS * len(document.media)
        if len(some) >= ENCODE_DOCUMENTS or characters >= enough:
            yield from flush()
            ordinal += len(some)
            some, characters, enough = [], 0, min(ENCODE_CHARACTERS, 2 * enough)
    yield from flush()


def _tokens_of(
    documents: Sequence[Document], encode: Callable[[Sequence[str]], list[np.ndarray]], choosing: Choosing | None
) -> Sequence[tuple[np.ndarray, Mapping[str, np.ndarray], Sequence[MediumContent]]]:
    if choosing is not None and choosing.encode_media is not None:
        return choosing.encode_media(documents)
    if choosing is not None and choosing.encode_chats is not None:
        chats = choosing.encode_chats([document.chat for document in documents])
        return [(chat.token_id, {name: getattr(chat, name) for name in CHAT_COLUMNS}, ()) for chat in chats]
    return [(tokens, {}, ()) for tokens in encode([document.text for document in documents])]


def _planned_group(pending: list[_DocumentRows], start: int, stop: int, size: int, complete: bool) -> PlannedGroup:
    columns: dict[str, list[np.ndarray]] = {name: [] for name in pending[0].columns}
    sequences: dict[str, list[Any]] = {
        name: [] for name in ("sequence", "document", "start_row", "n_rows", "document_offset")
    }
    documents: dict[str, list[Any]] = {
        name: [] for name in ("document", "title", "source", "language", "license", "extra", "n_tokens", "held_out")
    }
    names = ("sequence", "tokens", *(f"{name}s" for name in CHAT_COLUMNS if name in columns))
    windows: dict[str, list[Any]] = {name: [] for name in names} if pending[0].cut.windows else {}
    media: dict[str, list[Any]] = {name: [] for name in MEDIA_TABLE if "modality" in columns}
    for item in pending:
        first, last = max(0, start - item.row_start), min(item.n_rows, stop - item.row_start)
        for name, values in columns.items():
            values.append(item.columns[name][first:last])
        if item.row_start >= start and last > 0:
            _list_document(item, documents)
        _list_sequences(item, first, last, sequences, windows, media)
    return PlannedGroup(
        group=start // size,
        row_start=start,
        row_stop=stop,
        columns={name: np.concatenate(values) for name, values in columns.items()},
        sequences=sequences,
        documents=documents,
        state=_state_at(pending, stop, complete),
        windows=windows,
        media=media,
    )


def _list_document(item: _DocumentRows, table: dict[str, list[Any]]) -> None:
    document = item.document
    table["document"].append(item.number)
    for name in ("title", "source", "language", "license"):
        table[name].append(getattr(document, name))
    table["extra"].append(json.dumps(document.extra, sort_keys=True) if document.extra else "")
    table["n_tokens"].append(item.n_tokens)
    table["held_out"].append(is_held_out(document))


def _list_sequences(
    item: _DocumentRows,
    first: int,
    last: int,
    table: dict[str, list[Any]],
    windows: dict[str, list[Any]],
    media: dict[str, list[Any]],
) -> None:
    starts = item.cut.window_starts
    ends = np.append(starts[1:], item.n_rows)
    for window, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if first <= start < last:
            table["sequence"].append(item.first_sequence + window)
            table["document"].append(item.number)
            table["start_row"].append(item.row_start + start)
            table["n_rows"].append(end - start)
            table["document_offset"].append(int(item.cut.window_offsets[window]))
            if windows:
                windows["sequence"].append(item.first_sequence + window)
                for name, values in item.cut.windows[window].items():
                    windows["tokens" if name == "token_id" else f"{name}s"].append(values)
            for number, position, n_tokens in item.cut.media[window] if media else ():
                placed = (item.first_sequence + window, position, n_tokens, item.number, number, *item.media[number])
                for name, value in zip(MEDIA_TABLE, placed, strict=True):
                    media[name].append(value)


def _state_at(pending: list[_DocumentRows], stop: int, complete: bool) -> PlanState:
    last = next(item for item in reversed(pending) if item.row_start < stop)
    started = int(np.searchsorted(last.cut.window_starts, stop - last.row_start))
    following = next((item for item in pending if item.row_start + item.n_rows > stop), None)
    return PlanState(
        ordinal=last.ordinal + 1 if following is None else following.ordinal,
        rows_done=0 if following is None else max(0, stop - following.row_start),
        n_rows=stop,
        n_sequences=last.first_sequence + started,
        n_documents=last.number + 1,
        windowed_documents=last.windowed_before + last.cut.is_windowed,
        empty_documents=last.empty_before if following is None else following.empty_before,
        complete=complete,
    )
