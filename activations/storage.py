"""Where an artefact lies: a local folder, or a prefix of an S3-compatible object store (`activations.objectstore`).

Everything that reads or writes a store goes through a `Storage` and names objects by their paths below the artefact,
with forward slashes. What both kinds promise:

1. An object is there whole, or not at all. On a disk it is written under another name and renamed
   (`activations.disk`); in an object store a put is atomic, and a multipart upload shows nothing before it completes.
2. One writer at a time, by `lock` (`activations.locks`). Where the lock can be lost, in an object store, each write
   first asks whether it still holds.
3. `create` and `replace` never overwrite what another writer has put there meanwhile.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from activations.disk import sync_folder, write_file
from activations.errors import InvalidInputError
from activations.locks import WriterLock

__all__ = [
    "LocalStorage",
    "OtherSizeError",
    "Storage",
    "StoredObject",
    "below",
    "is_address",
    "storage_at",
]

SCHEME = "s3://"
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

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all objects in it, if it is there."""
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
            from activations.objectstore import ObjectStorage

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

    def remove_folder(self, folder: str) -> None:
        if (self._root / folder).is_dir():
            shutil.rmtree(self._root / folder)

    def sync_folder(self, folder: str) -> None:
        sync_folder(self._root / folder)

    def remove_temporaries(self, folder: str) -> None:
        self.delete(f"{folder}/{name}".lstrip("/") for name in self.names(folder) if ".tmp-" in name)

    def lock(self) -> WriterLock:
        return WriterLock(self._root)

    def for_zarr(self) -> Path:
        return self._root
