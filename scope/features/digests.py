"""Digests of files, block by block, and memory-mapped arrays that check a block before its first use.

A file of an index is hashed in blocks of 1 MiB (xxh3-128). Reading an array checks the blocks that it touches, once
each, so that a flipped bit raises `IntegrityError` instead of showing up as a firing, and opening stays instant.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from activations.manifest import write_atomically
from scope.errors import IntegrityError
from scope.features.layout import is_appended, place_of

__all__ = ["BLOCK", "CheckedArray", "digest_file", "gone", "read_digests", "write_digests"]

BLOCK = 2**20

Digests = dict[str, dict[str, Any]]
"""Per path inside the index: `bytes` and `blocks`, the digests (hex) of its blocks."""


def gone(path: Path) -> str:
    """What to say of a file that was there when the index was opened."""
    return f"{path} is missing. If the index has grown since it was opened, open it again; else build it again."


def digest_file(
    path: Path, progress: Callable[[int], None] | None = None, n_bytes: int | None = None
) -> dict[str, Any]:
    """Size and block digests of a file, or of its first `n_bytes`; `progress` is told the bytes of each block."""
    blocks = []
    size = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK if n_bytes is None else min(BLOCK, n_bytes - size)):
            blocks.append(xxhash.xxh3_128_hexdigest(block))
            size += len(block)
            if progress is not None:
                progress(len(block))
    return {"bytes": size, "blocks": blocks}


def write_digests(folder: Path, digests: Mapping[str, Mapping[str, Any]], derived: str = "") -> None:
    """Record the digests of an index, with a digest of the record itself; `derived` as in the manifest."""
    body = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    record = {"digest": xxhash.xxh3_128_hexdigest(body.encode()), "files": digests}
    write_atomically(
        folder / derived / "digests.json", json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    )


def read_digests(folder: Path, derived: str = "") -> Digests:
    """What `write_digests` recorded.

    Raises:
        IntegrityError: the record is missing or damaged, or a file is missing or has another size.
    """
    path = folder / derived / "digests.json"
    try:
        record = json.loads(path.read_text())
        files: Digests = record["files"]
        body = json.dumps(files, sort_keys=True, separators=(",", ":"))
        sound = record["digest"] == xxhash.xxh3_128_hexdigest(body.encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}). Build the index again.") from error
    if not sound:
        raise IntegrityError(f"{path} is damaged: its own digest does not fit. Build the index again.")
    for name, entry in files.items():
        file = place_of(folder, name, derived)
        if not file.is_file():
            raise IntegrityError(f"{file} is missing. Build the index again.")
        size = file.stat().st_size
        if size < entry["bytes"] or (size > entry["bytes"] and not is_appended(name)):
            raise IntegrityError(
                f"{file} has {size:,} bytes; the ledger says {entry['bytes']:,}. Build the index again."
            )
    return files


class CheckedArray:
    """A flat array on disk, memory-mapped, whose blocks are checked before their first use. Safe across threads.

    Args:
        path: the file.
        dtype: dtype of its entries in memory.
        shape: shape of the array.
        entry: the file's entry in the digests.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: Sequence[int], entry: Mapping[str, Any]) -> None:
        self.path = path
        self.shape = tuple(shape)
        self.dtype = dtype
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * dtype.itemsize
        if len(self) * self._row_bytes != entry["bytes"]:
            raise IntegrityError(f"{path} has {entry['bytes']:,} bytes; an array of shape {self.shape} has not.")
        empty = entry["bytes"] == 0
        # No more of the file than is recorded: it may be growing.
        try:
            mapped = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r", shape=(entry["bytes"],))
        except FileNotFoundError as error:
            raise IntegrityError(gone(path)) from error
        self._bytes = np.asarray(mapped)
        self._array = self._bytes.view(dtype).reshape(self.shape)
        self._digests: list[str] = entry["blocks"]
        # Two threads may both check a block; either writes the same truth.
        self._checked = np.zeros(len(self._digests), dtype=bool)
        self._all_checked = False

    def __len__(self) -> int:
        return self.shape[0]

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` along the first axis, without a copy."""
        if stop > start:
            self._check(np.arange(start * self._row_bytes // BLOCK, (stop * self._row_bytes - 1) // BLOCK + 1))
        return self._array[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        """Entries at `places` along the first axis."""
        if len(places) and not self._all_checked:
            first = places * self._row_bytes // BLOCK
            last = (places * self._row_bytes + self._row_bytes - 1) // BLOCK
            touched = np.zeros(len(self._digests), dtype=bool)
            touched[first] = touched[last] = True
            self._check(np.flatnonzero(touched & ~self._checked))
        return self._array[places]

    def all(self) -> np.ndarray:
        """The whole array, without a copy."""
        return self.slice(0, len(self))

    @property
    def memory(self) -> np.ndarray:
        """The whole array, unchecked: for what `check_spans` has checked."""
        return self._array

    def check_spans(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Check the blocks that hold entries `starts` to `stops`, int64 `(n,)` each, many spans at once."""
        if self._all_checked or not len(starts):
            return
        first = starts * self._row_bytes // BLOCK
        last = np.maximum(stops * self._row_bytes - 1, 0) // BLOCK
        full = stops > starts
        edges = np.zeros(len(self._digests) + 1, np.int64)
        np.add.at(edges, first[full], 1)
        np.add.at(edges, last[full] + 1, -1)
        self._check(np.flatnonzero(np.cumsum(edges[:-1]) > 0))

    def _check(self, blocks: np.ndarray) -> None:
        for block in blocks[~self._checked[blocks]]:
            content = self._bytes[block * BLOCK : (block + 1) * BLOCK]
            if xxhash.xxh3_128_hexdigest(content.data) != self._digests[block]:
                raise IntegrityError(
                    f"{self.path} is damaged in bytes {block * BLOCK:,} to {block * BLOCK + len(content):,}. "
                    "Build the index again; `scope verify` lists all faults."
                )
            self._checked[block] = True
            self._all_checked = self._all_checked or bool(self._checked.all())
