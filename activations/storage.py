"""Where an artefact lies: a local folder, or a prefix of an S3-compatible object store. The only importer of obstore.

Everything that reads or writes a store goes through a `Storage` and names objects by their paths below the artefact,
with forward slashes. What both kinds promise:

1. An object is there whole, or not at all. On a disk it is written under another name and renamed
   (`activations.disk`); in an object store a put is atomic, and a multipart upload shows nothing before it completes.
2. One writer at a time, by `lock` (`activations.locks`). Where the lock can be lost, in an object store, each write
   first asks whether it still holds.
3. `create` and `replace` never overwrite what another writer has put there meanwhile.

Requests to an object store take long and run well side by side, hence `map` and `read_ranges`: there they work ahead of
their caller, a few megabytes at most. Large objects go up in parts, a few of them in memory at once.

An address is `s3://BUCKET/PREFIX`; endpoint, region, credentials and the like come from the usual environment variables
(AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ALLOW_HTTP,
AWS_VIRTUAL_HOSTED_STYLE_REQUEST, …) and from nowhere else.
"""

import contextlib
import itertools
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from activations.disk import sync_folder, write_file
from activations.errors import InvalidInputError
from activations.locks import Lease, WriterLock

__all__ = [
    "LocalStorage",
    "ObjectStorage",
    "OtherSizeError",
    "Storage",
    "StoredObject",
    "below",
    "is_address",
    "storage_at",
]

SCHEME = "s3://"
PART_BYTES = 2**23
"""Of a multipart upload."""
PARTS_IN_FLIGHT = 4
REQUEST_BYTES = 2**22
"""Of a request when a long stretch is read."""
REQUESTS_AHEAD = 4
WORKERS = 8
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
INSTANCE_METADATA = "169.254.169.254"
"""Where obstore looks for the credentials of a cloud machine if the environment has none."""
GIVE_UP_AFTER = timedelta(seconds=60)
"""How long a failing request is tried again."""

Ranges = Sequence[tuple[int, np.ndarray]]
"""Stretches of an object: where each begins, and the uint8 array that takes it."""
T = TypeVar("T")
S = TypeVar("S")


class OtherSizeError(OSError):
    """An object has another size than expected."""

    def __init__(self, size: int) -> None:
        super().__init__(f"an object has {size:,} bytes, which is not what was expected")
        self.size = size


class Storage(Protocol):
    """The objects of one artefact. Names have forward slashes; "" is the artefact itself."""

    location: Path | str
    """The folder, or the address."""

    def where(self, name: str) -> str:
        """An object's path or address, for messages."""
        ...

    def read(self, name: str) -> bytes:
        """A whole object; raises `FileNotFoundError`."""
        ...

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """`function` of each item, in order; a few side by side where that pays. Not to be nested."""
        ...

    def read_ranges(self, name: str, n_bytes: int, ranges: Ranges) -> Iterator[None]:
        """Stretches of an object of `n_bytes` bytes, each copied to its array just before its turn is yielded.

        Raises:
            FileNotFoundError: there is no such object.
            OtherSizeError: it has another size.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object, None if it is not there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of what lies directly in a folder, sorted; those of folders end in a slash. Of a missing
        folder there are none.

        Raises:
            NotADirectoryError: it is a file.
        """
        ...

    def siblings(self) -> list[str]:
        """Paths or addresses of what lies beside the artefact, for near misses."""
        ...

    def write(self, name: str, content: bytes | memoryview) -> str:
        """Put an object whole or not at all, in place of any that is there; return its xxh3-128 (hex)."""
        ...

    def create(self, name: str, content: bytes) -> None:
        """As `write`, for an object that is not there yet, or is the same.

        Raises:
            FileExistsError: another writer has put something else there.
        """
        ...

    def replace(self, name: str, content: bytes) -> None:
        """As `write`, for an object that may be there with this or another content.

        Raises:
            FileExistsError: another writer has changed it meanwhile.
        """
        ...

    def append(self, name: str, line: bytes) -> None:
        """Add a line to a log, which is not protected by the lock."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects, if they are there."""
        ...

    def make_folder(self, folder: str) -> None:
        """Make a folder and those above it, where folders have to be made."""
        ...

    def sync_folder(self, folder: str) -> None:
        """Make the names in a folder last through a power cut."""
        ...

    def remove_temporaries(self, folder: str) -> None:
        """Remove what a dead writer left half written in a folder."""
        ...

    def lock(self) -> AbstractContextManager[Any]:
        """The right to write; raises `LockedError` if another writer has it."""
        ...

    def for_zarr(self) -> Any:
        """What zarr opens: the folder, or an obstore store."""
        ...


