"""`GroupReader`: the verified content of a store's row groups, wherever their objects are.

1. Rows are read from the shards of the row groups that they lie in, and compared with the ledger
   (`activations.arrays`). Raw shards are read in part, token columns and tables as a whole; the last few decoded
   columns and windows are kept, since neighbours are often read next.
2. A row group that is filled up while text is appended moves to other objects, but its rows stay: whoever finds the old
   objects gone asks the ledger again where they are, and sees no more rows than before.

Which rows may be asked for is for `activations.store` to say.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from activations.arrays import ArrayLayout, ObjectRecord, read_object, read_packed, read_raw
from activations.errors import IntegrityError
from activations.layout import ASIDE, PLAN, WINDOWS, StoreLayout
from activations.ledger import GroupRecord, Ledger
from activations.storage import Storage, StoredObject

__all__ = ["GroupReader"]

CACHED_COLUMNS = 64
CACHED_WINDOWS = 8
"""Row groups whose whole windows are kept in memory."""
SUPERSEDED_ATTEMPTS = 4

T = TypeVar("T")


class GroupReader:
    """Reads objects of row groups. Safe to call from several threads.

    Args:
        storage: where the store lies.
        layout: names and layouts of its arrays and tables.
        ledger: what is committed; may be replaced.
    """

    def __init__(self, storage: Storage, layout: StoreLayout, ledger: Ledger) -> None:
        self.storage, self.layout, self.ledger = storage, layout, ledger
        self._columns: dict[tuple[str, int], np.ndarray] = {}
        self._windows: dict[int, tuple[int, list[np.ndarray]]] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """See what was committed meanwhile."""
        self.ledger.refresh()
        with self._lock:
            self._columns.clear()
            self._windows.clear()

    def raw(self, capture: str, array: str, layout: ArrayLayout, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of an array of raw shards that a capture filled, in the storage dtype."""
        out = np.empty((stop - start, *layout.feature_shape), layout.storage_dtype)
        for group, first, last in self._pieces(start, stop):
            what = f"{array}, rows {first:,} to {last:,}"
            read = partial(_read_part, layout, first - group * layout.rows_per_group, out[first - start : last - start])
            self._verified(capture, group, f"{array}/{layout.shard_name(group)}", partial(read, what))
        return out

    def column(self, column: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of a token column."""
        layout = self.layout.column(column)
        pieces = [np.empty(0, layout.storage_dtype)]
        for group, first, last in self._pieces(start, stop):
            offset = group * layout.rows_per_group
            pieces.append(self._decoded(column, layout, group)[first - offset : last - offset])
        return np.concatenate(pieces)

    def table_piece(self, table: str, group: int) -> Any:
        """What of a table (`activations.layout.TABLES`) starts in a row group, as a `pyarrow.Table`."""
        import pyarrow
        from pyarrow import parquet

        rows = self.ledger.records[PLAN][group]
        what = f"{table} that start in rows {rows.row_start:,} to {rows.row_stop:,}"
        name = self.layout.table_object(table, group)
        content = self._verified(PLAN, group, name, lambda stored, record: read_object(stored, record, what))
        # In this thread alone: Arrow's own may give Python's bytes back when Python is already gone, and abort.
        return parquet.ParquetFile(pyarrow.BufferReader(content), pre_buffer=False).read(use_threads=False)

    def windows_that_start_in(self, group: int) -> tuple[int, list[np.ndarray]]:
        """Number of the first window that starts in a row group, and all tokens of these windows."""
        n_sequences = self.ledger.records[PLAN][group].extra["n_sequences"]
        with self._lock:
            cached = self._windows.get(group)
        if cached is not None and cached[0] + len(cached[1]) == n_sequences:
            return cached
        column = self.table_piece(WINDOWS, group).column("tokens").combine_chunks()
        values = column.values.to_numpy(zero_copy_only=False)
        windows = np.split(values, column.offsets.to_numpy()[1:-1]) if len(column) else []
        found = n_sequences - len(windows), windows
        with self._lock:
            _remember(self._windows, group, found, CACHED_WINDOWS)
        return found

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(group, first row, last row + 1) of each row group that the rows touch."""
        size = self.layout.spec.rows_per_group
        for group in range(start // size, -(-stop // size)):
            yield group, max(start, group * size), min(stop, (group + 1) * size)

    def _decoded(self, column: str, layout: ArrayLayout, group: int) -> np.ndarray:
        """A whole decoded column of a row group."""
        with self._lock:
            cached = self._columns.get((column, group))
        rows = self.ledger.records[PLAN][group]
        n_rows = rows.row_stop - rows.row_start
        if cached is not None and len(cached) == n_rows:
            return cached
        array = self.layout.column_array(column)
        what = f"{array}, rows {rows.row_start:,} to {rows.row_stop:,}"
        name = f"{array}/{layout.shard_name(group)}"
        values = self._verified(
            PLAN, group, name, lambda stored, record: read_packed(stored, layout, record, n_rows, what)
        )
        with self._lock:
            _remember(self._columns, (column, group), values, CACHED_COLUMNS)
        return values

    def _verified(self, capture: str, group: int, name: str, read: Callable[[StoredObject, ObjectRecord], T]) -> T:
        """What `read` makes of an object of a row group, wherever the object is by now."""
        for _ in range(SUPERSEDED_ATTEMPTS):
            record = self.ledger.records[capture][group]
            try:
                return read(*self._object(record, name))
            except IntegrityError:
                newer = self.ledger.read_again(capture, group)
                if newer is None or newer.objects == record.objects:
                    raise
                if self.ledger.records[capture][group] is record:
                    # The same rows in other objects; what else is committed meanwhile is for `refresh` to show.
                    self.ledger.records[capture][group] = replace(record, objects=newer.objects)
        return read(*self._object(self.ledger.records[capture][group], name))

    def _object(self, record: GroupRecord, name: str) -> tuple[StoredObject, ObjectRecord]:
        for candidate in (name, name + ASIDE):
            if candidate in record.objects:
                return StoredObject(self.storage, candidate), record.objects[candidate]
        raise IntegrityError(f"The ledger of {self.storage.location} does not list {name}.")


def _read_part(
    layout: ArrayLayout, start: int, out: np.ndarray, what: str, shard: StoredObject, record: ObjectRecord
) -> None:
    read_raw(shard, layout, record, start, out, what)


def _remember(cache: dict[Any, Any], key: Any, value: Any, size: int) -> None:
    while len(cache) >= size:
        cache.pop(next(iter(cache)))
    cache[key] = value
