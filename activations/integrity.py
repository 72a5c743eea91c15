"""`ActivationStore.verify`: is every byte still what the ledger recorded?"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from activations.arrays import GROUP_METADATA, ArrayLayout, ObjectRecord, damaged_rows
from activations.layout import PLAN, ZARR_GROUPS
from activations.ledger import GroupRecord, Ledger
from activations.storage import StoredObject
from activations.store import ActivationStore, Fault

__all__ = ["lost_rows", "verify_store"]

READ_BYTES = 2**23


class _Item(NamedTuple):
    """An object that the ledger knows."""

    name: str
    record: ObjectRecord
    array: str
    """Path of the array or table that it belongs to."""
    layout: ArrayLayout | None
    of: GroupRecord
    """The row group that it belongs to."""


def verify_store(store: ActivationStore, progress: Callable[[int, int | None], None] | None = None) -> list[Fault]:
    """All faults of a store; see `ActivationStore.verify`."""
    items = list(_items(store))
    total = sum(item.record.n_bytes for item in items)
    owners = {item.record.xxh3_128: item.name for item in items}
    faults = [*_manifest_faults(store), *_metadata_faults(store)]
    done = 0

    def check(item: _Item) -> list[Fault]:
        found = list(_check(StoredObject(store.storage, item.name), item, owners))
        return [] if found and _is_superseded(store, item) else found

    for item, found in zip(items, store.storage.map(check, items), strict=True):
        faults += found
        done += item.record.n_bytes
        if progress is not None:
            progress(done, total)
    return faults


def _items(store: ActivationStore) -> Iterator[_Item]:
    arrays = _arrays(store)
    for capture, records in store.ledger.records.items():
        for _, record in sorted(records.items()):
            for name, known in store.layout.objects_of(record, store.ledger.declarations[capture]).items():
                array = name.rpartition("/")[0]
                yield _Item(name, known, array, arrays.get(array), record)


def _is_superseded(store: ActivationStore, item: _Item) -> bool:
    """Whether a row group has other objects by now, because text is being appended."""
    newer = store.ledger.read_again(item.of.capture, item.of.group)
    return newer is not None and newer.objects.get(item.name) != item.record


def _arrays(store: ActivationStore) -> dict[str, ArrayLayout]:
    return {array: layout for arrays in _arrays_by_capture(store).values() for array, layout in arrays.items()}


def _arrays_by_capture(store: ActivationStore) -> dict[str, dict[str, ArrayLayout]]:
    declarations = store.ledger.declarations
    return {capture: store.layout.arrays_of(declared) for capture, declared in declarations.items()}


def _check(stored: StoredObject, item: _Item, owners: dict[str, str]) -> Iterator[Fault]:
    n_rows = item.of.row_stop - item.of.row_start

    def fault(problem: str, start: int = 0, stop: int = n_rows) -> Fault:
        hook = item.array.removeprefix("hooks/")
        return Fault(hook, item.of.row_start + start, item.of.row_start + stop, item.name, problem)

    size = stored.storage.size(stored.name)
    if size is None:
        yield fault("missing")
        return
    if size != item.record.n_bytes:
        how = "truncated" if size < item.record.n_bytes else "too long"
        yield fault(f"{how}: {size:,} bytes instead of {item.record.n_bytes:,}")
        return
    digest = _digest(stored, size)
    if digest == item.record.xxh3_128:
        return
    if digest in owners:
        yield fault(f"swapped: holds the bytes of {owners[digest]}")
    elif item.layout is not None and item.record.crc32c:
        for start, stop in damaged_rows(stored, item.layout, item.record, n_rows):
            yield fault("changed: the bytes do not have the recorded checksum", start, stop)
    else:
        yield fault("changed: the bytes do not have the recorded digest")


def _digest(stored: StoredObject, size: int) -> str:
    digest = xxhash.xxh3_128()
    piece = np.empty(min(READ_BYTES, size), np.uint8)
    ranges = [(start, piece[: size - start]) for start in range(0, size, READ_BYTES)]
    for (_, content), _ in zip(ranges, stored.storage.read_ranges(stored.name, size, ranges), strict=True):
        digest.update(content.data)
    return digest.hexdigest()


def _manifest_faults(store: ActivationStore) -> Iterator[Fault]:
    if problem := store.manifest_fault():
        yield Fault("the store", 0, store.n_rows, "manifest.json", problem)


def _metadata_faults(store: ActivationStore) -> Iterator[Fault]:
    """What is wrong with the `zarr.json` files, which other tools go by. They may show fewer rows than are committed:
    they are written after the rows. More is a sign that the ledger lost a record."""
    if PLAN not in store.ledger.declarations:
        return
    for group in ZARR_GROUPS:
        name = f"{group}/zarr.json".lstrip("/")
        if _content(store, name) != GROUP_METADATA:
            yield Fault(group or "the store", 0, 0, name, "missing or changed")
    contents = {array: _content(store, f"{array}/zarr.json") for array in _arrays(store)}
    # What a writer committed since the store was opened is no fault: the ledger is read after the files that go by it.
    ledger = Ledger(store.storage)
    for capture, arrays in _arrays_by_capture(store).items():
        committed, groups = ledger.committed_rows(capture), ledger.committed_groups(capture)
        known = max(committed, _rows_shown_by_all(contents[array] for array in arrays))
        if known > committed:
            name = ledger.lost_file(capture, groups, -(-known // store.spec.rows_per_group))
            yield Fault(capture, committed, known, name, "missing")
        for array, layout in arrays.items():
            shown = _rows_shown(contents[array])
            if contents[array] != layout.metadata(shown if 0 <= shown <= known else known):
                yield Fault(array.removeprefix("hooks/"), 0, 0, f"{array}/zarr.json", "missing or changed")


def lost_rows(store: ActivationStore) -> dict[str, int]:
    """The captures whose ledger lost a record, with the rows that they once had: those that their arrays show."""
    found = {}
    for capture, arrays in _arrays_by_capture(store).items():
        shown = _rows_shown_by_all(_content(store, f"{array}/zarr.json") for array in arrays)
        # What a writer committed since the store was opened is not lost, hence the second look.
        if shown > store.ledger.committed_rows(capture) and shown > Ledger(store.storage).committed_rows(capture):
            found[capture] = shown
    return found


def _rows_shown(content: bytes) -> int:
    """Rows that a `zarr.json` speaks of, -1 if it cannot be read."""
    try:
        n_rows = json.loads(content)["shape"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        return -1
    return n_rows if isinstance(n_rows, int) else -1


def _rows_shown_by_all(contents: Iterable[bytes]) -> int:
    """Rows that all arrays of a capture show, but those that cannot be read: a rotten one alone proves nothing."""
    return min((shown for shown in map(_rows_shown, contents) if shown >= 0), default=0)


def _content(store: ActivationStore, name: str) -> bytes:
    try:
        return store.storage.read(name)
    except FileNotFoundError:
        return b""
