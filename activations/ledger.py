"""The ledger: what is committed. A row exists when the ledger says so.

1. A *capture* is a column set that is filled in one pass over the rows: `tokens` (the plan), or some hooks. It is
   declared once, in `ledger/<capture>/capture.json`; declared again it has lost hooks, which its records still list.
2. When all objects of a row group are there to stay, a record with their digests is written, last:
   `ledger/<capture>/<group>.json`; in an object store it is created only if absent. It holds no times, so that a
   resumed run ends with the same bytes as one that was never interrupted; times, host and pid go to `journal.jsonl`.
3. 1,024 records that are all there fold into a segment, `segment-<n>.jsonl`, one record a line. A crash between the
   segment's birth and the records' removal leaves both; `Ledger.tidy` finishes the work.
4. A later record of the same row group replaces an earlier one: so a last row group that is not full is filled up when
   text is appended (`activations.append`). A record beside a segment is the later one.
5. Every record and declaration carries the xxh3-128 of itself and stands where it belongs, so that a rotten ledger is
   an error and not another truth. What of a ledger is missing is for `activations.integrity` to find.
6. One writer at a time (`activations.locks`).
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from activations.arrays import ObjectRecord
from activations.errors import IntegrityError, LockedError
from activations.locks import WriterLock
from activations.manifest import DIGEST, has_its_digest, with_digest
from activations.storage import Storage, storage_at

__all__ = ["GroupRecord", "Journal", "Ledger", "WriterLock"]

FOLDER = "ledger"
RECORDS_PER_SEGMENT = 1024
READ_ATTEMPTS = 20


@dataclass(frozen=True)
class GroupRecord:
    """One committed row group of one capture."""

    capture: str
    group: int
    row_start: int
    row_stop: int
    objects: Mapping[str, ObjectRecord]
    """By path relative to the artefact, with forward slashes."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else a capture needs to go on from here (JSON-able)."""

    def to_line(self) -> bytes:
        """The record in canonical form with its own digest, one line."""
        objects = {
            name: [record.n_bytes, record.xxh3_128, "".join(f"{crc:08x}" for crc in record.crc32c)]
            for name, record in self.objects.items()
        }
        content = _canonical(
            {
                "capture": self.capture,
                "group": self.group,
                "rows": [self.row_start, self.row_stop],
                "objects": objects,
                "extra": self.extra,
            }
        )
        return f'{{"record":{content},"xxh3_128":"{xxhash.xxh3_128_hexdigest(content.encode())}"}}\n'.encode()

    @classmethod
    def from_line(cls, line: bytes, where: str) -> "GroupRecord":
        """Parse a line; raises `IntegrityError` naming the file if it is not what was written."""
        try:
            content = json.loads(line)
            record = content["record"]
            if xxhash.xxh3_128_hexdigest(_canonical(record).encode()) != content["xxh3_128"]:
                raise ValueError("its digest differs")
            objects = {
                name: ObjectRecord(n_bytes, digest, tuple(int(crcs[i : i + 8], 16) for i in range(0, len(crcs), 8)))
                for name, (n_bytes, digest, crcs) in record["objects"].items()
            }
            start, stop = record["rows"]
            return cls(record["capture"], record["group"], start, stop, objects, record["extra"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"The ledger record in {where} is damaged ({error}). Restore the file from a copy; without it the rows "
                "of its row group cannot be told from lost ones."
            ) from error


def _declaration_bytes(capture: str, content: Mapping[str, Any]) -> bytes:
    return (json.dumps(with_digest({**content, "capture": capture}), indent=1, sort_keys=True) + "\n").encode()


def _is_gone(declaration: Mapping[str, Any]) -> bool:
    return declaration.get("hooks") == {}


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


class Ledger:
    """The committed row groups of an artefact, as read when it was opened; a writer adds to it.

    Args:
        folder: the artefact's folder, or where else it lies (the ledger is in its folder `ledger`).
    """

    def __init__(self, folder: str | Path | Storage) -> None:
        self._storage = storage_at(folder)
        self.declarations: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[int, GroupRecord]] = {}
        self._prefix: dict[str, int] = {}
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read the ledger again. A writer may fold records meanwhile; then what vanished is looked up again."""
        for attempt in range(READ_ATTEMPTS):
            try:
                self.declarations, self.records = self._read()
                self._prefix = {}
                return
            except FileNotFoundError:
                if attempt == READ_ATTEMPTS - 1:
                    raise
                time.sleep(0.01)

    def _read(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[int, GroupRecord]]]:
        declarations: dict[str, dict[str, Any]] = {}
        records: dict[str, dict[int, GroupRecord]] = {}
        for folder in self._storage.names(FOLDER):
            capture = folder.rstrip("/")
            names = self._storage.names(_of(capture)) if folder.endswith("/") else []
            if "capture.json" not in names:
                if any(map(_is_record, names)):
                    where = self._storage.where(_of(capture, "capture.json"))
                    raise IntegrityError(f"{where} is missing. Restore the file from a copy.")
                continue
            name = _of(capture, "capture.json")
            try:
                declaration = json.loads(self._storage.read(name))
                if not has_its_digest(declaration):
                    raise ValueError("its digest differs")
                if declaration["capture"] != capture:
                    raise ValueError(f"it is that of {declaration['capture']}")
            except ValueError as error:
                where = self._storage.where(name)
                raise IntegrityError(f"{where} is damaged ({error}). Restore the file from a copy.") from error
            for entry in (DIGEST, "capture"):
                del declaration[entry]
            if _is_gone(declaration):
                continue
            declarations[capture] = declaration
            records[capture] = {record.group: record for record in self._read_capture(capture, names)}
        return declarations, records

    def _read_capture(self, capture: str, names: list[str]) -> Iterator[GroupRecord]:
        names = sorted(filter(_is_record, names), reverse=True)  # segments first: a record beside one replaces its own
        paths = [_of(capture, name) for name in names]
        for name, path, content in zip(names, paths, self._storage.map(self._storage.read, paths), strict=True):
            where, lines = self._storage.where(path), content.splitlines()
            if len(lines) != (RECORDS_PER_SEGMENT if name.startswith("segment-") else 1):
                raise IntegrityError(f"{where} is damaged: it has {len(lines)} records. Restore the file from a copy.")
            for line in lines:
                record = GroupRecord.from_line(line, where)
                if record.capture != capture or name not in (_record_name(record.group), _segment_name(record.group)):
                    raise IntegrityError(
                        f"The ledger record in {where} is that of row group {record.group} of {record.capture}. "
                        "Restore the file from a copy."
                    )
                yield record
        # A fold between two looks at the folder can hide both a segment and the records in it.
        now = set(filter(_is_record, self._storage.names(_of(capture))))
        if any(name.startswith("segment-") for name in now.difference(names)):
            raise FileNotFoundError(f"{self._storage.where(_of(capture))} was folded meanwhile")

    def declare(self, capture: str, content: Mapping[str, Any]) -> None:
        """Make a capture known, once; what is declared already stays as it is."""
        if capture in self.declarations:
            return
        self._storage.make_folder(_of(capture))
        self._storage.create(_of(capture, "capture.json"), _declaration_bytes(capture, content))
        self.declarations[capture] = dict(content)
        self.records[capture] = {}

    def declare_again(self, capture: str, content: Mapping[str, Any]) -> None:
        """Make a capture known as less than it was; without any hooks it counts as gone, and is left over."""
        self._storage.replace(_of(capture, "capture.json"), _declaration_bytes(capture, content))
        self.declarations[capture] = dict(content)
        if _is_gone(content):
            del self.declarations[capture], self.records[capture]
            self._prefix.pop(capture, None)

    def forget(self, capture: str) -> None:
        """Remove what is left over of a capture that is gone, its declaration last."""
        names = [name for name in self._storage.names(_of(capture)) if name != "capture.json"]
        self._storage.delete(_of(capture, name) for name in names)
        self._storage.remove_folder(_of(capture))

    def left_over(self) -> list[str]:
        """Captures that are gone, but not removed yet."""
        folders = (name.rstrip("/") for name in self._storage.names(FOLDER) if name.endswith("/"))
        return [capture for capture in folders if capture not in self.declarations]

    def commit(self, record: GroupRecord) -> None:
        """Write a record: from here on its rows exist. Safe to call from several threads.

        Raises:
            LockedError: another writer has committed the row group, with other bytes.
        """
        name = _of(record.capture, _record_name(record.group))
        try:
            self._storage.create(name, record.to_line())
        except FileExistsError as error:
            raise LockedError(
                f"Another writer has committed row group {record.group} of {record.capture} in "
                f"{self._storage.location}. Nothing more was committed; run the same again when it has ended."
            ) from error
        with self._lock:
            self.records[record.capture][record.group] = record
            self._fold(record.capture, record.group // RECORDS_PER_SEGMENT)

    def committed_groups(self, capture: str) -> int:
        """How many row groups are committed from the first on, without a gap."""
        records = self.records.get(capture, {})
        count = self._prefix.get(capture, 0)
        # What follows a row group that is yet to be filled up has a gap before it.
        while count in records and (count == 0 or records[count - 1].row_stop == records[count].row_start):
            count += 1
        self._prefix[capture] = count
        return count

    def committed_rows(self, capture: str) -> int:
        """How many rows are committed from the first on, without a gap."""
        groups = self.committed_groups(capture)
        return self.records[capture][groups - 1].row_stop if groups else 0

    def read_again(self, capture: str, group: int) -> GroupRecord | None:
        """The record of a row group as it is stored now, None if there is none."""
        for name in (_record_name(group), _segment_name(group)):
            with contextlib.suppress(FileNotFoundError):
                path = _of(capture, name)
                for line in self._storage.read(path).splitlines():
                    record = GroupRecord.from_line(line, self._storage.where(path))
                    if record.group == group:
                        return record
        return None

    def lost_file(self, capture: str, group: int, n_groups: int) -> str:
        """The file that would have the record of a group that is lost, of `n_groups` that there were: its own, or a
        segment that is lost as a whole."""
        first = group // RECORDS_PER_SEGMENT * RECORDS_PER_SEGMENT
        segment = range(first, first + RECORDS_PER_SEGMENT)
        lost_as_one = segment.stop <= n_groups and not any(number in self.records[capture] for number in segment)
        return f"ledger/{capture}/{_segment_name(group) if lost_as_one else _record_name(group)}"

    def tidy(self) -> None:
        """Finish what a dead writer left undone: fold full segments, drop folded records and temporary files."""
        for capture, records in self.records.items():
            self._storage.remove_temporaries(_of(capture))
            for segment in range(max(records, default=-1) // RECORDS_PER_SEGMENT + 1):
                self._fold(capture, segment)

    def _fold(self, capture: str, segment: int) -> None:
        records = self.records[capture]
        groups = range(segment * RECORDS_PER_SEGMENT, (segment + 1) * RECORDS_PER_SEGMENT)
        if not all(group in records for group in groups):
            return
        name = _of(capture, _segment_name(groups[0]))
        self._storage.replace(name, b"".join(records[group].to_line() for group in groups))
        self._storage.delete(_of(capture, _record_name(group)) for group in groups)


def _of(capture: str, name: str = "") -> str:
    """An object of a capture's part of the ledger, or the folder of that part."""
    return f"{FOLDER}/{capture}/{name}".rstrip("/")


def _record_name(group: int) -> str:
    return f"{group:08d}.json"


def _segment_name(group: int) -> str:
    return f"segment-{group // RECORDS_PER_SEGMENT:06d}.jsonl"


def _is_record(name: str) -> bool:
    return re.fullmatch(r"\d{8}\.json|segment-\d{6}\.jsonl", name) is not None


class Journal:
    """`journal.jsonl`: what happened when, where and by whom; for people, and outside every digest."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def write(self, event: str, **details: Any) -> None:
        """Append an event with time, host and pid. On a full disk it is left out: no run stops for want of it."""
        entry = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "event": event, **details}
        with contextlib.suppress(OSError):
            self._storage.append("journal.jsonl", (json.dumps(entry) + "\n").encode())
