"""The ledger: what is committed. A row exists when the ledger says so.

1. A *capture* is a column set that is filled in one pass over the rows: `tokens` (the plan), or some hooks. It is
   declared once, in `ledger/<capture>/capture.json`.
2. When all objects of a row group are on disk, a record with their digests is written, last, and fsynced:
   `ledger/<capture>/<group>.json`. It holds no times, so that a resumed run ends with the same bytes as one that was
   never interrupted; times, host and pid go to `journal.jsonl`.
3. 1,024 records that are all there fold into a segment, `segment-<n>.jsonl`, one record a line. A crash between the
   segment's birth and the records' removal leaves both; `Ledger.tidy` finishes the work.
4. Every record and declaration carries the xxh3-128 of itself and stands where it belongs, so that a rotten ledger is
   an error and not another truth. What of a ledger is missing is for `activations.integrity` to find.
5. One writer at a time: `WriterLock`.
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
from types import TracebackType
from typing import Any

import xxhash

from activations.arrays import ObjectRecord
from activations.errors import IntegrityError, LockedError
from activations.manifest import DIGEST, has_its_digest, with_digest, write_atomically

__all__ = ["GroupRecord", "Journal", "Ledger", "WriterLock"]

RECORDS_PER_SEGMENT = 1024
LOCK_NAME = "lock"
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
    def from_line(cls, line: bytes, path: Path) -> "GroupRecord":
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
                f"The ledger record in {path} is damaged ({error}). Restore the file from a copy; without it the rows "
                "of its row group cannot be told from lost ones."
            ) from error


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


class Ledger:
    """The committed row groups of an artefact, as read when it was opened; a writer adds to it.

    Args:
        folder: the artefact (the ledger lies in its folder `ledger`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ledger"
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
                return
            except FileNotFoundError:
                if attempt == READ_ATTEMPTS - 1:
                    raise
                time.sleep(0.01)

    def _read(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[int, GroupRecord]]]:
        declarations: dict[str, dict[str, Any]] = {}
        records: dict[str, dict[int, GroupRecord]] = {}
        for path in sorted(self.folder.glob("*/capture.json")):
            try:
                declaration = json.loads(path.read_bytes())
                if not has_its_digest(declaration):
                    raise ValueError("its digest differs")
                if declaration["capture"] != path.parent.name:
                    raise ValueError(f"it is that of {declaration['capture']}")
            except ValueError as error:
                raise IntegrityError(f"{path} is damaged ({error}). Restore the file from a copy.") from error
            for name in (DIGEST, "capture"):
                del declaration[name]
            declarations[path.parent.name] = declaration
            records[path.parent.name] = {record.group: record for record in _read_capture(path.parent)}
        for path in self.folder.glob("*/*.json*"):
            declared = path.parent / "capture.json"
            if path.parent.name not in declarations and _is_record(path.name) and not declared.exists():
                raise IntegrityError(f"{declared} is missing. Restore the file from a copy.")
        return declarations, records

    def declare(self, capture: str, content: Mapping[str, Any]) -> None:
        """Make a capture known, once; what is declared already stays as it is."""
        if capture in self.declarations:
            return
        folder = self.folder / capture
        folder.mkdir(parents=True, exist_ok=True)
        declaration = json.dumps(with_digest({**content, "capture": capture}), indent=1, sort_keys=True) + "\n"
        write_atomically(folder / "capture.json", declaration.encode())
        self.declarations[capture] = dict(content)
        self.records[capture] = {}

    def commit(self, record: GroupRecord) -> None:
        """Write a record: from here on its rows exist. Safe to call from several threads."""
        write_atomically(self.folder / record.capture / _record_name(record.group), record.to_line())
        with self._lock:
            self.records[record.capture][record.group] = record
            self._fold(record.capture, record.group // RECORDS_PER_SEGMENT)

    def committed_groups(self, capture: str) -> int:
        """How many row groups are committed from the first on, without a gap."""
        records = self.records.get(capture, {})
        count = self._prefix.get(capture, 0)
        while count in records:
            count += 1
        self._prefix[capture] = count
        return count

    def committed_rows(self, capture: str) -> int:
        """How many rows are committed from the first on, without a gap."""
        groups = self.committed_groups(capture)
        return self.records[capture][groups - 1].row_stop if groups else 0

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
            remove_temporaries(self.folder / capture)
            for segment in range(max(records, default=-1) // RECORDS_PER_SEGMENT + 1):
                self._fold(capture, segment)

    def _fold(self, capture: str, segment: int) -> None:
        records = self.records[capture]
        groups = range(segment * RECORDS_PER_SEGMENT, (segment + 1) * RECORDS_PER_SEGMENT)
        if not all(group in records for group in groups):
            return
        path = self.folder / capture / _segment_name(groups[0])
        if not path.exists():
            write_atomically(path, b"".join(records[group].to_line() for group in groups))
        for group in groups:
            (path.parent / _record_name(group)).unlink(missing_ok=True)


def _record_name(group: int) -> str:
    return f"{group:08d}.json"


def _segment_name(group: int) -> str:
    return f"segment-{group // RECORDS_PER_SEGMENT:06d}.jsonl"


def _is_record(name: str) -> bool:
    return re.fullmatch(r"\d{8}\.json|segment-\d{6}\.jsonl", name) is not None


def _read_capture(folder: Path) -> Iterator[GroupRecord]:
    names = sorted(entry.name for entry in os.scandir(folder) if _is_record(entry.name))
    for name in names:
        path = folder / name
        lines = path.read_bytes().splitlines()
        if len(lines) != (RECORDS_PER_SEGMENT if name.startswith("segment-") else 1):
            raise IntegrityError(f"{path} is damaged: it has {len(lines)} records. Restore the file from a copy.")
        for line in lines:
            record = GroupRecord.from_line(line, path)
            if record.capture != folder.name or name not in (_record_name(record.group), _segment_name(record.group)):
                raise IntegrityError(
                    f"The ledger record in {path} is that of row group {record.group} of {record.capture}. Restore "
                    "the file from a copy."
                )
            yield record
    # A fold between two looks at the folder can hide both a segment and the records in it.
    now = {entry.name for entry in os.scandir(folder) if _is_record(entry.name)}
    if any(name.startswith("segment-") for name in now.difference(names)):
        raise FileNotFoundError(f"{folder} was folded meanwhile")


def remove_temporaries(folder: Path) -> None:
    """Remove what `write_object` and `write_atomically` of a dead writer left in a folder."""
    if folder.is_dir():
        for entry in os.scandir(folder):
            if ".tmp-" in entry.name:
                Path(entry.path).unlink(missing_ok=True)


class Journal:
    """`journal.jsonl`: what happened when, where and by whom; for people, and outside every digest."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"

    def write(self, event: str, **details: Any) -> None:
        """Append an event with time, host and pid. On a full disk it is left out: no run stops for want of it."""
        entry = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "event": event, **details}
        with contextlib.suppress(OSError), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


class WriterLock:
    """The right to write into an artefact; a context manager.

    The file `lock` names host and pid, and is held with `flock`, which the system gives back when its holder dies. So
    a file that can be locked is stale, unless it was written under another kernel (a shared folder, where `flock` may
    not reach): then it is believed and refused.

    Raises:
        LockedError: another writer has it; the message names its host and pid.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> "WriterLock":
        import fcntl

        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._is_current(descriptor):
                    os.close(descriptor)  # its last holder removed it after we had opened it
                    continue
                self._require_stale(os.pread(descriptor, 4096, 0))
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                raise self._refusal(holder) from None
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_whoami()).encode(), 0)
        except BaseException:  # a full disk: a lock that names nobody is no use
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _require_stale(self, content: bytes) -> None:
        holder = _parse_holder(content)
        elsewhere = holder.get("boot_id") != _boot_id() and holder.get("host") != socket.gethostname()
        if holder and elsewhere:
            raise self._refusal(content)

    def _refusal(self, content: bytes) -> LockedError:
        holder = _parse_holder(content)
        return LockedError(
            f"Another writer holds {self.path.parent}: process {holder.get('pid', '(unknown)')} on host "
            f"{holder.get('host', '(unknown)')}. Wait until it has ended; if that host is gone, delete {self.path}."
        )


def _whoami() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _parse_holder(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(content)
        return holder if isinstance(holder, dict) else {}
    return {}
