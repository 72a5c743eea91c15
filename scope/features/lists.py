"""Long compressed lists: one-dimensional Zarr v3 arrays, written by appending and read a piece at a time.

A list lies in shards of 2^24 entries, each made of inner chunks of 2^16 (blosc-zstd with bitshuffle, then a crc32c),
so that any part of a list of billions costs one or two chunks. Any Zarr reader opens it; here the shards are put
together and taken apart directly, which needs no Zarr and half the time. A shard appears whole or not at all.
"""

import json
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import numpy as np

from scope.errors import IntegrityError
from scope.features.digests import gone

__all__ = ["CHUNK", "SHARD", "ListReader", "ListWriter"]

CHUNK: Final = 2**16
"""Entries in an inner chunk."""
SHARD: Final = 2**24
"""Entries in a shard."""
LEVEL: Final = 5

_CRC = struct.Struct("<I")
_MISSING = 2**64 - 1
_INDEX_BYTES = SHARD // CHUNK * 16


class ListWriter:
    """Appends to a new list; `close` commits the last shard and the array's metadata.

    Args:
        folder: the array's folder, which is made.
        dtype: dtype of the entries, a numpy integer type.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._pending: list[np.ndarray] = []
        self._n_pending = 0
        self._length = 0
        self._file: BinaryIO | None = None
        self._extents: list[tuple[int, int]] = []

    def append(self, entries: np.ndarray) -> None:
        """Add entries at the end."""
        self._pending.append(entries.astype(self._dtype))
        self._n_pending += len(entries)
        if self._n_pending >= CHUNK:
            self._flush(whole_chunks=True)

    def close(self) -> None:
        """Commit what was appended."""
        self._flush(whole_chunks=False)
        if self._file is not None:
            self._close_shard()
        metadata = json.dumps(_metadata(self._length, self._dtype), indent=1).encode()
        (self._folder / "zarr.json").write_bytes(metadata)

    def _flush(self, whole_chunks: bool) -> None:
        entries = np.concatenate(self._pending) if self._pending else np.empty(0, self._dtype)
        end = len(entries) // CHUNK * CHUNK if whole_chunks else len(entries)
        for start in range(0, end, CHUNK):
            self._write_chunk(entries[start : min(start + CHUNK, end)])
        rest = entries[end:]
        self._pending, self._n_pending = [rest], len(rest)

    def _write_chunk(self, entries: np.ndarray) -> None:
        from numcodecs import blosc  # type: ignore[import-untyped]

        if self._file is None:
            self._file = open(self._shard_path().with_suffix(".part"), "wb")  # noqa: SIM115
        self._length += len(entries)
        if len(entries) < CHUNK:
            entries = np.concatenate([entries, np.zeros(CHUNK - len(entries), self._dtype)])
        content = blosc.compress(np.ascontiguousarray(entries), b"zstd", LEVEL, blosc.BITSHUFFLE)
        content += _CRC.pack(google_crc32c.value(content))
        self._extents.append((self._file.tell(), len(content)))
        self._file.write(content)
        if len(self._extents) == SHARD // CHUNK:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._file is not None
        index = np.full((SHARD // CHUNK, 2), _MISSING, "<u8")
        index[: len(self._extents)] = self._extents
        content = index.tobytes()
        self._file.write(content + _CRC.pack(google_crc32c.value(content)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        part = Path(self._file.name)
        os.replace(part, part.with_suffix(""))
        self._file = None
        self._extents = []

    def _shard_path(self) -> Path:
        # The suffix is a placeholder that with_suffix replaces.
        return self._folder / f"c.{self._length // SHARD}.x"


class ListReader:
    """Reads a list that `ListWriter` wrote. Safe across threads.

    Raises:
        IntegrityError: the array's metadata is missing or is not what a `ListWriter` writes.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        try:
            metadata = json.loads((folder / "zarr.json").read_text())
            self._length = int(metadata["shape"][0])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise IntegrityError(f"{folder / 'zarr.json'} cannot be read ({error}).") from error
        if metadata != _metadata(self._length, self._dtype):
            raise IntegrityError(f"{folder / 'zarr.json'} does not describe a list of {dtype}.")
        self._lock = threading.Lock()
        self._open: dict[int, tuple[int, np.ndarray]] = {}
        weakref.finalize(self, _close_all, self._open)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop`.

        Raises:
            IntegrityError: a shard is missing or damaged.
        """
        out = np.empty(max(0, stop - start), self._dtype)
        for chunk in range(start // CHUNK, -(-stop // CHUNK) if stop > start else start // CHUNK):
            first, last = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
            out[first - start : last - start] = self._chunk(chunk)[first - chunk * CHUNK : last - chunk * CHUNK]
        return out

    def take(self, places: np.ndarray) -> np.ndarray:
        """Entries at `places`, in their order; a chunk is read once."""
        order = np.argsort(places, kind="stable")
        ascending = places[order]
        taken = np.empty(len(places), self._dtype)
        start = 0
        while start < len(places):
            chunk = int(ascending[start]) // CHUNK
            stop = int(np.searchsorted(ascending, (chunk + 1) * CHUNK))
            taken[start:stop] = self._chunk(chunk)[ascending[start:stop] - chunk * CHUNK]
            start = stop
        out = np.empty(len(places), self._dtype)
        out[order] = taken
        return out

    def _chunk(self, chunk: int) -> np.ndarray:
        from numcodecs import blosc

        shard, place = divmod(chunk, SHARD // CHUNK)
        descriptor, index = self._shard(shard)
        offset, size = (int(number) for number in index[place])
        content = os.pread(descriptor, size, offset) if size != _MISSING else b""
        body, crc = content[: -_CRC.size], content[-_CRC.size :]
        if len(content) != size or _CRC.pack(google_crc32c.value(body)) != crc:
            raise IntegrityError(
                f"{self._folder / f'c.{shard}'} is damaged in chunk {place}. Build the index again; "
                "`scope verify` lists all faults."
            )
        return np.frombuffer(blosc.decompress(body), self._dtype)

    def _shard(self, shard: int) -> tuple[int, np.ndarray]:
        with self._lock:
            if shard not in self._open:
                path = self._folder / f"c.{shard}"
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise IntegrityError(gone(path)) from error
                size = os.fstat(descriptor).st_size
                tail = os.pread(descriptor, _INDEX_BYTES + _CRC.size, max(0, size - _INDEX_BYTES - _CRC.size))
                body = tail[:_INDEX_BYTES]
                if tail[_INDEX_BYTES:] != _CRC.pack(google_crc32c.value(body)):
                    os.close(descriptor)
                    raise IntegrityError(f"{path} is damaged in its index. Build the index again.")
                self._open[shard] = (descriptor, np.frombuffer(body, "<u8").reshape(-1, 2))
            return self._open[shard]


def _metadata(length: int, dtype: np.dtype) -> dict[str, object]:
    """The content of `zarr.json`."""
    blosc = {"cname": "zstd", "clevel": LEVEL, "shuffle": "bitshuffle", "typesize": dtype.itemsize, "blocksize": 0}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [CHUNK],
        "codecs": [little, {"name": "blosc", "configuration": blosc}, crc],
        "index_codecs": [little, crc],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [length],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "storage_transformers": [],
    }


def _close_all(opened: dict[int, tuple[int, np.ndarray]]) -> None:
    for descriptor, _ in opened.values():
        os.close(descriptor)
    opened.clear()
