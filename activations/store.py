"""`ActivationStore`: activations of a model on disk, rows = tokens, read and verified.

What is read is a snapshot of what was committed when the store was opened (`refresh` takes a new one). Opening and
reading never write. `activations.layout` shows what lies where; `activations.writer` fills it.
`activations.reading` reads the objects of its row groups.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from activations.arrays import ArrayLayout, open_zarr
from activations.errors import IntegrityError, InvalidInputError, UnknownNameError
from activations.layout import FORMAT, MEDIA, PLAN, StoreLayout, appended_from, identity_fingerprint
from activations.ledger import Ledger
from activations.manifest import ID_LENGTH, has_its_digest, read_manifest
from activations.media import MEDIA_TABLE, PlacedMedium
from activations.reading import GroupReader
from activations.source import ActivationBatch, bf16_to_float32
from activations.spec import CaptureSpec, StorageDtype
from activations.storage import Storage, storage_at

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ActivationStore", "Fault", "TokenRows"]

READ_AHEAD_BYTES = 2**24


class TokenRows(NamedTuple):
    """Per-token columns of some rows, each `(n,)`."""

    token_id: np.ndarray
    """int32."""
    sequence: np.ndarray
    """int64: number of the window."""
    position: np.ndarray
    """int32: place within the window, BOS included."""
    flags: np.ndarray
    """uint8: `RowFlag` bits."""


class Fault(NamedTuple):
    """Something on disk that is not what the ledger says."""

    hook: str
    """The hook, or the column (`tokens/flags`, `documents`)."""
    row_start: int
    row_stop: int
    object: str
    """Path below the store."""
    problem: str

    def __str__(self) -> str:
        return f"{self.object} ({self.hook}, rows {self.row_start:,} to {self.row_stop:,}): {self.problem}"


class ActivationStore:
    """A store opened for reading; satisfies `ActivationSource`. Use `ActivationStore.open`."""

    def __init__(self, storage: Storage, manifest: Mapping[str, Any]) -> None:
        self.storage = storage
        self.path = storage.location
        """The folder, or the address in an object store."""
        self.manifest = manifest
        self.spec = _spec_of(storage, manifest)
        self.layout = StoreLayout.of(manifest)
        self._reader = GroupReader(storage, self.layout, Ledger(storage))
        self._manifest_fault: str | None = None

    @classmethod
    def open(cls, path: str | Path | Storage) -> "ActivationStore":
        """Open the store in a folder, or at an address `s3://BUCKET/NAME` (`activations.storage`).

        Raises:
            UnknownNameError: there is none.
            InvalidInputError: the folder holds another artefact, or one of a newer version.
            IntegrityError: manifest or ledger are damaged.
        """
        storage = storage_at(path)
        return cls(storage, read_manifest(storage, FORMAT))

    def refresh(self) -> None:
        """See what was committed meanwhile."""
        self.manifest = read_manifest(self.storage, FORMAT)
        self._manifest_fault = None
        self._reader.refresh()

    def use_ledger(self, ledger: Ledger) -> None:
        """See what a writer in this process commits, as it does."""
        self._reader.ledger = ledger

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def id(self) -> str:
        """The first 12 hex digits of the fingerprint."""
        return self.fingerprint[:ID_LENGTH]

    @property
    def dtype(self) -> StorageDtype:
        return self.spec.dtype

    @property
    def hooks(self) -> tuple[str, ...]:
        """Canonical names of the hooks that have a capture in the ledger, complete or not."""
        return tuple(self._capture_of)

    def resolve_hook(self, name: str) -> str:
        """The stored name of a hook, which may be given by the alias it was captured under; raises with near misses."""
        if name in self._capture_of:
            return name
        for declaration in self.ledger.declarations.values():
            if name in declaration.get("aliases", {}):
                return str(declaration["aliases"][name])
        raise UnknownNameError("hook", name, self.hooks, hint=f"(in the store {self.path})")

    def hook_shape(self, name: str) -> tuple[int, ...]:
        hook = self.resolve_hook(name)
        return tuple(self.ledger.declarations[self._capture_of[hook]]["hooks"][hook]["shape"])

    @property
    def n_rows(self) -> int:
        """Committed rows: those of the hook that has most."""
        return max(map(self.rows_of, self.hooks), default=0)

    def rows_of(self, hook: str) -> int:
        """Committed rows of one hook; less than `n_rows` while it is being added to a store that has others."""
        capture = self._capture_of[self.resolve_hook(hook)]
        return min(self.ledger.committed_rows(PLAN), self.ledger.committed_rows(capture))

    @property
    def plan_complete(self) -> bool:
        """Whether all of the text is tokenised, what was appended included."""
        groups = self.ledger.committed_groups(PLAN)
        if groups == 0 or self.ledger.committed_rows(PLAN) <= appended_from(self.manifest):
            return False
        return bool(self.ledger.records[PLAN][groups - 1].extra["complete"])

    @property
    def complete(self) -> bool:
        """Whether every planned row of every hook is there."""
        return bool(self.hooks) and self.is_complete_for(self.hooks)

    def is_complete_for(self, hooks: Sequence[str]) -> bool:
        """Whether the text is captured to its end for all of these hooks (names as stored, or aliases)."""
        planned = self.ledger.committed_rows(PLAN)
        try:
            return self.plan_complete and all(self.rows_of(hook) == planned for hook in hooks)
        except UnknownNameError:
            return False

    def capture_of(self, hook: str) -> str:
        """The ledger's id of the pass that captured a hook."""
        return self._capture_of[self.resolve_hook(hook)]

    def read(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Activations of the rows `[start, stop)`, `(stop - start, *feature_shape)`, in the storage dtype (bfloat16
        as uint16 bits), verified.

        Raises:
            InvalidInputError: rows that are not committed.
            IntegrityError: the bytes on disk are not what was written; hook, rows and object are named.
        """
        hook = self.resolve_hook(hook)
        layout = self.layout.hook(self.hook_shape(hook))
        self._require_rows(hook, start, stop)
        return self._reader.raw(self._capture_of[hook], self.layout.hook_array(hook), layout, start, stop)

    def read_float32(self, hook: str, start: int, stop: int) -> np.ndarray:
        """As `read`, converted to float32 (exact for bfloat16 and float16)."""
        return self._as_float32(self.read(hook, start, stop))

    def read_rows(self, hook: str, rows: np.ndarray) -> np.ndarray:
        """Activations of scattered rows, `(len(rows), *feature_shape)`, verified; as `read` otherwise."""
        hook = self.resolve_hook(hook)
        shape = self.hook_shape(hook)
        layout = self.layout.hook(shape)
        rows = np.asarray(rows, np.int64)
        self._require_rows(hook, int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1)
        span = int(rows[-1] - rows[0]) + 1 if len(rows) else 0
        if 0 < span <= layout.rows_per_chunk and (np.diff(rows) > 0).all():
            # What shuffling asks for: some rows of one block. The rest of this function would copy them twice.
            piece = self.read(hook, int(rows[0]), int(rows[-1]) + 1)
            return piece if span == len(rows) else piece.take(rows - rows[0], axis=0)
        out = np.empty((len(rows), *shape), layout.storage_dtype)
        order = np.argsort(rows, kind="stable")
        chunks = rows[order] // layout.rows_per_chunk

        def read(places: np.ndarray) -> None:
            first, last = int(rows[places[0]]), int(rows[places[-1]])
            piece = self.read(hook, first, last + 1)
            out[places] = piece.take(rows[places] - first, axis=0)

        if len(rows):
            for _ in self.storage.map(read, np.split(order, np.flatnonzero(np.diff(chunks)) + 1)):
                pass
        return out

    def block_rows(self, hook: str) -> int:
        """Rows of an inner chunk: aligned stretches of so many rows are read without reading anything twice."""
        return self.layout.hook(self.hook_shape(hook)).rows_per_chunk

    def norms(self, hook: str, start: int, stop: int) -> np.ndarray:
        """L2 norm of each row over all feature dimensions, before rounding to the storage dtype; float32."""
        hook = self.resolve_hook(hook)
        self._require_rows(hook, start, stop)
        return self._reader.raw(self._capture_of[hook], self.layout.norm_array(hook), self.layout.norm, start, stop)

    def rows(self, start: int, stop: int) -> TokenRows:
        """Token columns of the rows `[start, stop)`; planned rows may be read before their activations are there."""
        self._require(PLAN, "tokens", start, stop)
        return TokenRows(*(self._reader.column(column, start, stop) for column in TokenRows._fields))

    def flags(self, start: int, stop: int) -> np.ndarray:
        """`RowFlag` bits of the rows `[start, stop)`, uint8."""
        self._require(PLAN, "tokens", start, stop)
        return self._reader.column("flags", start, stop)

    @property
    def token_columns(self) -> dict[str, ArrayLayout]:
        """Layouts of the per-token columns by name; `column` reads them."""
        return {name.rpartition("/")[2]: layout for name, layout in self.layout.plan_arrays().items()}

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """One per-token column of the rows `[start, stop)`; raises `UnknownNameError`."""
        if name not in self.token_columns:
            raise UnknownNameError("token column", name, self.token_columns)
        self._require(PLAN, "tokens", start, stop)
        return self._reader.column(name, start, stop)

    def sequences(self) -> "pd.DataFrame":
        """The windows: `sequence, document, start_row, n_rows, document_offset`.

        The offset is in tokens, no BOS counted; what reaches past the committed rows is cut.
        """
        table = self._read_table("sequences")
        table = table[table["start_row"] < self.n_rows].reset_index(drop=True)
        table["n_rows"] = table["n_rows"].clip(upper=self.n_rows - table["start_row"])
        return table

    def window_tokens(self, sequences: Sequence[int]) -> list[np.ndarray]:
        """All token ids of these windows (numbers as in `sequences()`), int32, those included that are no rows because
        the store's selection left them out. A window that reaches past the planned rows is cut there."""
        if not self.layout.has_windows:
            table = self._read_table("sequences").set_index("sequence")
            spans = ((int(table["start_row"][number]), int(table["n_rows"][number])) for number in sequences)
            end = self.ledger.committed_rows(PLAN)
            return [self.rows(start, min(start + n_rows, end)).token_id for start, n_rows in spans]
        tokens = []
        for number in map(int, sequences):
            first, windows = self._reader.windows_that_start_in(self._group_of_window(number))
            tokens.append(windows[number - first])
        return tokens

    @property
    def has_media(self) -> bool:
        """Whether the text has images and sounds."""
        return self.layout.has_media

    def window_media(self, sequences: Sequence[int]) -> list[tuple[PlacedMedium, ...]]:
        """The media of these windows (numbers as in `sequences()`), in the order of their tokens, with the content of
        their files."""
        names = PlacedMedium._fields
        found: dict[int, list[PlacedMedium]] = {int(number): [] for number in sequences}
        for group in sorted({self._group_of_window(number) for number in found}) if self.has_media else ():
            table = self.table_piece(MEDIA, group)
            numbers = table.column("sequence").to_pylist()
            values = zip(*(table.column(name).to_pylist() for name in names), strict=True)
            for number, one in zip(numbers, values, strict=True):
                if number in found:
                    found[number].append(PlacedMedium(*one))
        by_place = (sorted(found[int(number)], key=lambda one: one.position) for number in sequences)
        return [tuple(media) for media in by_place]

    def media(self, content: bool = False) -> "pd.DataFrame":
        """The images and sounds: the columns of `activations.media.MEDIA_TABLE`, `content` only if that is asked for.

        Raises:
            InvalidInputError: the text has no media.
        """
        import pyarrow

        if not self.has_media:
            raise InvalidInputError(
                f"{self.path} has no images or sounds: its text was captured without a column of media."
            )
        names = [name for name in MEDIA_TABLE if content or name != "content"]
        groups = range(self.ledger.committed_groups(PLAN))
        pieces = [self.table_piece(MEDIA, group).select(names) for group in groups]
        table = pyarrow.concat_tables(pieces).to_pandas() if pieces else None
        if table is None:
            raise InvalidInputError(f"{self.path} has no committed rows yet.")
        sequences = self.sequences()
        return table[table["sequence"].isin(sequences["sequence"])].reset_index(drop=True)

    def media_contents(self) -> Iterator[tuple[str, bytes]]:
        """Digest and file of each image and sound, a row group's at a time; a file that several documents show comes
        once for each row group."""
        for group in range(self.ledger.committed_groups(PLAN)) if self.has_media else ():
            piece = self.table_piece(MEDIA, group)
            yield from dict(
                zip(piece.column("digest").to_pylist(), piece.column("content").to_pylist(), strict=True)
            ).items()

    def _group_of_window(self, number: int) -> int:
        """The row group in which a window starts."""
        records, groups = self.ledger.records[PLAN], range(self.ledger.committed_groups(PLAN))
        return bisect_right(groups, number, key=lambda group: records[group].extra["n_sequences"])

    def documents(self) -> "pd.DataFrame":
        """The documents: `document, title, source, language, license, extra, n_tokens, held_out`.

        `extra` is a JSON object of further columns, or empty; `n_tokens` counts stored tokens without BOS.
        """
        table = self._read_table("documents")
        sequences = self.sequences()
        started = int(sequences["document"].iloc[-1]) + 1 if len(sequences) else 0
        return table[table["document"] < started].reset_index(drop=True)

    def document_at(self, row: int) -> dict[str, Any]:
        """The document (a row of `documents()`) that a planned row belongs to, and the row's `sequence`."""
        self._require(PLAN, "tokens", row, row + 1)
        sequence = int(self.rows(row, row + 1).sequence[0])
        sequences, documents = self._read_table("sequences"), self._read_table("documents")
        number = int(sequences.loc[sequences["sequence"] == sequence, "document"].iloc[0])
        found = documents[documents["document"] == number].iloc[0]
        return {"sequence": sequence, **{str(name): value for name, value in found.items()}}

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        """All rows from `start` in order, `batch_size` at a time (`ActivationSource`). Rows that some of the hooks
        lack are not yielded."""
        if batch_size < 1:
            raise InvalidInputError(f"batch_size is {batch_size}; expected at least 1.")
        names = [self.resolve_hook(hook) for hook in hooks]
        self.require_whole()
        end = min(map(self.rows_of, names), default=self.n_rows)
        row_bytes = max((self.layout.hook(self.hook_shape(name)).row_bytes for name in names), default=1)
        per_block = max(1, READ_AHEAD_BYTES // (batch_size * row_bytes)) * batch_size
        for first in range(start, end, per_block):
            block = self._block(hooks, names, first, min(first + per_block, end))
            for offset in range(0, len(block.rows), batch_size):
                yield _slice_batch(block, slice(offset, offset + batch_size))

    def drop_hooks(self, hooks: str | Sequence[str]) -> tuple[str, ...]:
        """Remove hooks (names as stored, or aliases) and their activations from the store; tokens and the other hooks
        stay. SAEs and indexes that were made from them are not touched. Returns the names of what was removed.

        Raises:
            UnknownNameError: a hook that the store does not have.
            InvalidInputError: no hook would be left.
            LockedError: a writer is at work on the store.
        """
        from activations.writer import StoreWriter

        self.refresh()
        names = tuple(sorted({self.resolve_hook(hook) for hook in ([hooks] if isinstance(hooks, str) else hooks)}))
        if not names or set(names) == set(self.hooks):
            raise InvalidInputError(
                f"{self.path} has the hooks {', '.join(self.hooks)}; got {', '.join(names) or 'none'} to drop. "
                "At least one must be dropped and one must stay; to drop all, delete the folder."
            )
        with StoreWriter(self.storage, self.spec, {}, ()) as writer:
            writer.drop_hooks(names)
            writer.journal.write("dropped", hooks=list(names))
        self.refresh()
        return names

    def verify(self, progress: Callable[[int, int | None], None] | None = None) -> list[Fault]:
        """Compare every object on disk with the ledger, and report what differs; files that the ledger does not
        know are no faults. `progress` is called with (bytes read, bytes in all)."""
        from activations.integrity import verify_store

        return verify_store(self, progress)

    def info(self) -> dict[str, Any]:
        """What is in the store, JSON-able: rows, hooks, bytes, spec, text, documents, norms."""
        from activations.summary import store_info

        return store_info(self)

    def _repr_html_(self) -> str:
        from activations.summary import store_html

        return store_html(self)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, {self.n_rows:,} rows, hooks {', '.join(self.hooks) or 'none'})"

    def zarr(self) -> Any:
        """The same folder as a read-only `zarr.Group`, which verifies less and ignores the ledger."""
        return open_zarr(self.storage)

    @property
    def ledger(self) -> Ledger:
        return self._reader.ledger

    @property
    def _capture_of(self) -> dict[str, str]:
        declarations = self.ledger.declarations
        found = {hook: capture for capture in declarations for hook in declarations[capture].get("hooks", {})}
        return dict(sorted(found.items()))

    def _as_float32(self, values: np.ndarray) -> np.ndarray:
        return bf16_to_float32(values) if self.dtype == "bfloat16" else values.astype(np.float32, copy=False)

    def _require_rows(self, hook: str, start: int, stop: int) -> None:
        self._require(self._capture_of[hook], hook, start, stop)

    def manifest_fault(self) -> str:
        """What is wrong with the manifest, empty if nothing is: its bytes, or that it is another store's."""
        if self._manifest_fault is None:
            declared = self.ledger.declarations.get(PLAN)
            if not has_its_digest(self.manifest) or identity_fingerprint(self.manifest) != self.fingerprint:
                self._manifest_fault = "changed: its content does not have its digest"
            elif declared is not None and declared["spec"] != self.spec.fingerprint:
                self._manifest_fault = "swapped: the ledger belongs to a store with another specification"
            else:
                self._manifest_fault = ""
        return self._manifest_fault

    def _require(self, capture: str, what: str, start: int, stop: int) -> None:
        if self.manifest_fault():
            raise IntegrityError(
                f"{self.storage.where('manifest.json')} is damaged: {self._manifest_fault}. Restore it from a copy."
            )
        committed = self.ledger.committed_rows(capture)
        if capture != PLAN:
            committed = min(committed, self.ledger.committed_rows(PLAN))
        if not 0 <= start <= stop <= committed:
            if 0 <= start <= stop:
                self.require_whole({capture, PLAN}, stop)
            raise InvalidInputError(
                f"Rows {start:,} to {stop:,} of {what} were asked for; {self.path} has {committed:,} committed rows."
            )

    def require_whole(self, captures: Collection[str] | None = None, n_rows: int = 0) -> None:
        """Raise `IntegrityError` if the ledger lost a record: then rows that were committed seem never to have been.

        Args:
            captures: ids of the captures that are looked at; None for all.
            n_rows: only if so many rows were committed once.
        """
        from activations.integrity import lost_rows

        for capture, rows in lost_rows(self).items():
            if n_rows <= rows and (captures is None or capture in captures):
                raise IntegrityError(
                    f"{rows:,} rows of {capture} were committed once, but a record of them is missing in "
                    f"{self.storage.where(f'ledger/{capture}')}. Restore it from a copy, or run the capture again."
                )

    def _read_table(self, table: str) -> "pd.DataFrame":
        import pyarrow

        self.require_whole()
        groups = range(self.ledger.committed_groups(PLAN))
        pieces = list(self.storage.map(partial(self.table_piece, table), groups))
        if not pieces:
            raise InvalidInputError(f"{self.path} has no committed rows yet.")
        return pyarrow.concat_tables(pieces).to_pandas()

    def table_piece(self, table: str, group: int) -> Any:
        """What of a table (`activations.layout.TABLES`) starts in a row group, as a `pyarrow.Table`, verified."""
        return self._reader.table_piece(table, group)

    def _block(self, hooks: Sequence[str], names: Sequence[str], start: int, stop: int) -> ActivationBatch:
        return ActivationBatch(
            rows=np.arange(start, stop),
            activations={hook: self.read(name, start, stop) for hook, name in zip(hooks, names, strict=True)},
            flags=self.flags(start, stop),
            norms={hook: self.norms(name, start, stop) for hook, name in zip(hooks, names, strict=True)},
        )


def _spec_of(storage: Storage, manifest: Mapping[str, Any]) -> CaptureSpec:
    try:
        return CaptureSpec(**manifest["spec"])
    except (KeyError, TypeError, InvalidInputError) as error:
        raise IntegrityError(
            f"{storage.where('manifest.json')} is damaged ({error}). Restore it from a copy."
        ) from error


def _slice_batch(block: ActivationBatch, part: slice) -> ActivationBatch:
    return ActivationBatch(
        rows=block.rows[part],
        activations={hook: values[part] for hook, values in block.activations.items()},
        flags=block.flags[part],
        norms={hook: values[part] for hook, values in block.norms.items()},
    )
