"""`ActivationStore.verify`: is every byte still what the ledger recorded?"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from activations.arrays import GROUP_METADATA, ArrayLayout, ObjectRecord, damaged_rows
from activations.layout import PLAN, ZARR_GROUPS, identity_fingerprint
from activations.ledger import GroupRecord, Ledger
from activations.store import ActivationStore, Fault

__all__ = ["verify_store"]

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
    for item in items:
        found = list(_check(store.path, item, owners))
        faults += [] if found and _is_superseded(store, item) else found
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
    shapes = {hook: store.hook_shape(hook) for hook in store.hooks}
    return store.layout.plan_arrays() | store.layout.hook_arrays(shapes)


def _check(root: Path, item: _Item, owners: dict[str, str]) -> Iterator[Fault]:
    path = root / item.name
    n_rows = item.of.row_stop - item.of.row_start

    def fault(problem: str, start: int = 0, stop: int = n_rows) -> Fault:
        hook = item.array.removeprefix("hooks/")
        return Fault(hook, item.of.row_start + start, item.of.row_start + stop, item.name, problem)

    if not path.is_file():
        yield fault("missing")
        return
    size = path.stat().st_size
    if size != item.record.n_bytes:
        how = "truncated" if size < item.record.n_bytes else "too long"
        yield fault(f"{how}: {size:,} bytes instead of {item.record.n_bytes:,}")
        return
    digest = _digest(path)
    if digest == item.record.xxh3_128:
        return
    if digest in owners:
        yield fault(f"swapped: holds the bytes of {owners[digest]}")
    elif item.layout is not None and item.record.crc32c:
        for start, stop in damaged_rows(path, item.layout, item.record, n_rows):
            yield fault("changed: the bytes do not have the recorded checksum", start, stop)
    else:
        yield fault("changed: the bytes do not have the recorded digest")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _manifest_faults(store: ActivationStore) -> Iterator[Fault]:
    if identity_fingerprint(store.manifest) != store.fingerprint:
        yield Fault("the store", 0, store.n_rows, "manifest.json", "changed: its content does not have its fingerprint")


def _metadata_faults(store: ActivationStore) -> Iterator[Fault]:
    """What is wrong with the `zarr.json` files, which other tools go by. They may show fewer rows than are committed:
    they are written after the rows."""
    if PLAN not in store.ledger.declarations:
        return
    for group in ZARR_GROUPS:
        name = f"{group}/zarr.json".lstrip("/")
        if _content(store.path / name) != GROUP_METADATA:
            yield Fault(group or "the store", 0, 0, name, "missing or changed")
    committed = Ledger(store.path).committed_rows(PLAN)  # a writer may have added to what the reader sees
    for array, layout in _arrays(store).items():
        name = f"{array}/zarr.json"
        content = _content(store.path / name)
        if content != layout.metadata(_rows_shown(content, committed)):
            yield Fault(array.removeprefix("hooks/"), 0, 0, name, "missing or changed")


def _rows_shown(content: bytes, at_most: int) -> int:
    """Rows that a `zarr.json` speaks of, if that can be true."""
    try:
        n_rows = json.loads(content)["shape"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        return at_most
    return n_rows if isinstance(n_rows, int) and 0 <= n_rows <= at_most else at_most


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
