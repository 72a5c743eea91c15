"""`StoreWriter`: the one door through which rows come into a store.

1. Every step leaves a store that opens: the manifest is written first and whole, arrays are declared before rows, and
   a row group's record comes after its objects.
2. `zarr.json` files show rows only after they are committed, so that tools which do not know the ledger see no lost
   rows either; they are brought up to date every few seconds and when the writer closes.
3. Opening for writing takes the lock and clears away what a dead writer left half done.
4. Ctrl-C is held back while a writer is open (`activations.interrupts`), so that the lock is given back last.
5. A store may grow by another text (`activations.append`), which its manifest then lists; its fingerprint stays.
"""

import contextlib
import io
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from activations.arrays import (
    GROUP_METADATA,
    ArrayLayout,
    ObjectRecord,
    ShardBuffer,
    pack_shard,
    write_object,
)
from activations.errors import (
    ActivationsError,
    InterruptedRunError,
    InvalidInputError,
    LockedError,
    MismatchError,
    OccupiedError,
)
from activations.interrupts import Interrupts
from activations.layout import (
    ASIDE,
    FORMAT,
    MEDIA,
    OPTIONAL_IDENTITY,
    PLAN,
    ZARR_GROUPS,
    StoreLayout,
    appended_from,
    identity_fingerprint,
)
from activations.ledger import GroupRecord, Journal, Ledger
from activations.locks import LOCK_NAME
from activations.manifest import DIGEST, read_manifest, write_manifest
from activations.media import MEDIA_TABLE
from activations.plan import PlannedGroup, PlanState
from activations.spec import CaptureSpec, fingerprint_of
from activations.storage import Storage, StoredObject, storage_at

__all__ = ["StoreWriter", "existing_manifest", "hooks_capture_id"]

SHAPES_EVERY_SECONDS = 5.0


def existing_manifest(folder: str | Path | Storage) -> dict[str, Any] | None:
    """The manifest of the store in a folder, or where else it lies; None if the folder is missing or empty.

    Raises:
        OccupiedError: something else is there.
    """
    storage = storage_at(folder)
    where = storage.location
    try:
        names = storage.names("")
    except NotADirectoryError as error:
        raise OccupiedError(
            f"{where} is a file; expected a folder that is new, empty or an activation store."
        ) from error
    # A writer that died while creating the store leaves its lock and the manifest's temporary file.
    names = [name for name in names if name != LOCK_NAME and ".tmp-" not in name]
    if not names:
        return None
    if "manifest.json" not in names:
        raise OccupiedError(
            f"{where} holds something else ({', '.join(name.rstrip('/') for name in names[:3])}…). Give a folder that "
            "is new, empty or an activation store."
        )
    manifest = read_manifest(storage)
    if manifest["format"] != FORMAT:
        raise OccupiedError(f"{where} holds an artefact of format {manifest['format']!r}; give another folder.")
    return read_manifest(storage, FORMAT)


def hooks_capture_id(hooks: Sequence[str]) -> str:
    """The ledger's name for a pass over these hooks."""
    return f"hooks-{fingerprint_of(sorted(hooks))[:12]}"