@dataclass(frozen=True)
class StoredObject:
    """One object of a storage."""

    storage: Storage
    name: str

    @classmethod
    def of(cls, place: "Path | StoredObject") -> "StoredObject":
        """A file as an object of the folder that it lies in."""
        return cls(LocalStorage(place.parent), place.name) if isinstance(place, Path) else place

    def __str__(self) -> str:
        return self.storage.where(self.name)


def is_address(place: object) -> bool:
    """Whether this names an object store and not a local path."""
    return isinstance(place, str) and place.startswith(SCHEME)


def below(place: str, name: str) -> str:
    """The path or address of `name` below a folder or a prefix of an object store.

    Raises:
        InvalidInputError: `name` says by itself where it lies.
    """
    if is_address(name) or os.path.isabs(name):
        raise InvalidInputError(f"{name!r} cannot lie below {place}; expected a name such as acts.zarr.")
    return f"{place.rstrip('/')}/{name}"


def storage_at(place: "str | Path | Storage") -> Storage:
    """The storage at a local path or an address `s3://BUCKET/PREFIX`.

    Raises:
        InvalidInputError: the address is not one, or the extra `s3` is not installed.
    """
    if isinstance(place, str):
        if is_address(place):
            return ObjectStorage(place)
        if "://" in place:
            raise InvalidInputError(
                f"The address {place!r} is of an unknown kind; expected s3://BUCKET/NAME or a path."
            )
        return LocalStorage(Path(place))
    return LocalStorage(place) if isinstance(place, Path) else place


