"""A store in an S3-compatible object store, over obstore; the only importer of it.

1. Requests take long and run well side by side, so that `map` and `read_ranges` work ahead of their caller, by a few
   megabytes at most. Large objects go up in parts, a few of them in memory at once.
2. Who may write is a lease (`activations.locks`); each put first asks whether it still runs. What is written once is
   put with `If-None-Match: *`, and what changes with the `If-Match` of the version that was read.
3. Errors become those of files, which every caller knows.

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from activations.errors import InvalidInputError
from activations.locks import Lease
from activations.storage import SCHEME, OtherSizeError, Ranges, S, T

__all__ = ["ObjectStorage"]

PART_BYTES = 2**23
"""Of a multipart upload."""
PARTS_IN_FLIGHT = 4
REQUEST_BYTES = 2**22
"""Of a request when a long stretch is read."""
REQUESTS_AHEAD = 4
WORKERS = 8
"""Calls side by side, and requests side by side."""
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
INSTANCE_METADATA = "169.254.169.254"
"""Where obstore looks for the credentials of a cloud machine if the environment has none."""
GIVE_UP_AFTER = timedelta(seconds=60)
"""How long a failing request is tried again."""


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
        if wanted := list(names):
            with self._errors(wanted[0]):
                obstore.delete(self._store, wanted)

    def make_folder(self, folder: str) -> None:
        """An object store has no folders."""

    def remove_folder(self, folder: str) -> None:
        names = self.names(folder)
        for name in names:
            if name.endswith("/"):
                self.remove_folder(f"{folder}/{name.rstrip('/')}")
        self.delete(f"{folder}/{name}" for name in names if not name.endswith("/"))

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