class StoreWriter:
    """A store opened for writing; a context manager that holds the lock.

    Args:
        folder: the store's folder, made if it is not there, or where else it lies.
        spec: what every row has in common.
        identity: what else must be equal when a run is resumed, by name (JSON-able); kept in the manifest.
        hooks: the hooks that a new store begins with; with the rest they make its fingerprint.
        load_name: what the model was loaded as, for the manifest of a new store.
    """

    def __init__(
        self,
        folder: str | Path | Storage,
        spec: CaptureSpec,
        identity: Mapping[str, Any],
        hooks: Sequence[str],
        load_name: str | None = None,
    ) -> None:
        self.storage = storage_at(folder)
        self.folder = self.storage.location
        self.spec = spec
        self.layout = StoreLayout(spec)  # until the manifest is read
        self.journal = Journal(self.storage)
        self.ledger: Ledger
        self.manifest: dict[str, Any]
        self._identity = {**identity, "hooks_at_creation": sorted(hooks)}
        self._load_name = load_name
        self.interrupts = Interrupts()
        self._shapes_lock = threading.Lock()
        self._shapes_at = 0.0

    def __enter__(self) -> "StoreWriter":
        with contextlib.ExitStack() as held:
            held.enter_context(self.interrupts)
            try:
                self.storage.make_folder("")
                held.enter_context(self.storage.lock())
            except OSError as error:
                raise InvalidInputError(f"{self.folder} cannot be written to: {error}.") from error
            try:
                self._open()
            except OSError as error:
                raise self._explained(error) from error
            self._held = held.pop_all()
        return self

    def _open(self) -> None:
        manifest = existing_manifest(self.storage)
        if manifest is None:
            manifest = self._create()
        else:
            self._require_same(manifest)
        self.manifest = manifest
        self.layout = StoreLayout.of(manifest)
        self.ledger = Ledger(self.storage)
        self._clear_leftovers()
        content = {"columns": sorted(self.layout.plan_arrays()), "spec": self.spec.fingerprint}
        self._declare(PLAN, content, self.layout.plan_arrays())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # A full disk, or a lost lease; the next run brings them up to date.
            with contextlib.suppress(OSError, LockedError):
                self.update_shapes()
        finally:
            self._held.__exit__(kind, error, traceback)
        if isinstance(error, OSError):
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> Exception:
        """What a caller is told of a file error between passes, such as a full disk."""
        if isinstance(error, ActivationsError):
            return error
        return InterruptedRunError(
            f"Stopped by a file error: {error}. What is committed in {self.folder} stays; run the same command again "
            "to resume."
        )

    @property
    def plan_state(self) -> PlanState:
        """Where the committed plan ends; where it is to go on with a text that is appended, that text's beginning."""
        groups = self.ledger.committed_groups(PLAN)
        state = PlanState(**self.ledger.records[PLAN][groups - 1].extra) if groups else PlanState()
        if state.n_rows <= appended_from(self.manifest):
            return replace(state, ordinal=0, rows_done=0, complete=False)
        return state

    def declare_hooks(self, shapes: Mapping[str, Sequence[int]], aliases: Mapping[str, str]) -> str:
        """Make room for hooks that are captured together, and return the capture's id.

        Args:
            shapes: feature shape of each hook, by canonical name.
            aliases: other names that were used for them.
        """
        capture = hooks_capture_id(list(shapes))
        content = {"hooks": {hook: {"shape": list(shape)} for hook, shape in shapes.items()}, "aliases": dict(aliases)}
        self._declare(capture, content, self.layout.hook_arrays(shapes))
        return capture

    def shapes_of(self, captures: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Feature shape of each hook of some captures."""
        declared = [self.ledger.declarations[capture]["hooks"] for capture in captures]
        return {hook: tuple(content["shape"]) for hooks in declared for hook, content in hooks.items()}

    def objects_of(self, record: GroupRecord) -> dict[str, ObjectRecord]:
        """Objects of a record that are the store's; those of hooks that were dropped are not any more."""
        return self.layout.objects_of(record, self.ledger.declarations[record.capture])

    def drop_hooks(self, hooks: Collection[str]) -> None:
        """Remove hooks (canonical names) from the store. From the first step on they are gone for readers; a writer
        that dies after it leaves files that the next one clears away."""
        for capture, declaration in list(self.ledger.declarations.items()):
            declared = declaration.get("hooks", {})
            kept = {hook: content for hook, content in declared.items() if hook not in hooks}
            if len(kept) < len(declared):
                aliases = {alias: hook for alias, hook in declaration.get("aliases", {}).items() if hook in kept}
                gone = {} if kept else {"dropped": True}
                self.ledger.declare_again(capture, {**declaration, "hooks": kept, "aliases": aliases, **gone})
        self._clear_dropped()

    def set_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest's entries that are no part of the store's identity."""
        assert identity_fingerprint(manifest) == manifest["fingerprint"]
        known = ("format", "version", "fingerprint", "parents", "created_by", DIGEST)
        extra = {name: value for name, value in manifest.items() if name not in known}
        self.manifest = write_manifest(
            self.storage, FORMAT, manifest["fingerprint"], manifest["parents"], manifest["created_by"], **extra
        )

    def commit_plan(self, planned: PlannedGroup) -> None:
        """Write and commit the token columns, sequences and documents of a row group."""
        objects: dict[str, ObjectRecord] = {}
        for column, values in planned.columns.items():
            layout = self.layout.column(column)
            name = f"{self.layout.column_array(column)}/{layout.shard_name(planned.group)}"
            objects[name] = write_object(self._object(name), pack_shard(layout, values))
        for table in self.layout.tables:
            name = self.layout.table_object(table, planned.group)
            objects[name] = write_object(self._object(name), _parquet(table, getattr(planned, table)))
        extra = asdict(planned.state)
        self.ledger.commit(GroupRecord(PLAN, planned.group, planned.row_start, planned.row_stop, objects, extra))

    def write_shard(self, array: str, group: int, buffer: ShardBuffer, n_rows: int) -> tuple[str, ObjectRecord]:
        """Write one raw shard of a row group, and return its name and record for `commit_hooks`."""
        name = f"{array}/{buffer.layout.shard_name(group)}"
        content, crcs = buffer.finish(n_rows)
        return name, write_object(self._object(name), content, crcs)

    def commit_hooks(self, captures: Sequence[str], group: int, objects: Mapping[str, ObjectRecord]) -> None:
        """Commit a row group of some captures, all of whose objects are written."""
        plan = self.ledger.records[PLAN][group]
        for capture in captures:
            arrays = self._arrays_of(capture)
            own = {name: objects[name] for name in sorted(objects) if name.rpartition("/")[0] in arrays}
            self.ledger.commit(GroupRecord(capture, group, plan.row_start, plan.row_stop, own))
        if time.monotonic() - self._shapes_at > SHAPES_EVERY_SECONDS:
            self.update_shapes()

    def update_shapes(self) -> None:
        """Let the arrays' `zarr.json` show what is committed."""
        with self._shapes_lock:
            metadata = [
                (f"{array}/zarr.json", layout.metadata(self.ledger.committed_rows(capture)))
                for capture in self.ledger.declarations
                for array, layout in self._arrays_of(capture).items()
            ]
            for _ in self.storage.map(lambda shown: self.storage.replace(*shown), metadata):
                pass
            self._shapes_at = time.monotonic()

    def _create(self) -> dict[str, Any]:
        identity = {
            name: value for name, value in self._identity.items() if name not in OPTIONAL_IDENTITY or value is not None
        }
        content = {"spec": asdict(self.spec), **identity}
        return write_manifest(
            self.storage,
            FORMAT,
            identity_fingerprint(content),
            parents=[],
            created_by=_created_by(),
            load_name=self._load_name,
            **content,
        )

    def _require_same(self, manifest: Mapping[str, Any]) -> None:
        CaptureSpec(**manifest["spec"]).require_equal(self.spec, str(self.folder))
        for name, value in self._identity.items():
            if name != "hooks_at_creation" and manifest.get(name) != value:
                raise MismatchError(
                    f"{self.folder} was captured with another {name}: {_difference(manifest.get(name), value)}. "
                    "Use the same settings to resume, or give another output folder."
                )

    def _declare(self, capture: str, content: Mapping[str, Any], arrays: Mapping[str, ArrayLayout]) -> None:
        for group in ZARR_GROUPS:
            self._write_once(group, "zarr.json", GROUP_METADATA)
        for table in self.layout.tables:
            self.storage.make_folder(table)
        for array, layout in arrays.items():
            self._write_once(array, "zarr.json", layout.metadata(0))
        self.ledger.declare(capture, content)
        for group in (*ZARR_GROUPS, "ledger"):
            self.storage.sync_folder(group)

    def _write_once(self, folder: str, name: str, content: bytes) -> None:
        path = f"{folder}/{name}".lstrip("/")
        if self.storage.size(path) is None:
            self.storage.make_folder(folder)
            self.storage.create(path, content)

    def _object(self, name: str) -> StoredObject:
        return StoredObject(self.storage, name)

    def _arrays_of(self, capture: str) -> dict[str, ArrayLayout]:
        return self.layout.arrays_of(self.ledger.declarations[capture])

    def _clear_leftovers(self) -> None:
        self._clear_dropped()
        self.ledger.tidy()
        arrays = [array for capture in self.ledger.declarations for array in self._arrays_of(capture)]
        for folder in ("", *ZARR_GROUPS, *self.layout.tables, *arrays):
            self.storage.remove_temporaries(folder)
        self.clear_superseded()

    def _clear_dropped(self) -> None:
        """Remove what belongs to no capture that is declared: arrays, then records."""
        arrays = {array for capture in self.ledger.declarations for array in self._arrays_of(capture)}
        for folder in (self.layout.hook_array(""), self.layout.norm_array("")):
            for name in self.storage.names(folder.rstrip("/")):
                if name.endswith("/") and (array := folder + name.rstrip("/")) not in arrays:
                    self.storage.remove_folder(array)
        for capture in self.ledger.left_over():
            self.ledger.forget(capture)

    def clear_superseded(self) -> None:
        """Remove what was set aside of row groups that are filled up by now."""
        arrays = [array for capture in self.ledger.declarations for array in self._arrays_of(capture)]
        listed = {
            name
            for records in self.ledger.records.values()
            for record in records.values()
            for name in record.objects
            if name.endswith(ASIDE)
        }
        for folder in (*self.layout.tables, *arrays):
            aside = (f"{folder}/{name}" for name in self.storage.names(folder) if name.endswith(ASIDE))
            left = [name for name in aside if name not in listed]
            if left:
                self.storage.delete(left)


def _difference(stored: Any, given: Any) -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        names = [name for name in stored if stored[name] != given.get(name)]
        return "; ".join(f"{name} is {given.get(name)!r}, the store has {stored[name]!r}" for name in names)
    return f"it is {given!r}, the store has {stored!r}"


def _created_by() -> str:
    try:
        return f"scope-workbench {version('scope-workbench')}"
    except PackageNotFoundError:
        return "scope-workbench (not installed)"


def _parquet(table: str, columns: Mapping[str, list[Any]]) -> bytes:
    """A table's bytes, the same for the same content and software."""
    import pyarrow
    from pyarrow import parquet

    text, truth, number = pyarrow.string(), pyarrow.bool_(), pyarrow.int64()
    kinds = dict.fromkeys(("title", "source", "language", "license", "extra"), text) | {"held_out": truth}
    kinds |= {name: pyarrow.list_(pyarrow.int32()) for name in ("tokens", "messages")}
    kinds |= {name: pyarrow.list_(pyarrow.uint8()) for name in ("roles", "kinds")}
    if table == MEDIA:
        kinds = {name: pyarrow.type_for_alias(kind) for name, kind in MEDIA_TABLE.items()}
    schema = pyarrow.schema([(name, kinds.get(name, number)) for name in columns])
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(dict(columns), schema=schema), stream, compression="zstd")
    return stream.getvalue()