class LocalStorage:
    """A folder.

    Args:
        folder: the artefact; it may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.location: Path | str = folder
        self._root = folder

    def where(self, name: str) -> str:
        return str(self._root / name)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        return map(function, items)

    def read_ranges(self, name: str, n_bytes: int, ranges: Ranges) -> Iterator[None]:
        with open(self._root / name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != n_bytes:
                raise OtherSizeError(size)
            for offset, target in ranges:
                if os.preadv(file.fileno(), [target.data], offset) != len(target):
                    raise OtherSizeError(os.fstat(file.fileno()).st_size)  # cut meanwhile
                yield

    def size(self, name: str) -> int | None:
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                return sorted(entry.name + "/" * entry.is_dir() for entry in entries)
        except FileNotFoundError:
            return []

    def siblings(self) -> list[str]:
        parent = self._root.parent
        return [str(child) for child in parent.iterdir()] if parent.is_dir() else []

    def write(self, name: str, content: bytes | memoryview) -> str:
        return write_file(self._root / name, content)

    def create(self, name: str, content: bytes) -> None:
        write_file(self._root / name, content)  # the lock has kept others out

    def replace(self, name: str, content: bytes) -> None:
        path = self._root / name
        if not path.is_file() or path.read_bytes() != content:
            write_file(path, content)

    def append(self, name: str, line: bytes) -> None:
        with open(self._root / name, "ab") as file:
            file.write(line)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self._root / name).unlink(missing_ok=True)

    def make_folder(self, folder: str) -> None:
        (self._root / folder).mkdir(parents=True, exist_ok=True)

    def sync_folder(self, folder: str) -> None:
        sync_folder(self._root / folder)

    def remove_temporaries(self, folder: str) -> None:
        self.delete(f"{folder}/{name}".lstrip("/") for name in self.names(folder) if ".tmp-" in name)

    def lock(self) -> WriterLock:
        return WriterLock(self._root)

    def for_zarr(self) -> Path:
        return self._root


class ObjectStorage:
    """A prefix of a bucket in an S3-compatible object store.

    Args:
        address: `s3://BUCKET/PREFIX`.

    Raises:
        InvalidInputError: the address is not one, or the extra `s3` is not installed.
    """

    def __init__(self, address: str) -> None:
        bucket, *segments = address.removeprefix(SCHEME).rstrip("/").split("/")
        if not bucket or not segments or any(segment in ("", ".", "..") for segment in segments):
            raise InvalidInputError(f"The address {address!r} cannot be read; expected s3://BUCKET/NAME.")
        self.address = f"{SCHEME}{bucket}/{'/'.join(segments)}"
        self.location: Path | str = self.address
        self._bucket, self._segments = bucket, segments
        self._store = _s3(bucket, "/".join(segments))
        self._lease: Lease | None = None
        # Two pools, since what runs in the first waits for requests in the second.
        self._workers = ThreadPoolExecutor(WORKERS, "workers")
        self._requests = ThreadPoolExecutor(WORKERS, "requests")

    def where(self, name: str) -> str:
        return f"{self.address}/{name}".rstrip("/")

    def read(self, name: str) -> bytes:
        return self.read_tagged(name)[0]

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        return _ahead(self._workers, function, items, WORKERS)

    def read_ranges(self, name: str, n_bytes: int, ranges: Ranges) -> Iterator[None]:
        if not ranges:
            self._require_size(name, n_bytes)

        def request(stretches: Ranges) -> memoryview:
            return self._stretch(name, n_bytes, stretches[0][0], stretches[-1][0] + len(stretches[-1][1]))

        joined = list(_joined(ranges))
        contents = map(request, joined) if len(joined) == 1 else _ahead(self._requests, request, joined, REQUESTS_AHEAD)
        for stretches, content in zip(joined, contents, strict=True):
            for offset, target in stretches:
                start = offset - stretches[0][0]
                target[:] = np.frombuffer(content[start : start + len(target)], np.uint8)
                yield

    def size(self, name: str) -> int | None:
        import obstore

        with self._errors(name):
            try:
                return int(obstore.head(self._store, name)["size"])
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        return self._names(self._store, folder)

    def siblings(self) -> list[str]:
        above = "/".join([self._bucket, *self._segments[:-1]])
        with contextlib.suppress(OSError):
            names = self._names(_s3(self._bucket), "/".join(self._segments[:-1]))
            return [f"{SCHEME}{above}/{name.rstrip('/')}" for name in names]
        return []

    def write(self, name: str, content: bytes | memoryview) -> str:
        import obstore

        self._require_lease()
        with self._errors(name):
            obstore.put(self._store, name, content, chunk_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT)
        return xxhash.xxh3_128_hexdigest(content)

    def create(self, name: str, content: bytes) -> None:
        self._put_unless_changed(name, content, None)

    def replace(self, name: str, content: bytes) -> None:
        there, tag = self._read_if_there(name)
        if there != content:
            self._put_unless_changed(name, content, tag)

    def append(self, name: str, line: bytes) -> None:
        """Each line is an object of its own, below the log's name without its suffix."""
        stem = name.partition(".")[0]
        self.put_if(f"{stem}/{time.time_ns():020d}-{secrets.token_hex(4)}.json", line, None)

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        self._require_lease()
        wanted = list(names)
        with self._errors(wanted[0] if wanted else ""):
            obstore.delete(self._store, wanted)

    def make_folder(self, folder: str) -> None:
        """An object store has no folders."""

    def sync_folder(self, folder: str) -> None:
        """An answered put has arrived."""

    def remove_temporaries(self, folder: str) -> None:
        """A put that was cut short shows nothing. Parts of a dead multipart upload are the bucket's to clear away (a
        lifecycle rule for incomplete uploads)."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with Lease(self) as self._lease:
            try:
                yield
            finally:
                self._lease = None

    def for_zarr(self) -> Any:
        return self._store

    def read_tagged(self, name: str) -> tuple[bytes, str]:
        """An object's content and the tag of this version of it."""
        import obstore

        with self._errors(name):
            result = obstore.get(self._store, name)
            return bytes(result.bytes()), result.meta["e_tag"] or ""

    def put_if(self, name: str, content: bytes, tag: str | None) -> str:
        """Put an object if its current version has this tag, or with None if there is none; return the new tag.

        Raises:
            FileExistsError: the condition does not hold.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._errors(name):
            try:
                mode: Any = "create" if tag is None else {"e_tag": tag}
                return str(obstore.put(self._store, name, content, mode=mode, use_multipart=False)["e_tag"])
            except (AlreadyExistsError, PreconditionError) as error:
                raise FileExistsError(f"{self.where(name)} was put there by another writer") from error
            except FileNotFoundError as error:
                if tag is None:  # no such bucket
                    raise
                raise FileExistsError(f"{self.where(name)} was deleted") from error

    def _put_unless_changed(self, name: str, content: bytes, tag: str | None) -> None:
        self._require_lease()
        try:
            self.put_if(name, content, tag)
        except FileExistsError:
            self._require_lease()  # says who it was, if it was lost
            # Perhaps an attempt of ours had arrived, and only the answer got lost.
            if self._read_if_there(name)[0] != content:
                raise

    def _read_if_there(self, name: str) -> tuple[bytes | None, str | None]:
        try:
            return self.read_tagged(name)
        except FileNotFoundError:
            return None, None

    def _require_lease(self) -> None:
        if self._lease is not None:
            self._lease.require_held()

    def _require_size(self, name: str, n_bytes: int) -> None:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.where(name)} is not there")
        if size != n_bytes:
            raise OtherSizeError(size)

    def _stretch(self, name: str, n_bytes: int, start: int, stop: int) -> memoryview:
        import obstore

        try:
            with self._errors(name):
                result = obstore.get(self._store, name, options={"range": (start, stop)})
                size, content = result.meta["size"], memoryview(result.bytes())
        except FileNotFoundError:
            raise
        except OSError:
            self._require_size(name, n_bytes)  # a stretch past the end is refused by the server
            raise
        if size != n_bytes:
            raise OtherSizeError(size)
        return content

    def _names(self, store: Any, folder: str) -> list[str]:
        import obstore

        with self._errors(folder):
            found = obstore.list_with_delimiter(store, folder)
        folders = (f"{prefix.rpartition('/')[2]}/" for prefix in found["common_prefixes"])
        return sorted([*folders, *(known["path"].rpartition("/")[2] for known in found["objects"])])

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn obstore's errors into those of files, which every caller knows."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except FileNotFoundError as error:
            kind = OSError if "NoSuchBucket" in str(error) else FileNotFoundError
            raise kind(f"{self.where(name)} is not there ({_reason(error)})") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(f"{self.where(name)} is not allowed ({_reason(error)})") from error
        except BaseError as error:
            raise OSError(f"{self.where(name)} could not be read or written ({_reason(error)})") from error


def _s3(bucket: str, prefix: str | None = None) -> Any:
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    if endpoint.startswith("http:") and os.environ.get("AWS_ALLOW_HTTP", "").lower() not in ("true", "1"):
        raise InvalidInputError(
            f"The endpoint {endpoint} has no TLS, so that everybody on the way reads along. Set AWS_ALLOW_HTTP=true if "
            "that may be, or give one with https."
        )
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise InvalidInputError(
            f"{SCHEME}{bucket} is in an object store, which needs the package obstore: "
            "pip install 'scope-workbench[s3]'."
        ) from error
    return S3Store(bucket, prefix=prefix, retry_config={"retry_timeout": GIVE_UP_AFTER})


def _reason(error: Exception) -> str:
    """The server's own words, or what happened on the way to it."""
    if INSTANCE_METADATA in str(error):
        return "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    said = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", str(error), re.DOTALL)
    return f"{said[1]}: {said[2]}" if said else str(error).partition("\n")[0]


def _ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], in_flight: int) -> Iterator[T]:
    """`map`, but up to `in_flight` calls run ahead of the caller."""
    waiting: deque[Future[T]] = deque()
    left = iter(items)
    try:
        while True:
            waiting.extend(pool.submit(function, item) for item in itertools.islice(left, in_flight - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])  # nothing goes on behind the caller's back


def _joined(ranges: Ranges) -> Iterator[Ranges]:
    """Ascending stretches gathered into requests that span about `REQUEST_BYTES` each."""
    batch: list[tuple[int, np.ndarray]] = []
    for offset, target in ranges:
        if batch and offset + len(target) - batch[0][0] > REQUEST_BYTES:
            yield batch
            batch = []
        batch.append((offset, target))
    if batch:
        yield batch
