"""The right to write into an artefact: a lock on a local disk, a lease in an object store.

On a local disk the file `lock` names host and pid, and is held with `flock` (`WriterLock`).

An object store has no `flock`, and its writers may run on any host, so the right runs out by itself (`Lease`; Gray and
Cheriton, "Leases", SOSP 1989):

1. The object `lock` names host, pid and a random token, and says when the lease expires. It is created only if absent
   (`If-None-Match: *`). One that expired, was given back, or belongs to a dead process of this machine is replaced
   only if it is still the one that was read (`If-Match`). So of any number of writers one gets it.
2. A thread renews it several times before it expires, again with `If-Match`.
3. Before each write its holder asks its own clock whether the lease still runs, and if not, renews it or stops. A
   process that slept through its lease therefore writes nothing more once another has it. What was on its way to the
   server at that moment may still arrive. So objects that are created once are created only if absent, those that
   change are replaced only if they are still the ones that were read, and rows, which are written unconditionally
   (the parts of a large object cannot be otherwise), have the bytes that the next writer gives them as well.
4. It is given back by replacing it with an empty one, under the same condition. Deleting it could hit the lease of the
   next writer.

The clocks of hosts may differ by `SKEW_SECONDS`.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from activations.errors import InvalidInputError, LockedError

__all__ = ["LOCK_NAME", "ConditionalStore", "Lease", "WriterLock"]

LOCK_NAME = "lock"
LEASE_SECONDS = 60.0
RENEWALS = 3
"""Attempts to renew a lease within its length."""
SKEW_SECONDS = 5.0
NOBODY = b"{}"
"""The content of a lease that was given back."""
NO_TAG = '"00000000000000000000000000000000"'
"""A tag that no version of an object has."""


class WriterLock:
    """The right to write into an artefact on a local disk; a context manager.

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
        return LockedError(
            f"Another writer holds {self.path.parent}: {_name(_parse_holder(content))}. Wait until it has ended; if "
            f"that host is gone, delete {self.path}."
        )


class ConditionalStore(Protocol):
    """What a lease needs of an object store."""

    address: str

    def read_tagged(self, name: str) -> tuple[bytes, str]:
        """An object's content and the tag of this version of it; raises `FileNotFoundError`."""
        ...

    def put_if(self, name: str, content: bytes, tag: str | None) -> str:
        """Put an object if its current version has this tag, or with None if there is none; return the new tag.

        Raises:
            FileExistsError: the condition does not hold.
        """
        ...


class Lease:
    """The right to write into an artefact in an object store, for a while; a context manager.

    Args:
        store: where the artefact lies.

    Raises:
        LockedError: another writer has it; the message names its host and pid, and when its lease expires.
        InvalidInputError: the server ignores conditions, so nothing can be kept apart there.
    """

    def __init__(self, store: ConditionalStore) -> None:
        self._store = store
        self._token = secrets.token_hex(8)
        self._tag = ""
        self._until = 0.0
        self._taken_by: dict[str, Any] | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        while not self._try():
            pass  # somebody else was quicker: see who
        try:
            self._require_conditions()
        except BaseException:
            self._give_back()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._give_back()

    def require_held(self) -> None:
        """Raise `LockedError` if the lease was lost."""
        if self._taken_by is None and _now() >= self._until:
            try:
                self._renew()
            except OSError as error:
                raise LockedError(f"{self._loss()} It could not be renewed: {error}.") from error
        if self._taken_by is not None:
            since = "Another writer has had it since, or it was deleted."
            to = f"It belongs to {_name(self._taken_by)} now." if self._taken_by else since
            raise LockedError(
                f"{self._loss()} {to} Nothing more was committed; run the same again when no other writer is at work."
            )

    def _give_back(self) -> None:
        with self._renewing, contextlib.suppress(OSError):  # what cannot be given back expires by itself
            if self._taken_by is None:
                self._store.put_if(LOCK_NAME, NOBODY, self._tag)

    def _loss(self) -> str:
        return f"This process ({os.getpid()}) lost its lease on {self._store.address}."

    def _try(self) -> bool:
        """Take the lease if it is free; False if it changed hands meanwhile."""
        holder, tag = self._read()
        # One of ours is there if it had arrived, and only its answer got lost.
        if holder.get("token") != self._token and not _is_free(holder):
            raise self._refusal(holder)
        began = _now()
        try:
            self._hold(self._store.put_if(LOCK_NAME, self._content(), tag or None), began)
        except FileExistsError:
            return False
        return True

    def _require_conditions(self) -> None:
        for condition, tag in (("If-None-Match", None), ("If-Match", NO_TAG)):
            with contextlib.suppress(FileExistsError):
                self._tag = self._store.put_if(LOCK_NAME, NOBODY, tag)
                raise InvalidInputError(
                    f"The server of {self._store.address} ignores the condition {condition} of a put, so that two "
                    "writers could not be kept apart. Write to a server that honours it, or to a local folder."
                )

    def _keep(self) -> None:
        """Body of the thread."""
        while not self._ended.wait(LEASE_SECONDS / RENEWALS):
            with contextlib.suppress(OSError):  # tried again; `require_held` stops the writer when time is up
                self._renew()
            if self._taken_by is not None:
                return

    def _renew(self) -> None:
        with self._renewing:
            while self._taken_by is None:
                began = _now()
                try:
                    self._hold(self._store.put_if(LOCK_NAME, self._content(), self._tag), began)
                    return
                except FileExistsError:
                    holder, self._tag = self._read()
                if holder.get("token") != self._token:  # else an earlier renewal had arrived, and its answer got lost
                    self._taken_by = holder

    def _read(self) -> tuple[dict[str, Any], str]:
        try:
            content, tag = self._store.read_tagged(LOCK_NAME)
        except FileNotFoundError:  # deleted by hand
            return {}, ""
        return _parse_holder(content), tag

    def _hold(self, tag: str, began: float) -> None:
        self._tag, self._until = tag, began + LEASE_SECONDS

    def _content(self) -> bytes:
        expires = time.time() + LEASE_SECONDS
        return json.dumps({**_whoami(), "namespace": _namespace(), "token": self._token, "expires": expires}).encode()

    def _refusal(self, holder: dict[str, Any]) -> LockedError:
        at = datetime.fromtimestamp(holder["expires"] + SKEW_SECONDS, UTC)
        return LockedError(
            f"Another writer holds {self._store.address}: {_name(holder)}. Wait until it has ended; if it is gone "
            f"already, its lease runs out at {at:%H:%M:%S} UTC."
        )


def _is_free(holder: dict[str, Any]) -> bool:
    """Whether a lease may be taken from its holder."""
    expires = holder.get("expires")
    if not isinstance(expires, (int, float)) or time.time() > expires + SKEW_SECONDS:
        return True
    here = {**_whoami(), "namespace": _namespace()}
    if any(holder.get(name) != here[name] for name in ("host", "boot_id", "namespace")):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _now() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine is suspended where there is such one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _whoami() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": _boot_id()}


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    """What tells containers of one machine apart, whose pids mean different processes."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '(unknown)')} on host {holder.get('host', '(unknown)')}"


def _parse_holder(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        holder = json.loads(content)
        return holder if isinstance(holder, dict) else {}
    return {}
