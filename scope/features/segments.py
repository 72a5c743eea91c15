"""The first phase of a build: segments of rows, each committed whole.

1. Batches gather until a segment has enough firings.
2. Its firings are appended to the flat arrays of `by_token/`, its tokens to `rows/`, and its firings, packed and
   sorted by feature (see `firings`), become a *run* in `build/`.
3. All is fsynced, then `build/NNNNNN.json` is written: rows, firings, and the xxh3-128 digests of the parts. **A
   segment exists when its record does.** What a dead writer appended beyond the last record is cut off on resume.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from activations.manifest import write_atomically
from scope.errors import IntegrityError
from scope.features.firings import RowFirings, bits_for, pack
from scope.features.layout import ROW_COLUMNS, dtype_of, feature_dtype, file_of

__all__ = ["Segment", "SegmentLog"]


@dataclass(frozen=True)
class Segment:
    """A committed segment."""

    number: int
    start: int
    """First row."""
    stop: int
    """One past the last row."""
    firing_start: int
    """Firings before this segment."""
    firing_stop: int
    n_indexed: int
    """Rows of the segment on which features may fire."""
    digests: dict[str, str]
    """xxh3-128 (hex) of what the segment added to each array, and of its run."""

    @property
    def row_bits(self) -> int:
        """Bits of the row part in the segment's run, which counts rows from the segment's first."""
        return bits_for(self.stop - self.start)


class SegmentLog:
    """The segments of an index under construction: appends new ones, finds the committed ones again.

    Args:
        folder: the index.
        d_sae: number of features.
    """

    def __init__(self, folder: Path, d_sae: int) -> None:
        self.folder = folder
        self.d_sae = d_sae
        self.build = folder / "build"
        self.arrays = {
            "by_token/indptr": "int64",
            "by_token/feature": feature_dtype(d_sae),
            "by_token/value": "bfloat16",
            **{f"rows/{name}": dtype for name, dtype in ROW_COLUMNS.items()},
        }
        for part in ("by_token", "rows", "build"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.segments = self._committed()
        self._cut_back()

    @property
    def n_rows(self) -> int:
        return self.segments[-1].stop if self.segments else 0

    @property
    def n_firings(self) -> int:
        return self.segments[-1].firing_stop if self.segments else 0

    def commit(self, firings: RowFirings, columns: dict[str, np.ndarray], n_indexed: int) -> Segment:
        """Append the rows that follow the last committed one.

        Args:
            firings: what fires on them.
            columns: the columns of `rows/`, `(n,)` each.
            n_indexed: rows among them on which features may fire.
        """
        n = len(firings.counts)
        start, firing_start = self.n_rows, self.n_firings
        number = len(self.segments)
        ends = firing_start + np.cumsum(firings.counts)
        parts = {
            "by_token/indptr": ends if number else np.concatenate([[0], ends]),
            "by_token/feature": firings.features,
            "by_token/value": firings.values,
            **{f"rows/{name}": columns[name] for name in ROW_COLUMNS},
        }
        digests = {}
        for name, dtype in self.arrays.items():
            digests[name] = _append(file_of(self.folder, name, dtype), parts[name].astype(dtype_of(dtype)))
        run = pack(firings.features, firings.values, np.repeat(np.arange(n), firings.counts), bits_for(n))
        run.sort()
        run_path = self.run_path(number)
        run_path.unlink(missing_ok=True)
        digests["run"] = _append(run_path, run)
        stop, firing_stop = start + n, firing_start + len(firings.features)
        segment = Segment(number, start, stop, firing_start, firing_stop, int(n_indexed), digests)
        write_atomically(self.build / f"{number:06d}.json", json.dumps(asdict(segment)).encode())
        self.segments.append(segment)
        return segment

    def run_path(self, number: int) -> Path:
        """The file of a segment's packed and sorted firings."""
        return self.build / f"{number:06d}.run.uint64"

    def check(self, segment: Segment) -> None:
        """Compare a segment's bytes with its record; raises IntegrityError."""
        for name, dtype in self.arrays.items():
            first, last = self._extent(name, segment)
            with open(file_of(self.folder, name, dtype), "rb") as file:
                file.seek(first)
                if _digest(file, last - first) != segment.digests[name]:
                    raise IntegrityError(self._rotten(file_of(self.folder, name, dtype)))
        with open(self.run_path(segment.number), "rb") as file:
            if _digest(file, 8 * (segment.firing_stop - segment.firing_start)) != segment.digests["run"]:
                raise IntegrityError(self._rotten(self.run_path(segment.number)))

    def _rotten(self, path: Path) -> str:
        return f"{path} changed after it was written. Delete {self.folder} and build the index again."

    def _extent(self, name: str, segment: Segment) -> tuple[int, int]:
        """Bytes of an array's file that a segment wrote."""
        if name == "by_token/indptr":
            first, last = segment.start + (segment.number > 0), segment.stop + 1
        elif name.startswith("by_token/"):
            first, last = segment.firing_start, segment.firing_stop
        else:
            first, last = segment.start, segment.stop
        size = dtype_of(self.arrays[name]).itemsize
        return first * size, last * size

    def _committed(self) -> list[Segment]:
        segments: list[Segment] = []
        while (path := self.build / f"{len(segments):06d}.json").is_file():
            try:
                content: dict[str, Any] = json.loads(path.read_text())
                segment = Segment(**content)
            except (ValueError, TypeError) as error:
                raise IntegrityError(self._rotten(path)) from error
            segments.append(segment)
        return segments

    def _cut_back(self) -> None:
        for name, dtype in self.arrays.items():
            path = file_of(self.folder, name, dtype)
            length = self._extent(name, self.segments[-1])[1] if self.segments else 0
            if not path.exists():
                path.touch()
            if path.stat().st_size < length:
                raise IntegrityError(self._rotten(path))
            os.truncate(path, length)


def _append(path: Path, array: np.ndarray) -> str:
    """Append an array's bytes, fsync, and return their digest."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return xxhash.xxh3_128_hexdigest(data)


def _digest(file: Any, n_bytes: int) -> str:
    digest = xxhash.xxh3_128()
    for piece in _pieces(file, n_bytes):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Any, n_bytes: int) -> Iterator[bytes]:
    while n_bytes > 0 and (piece := file.read(min(n_bytes, 2**22))):
        n_bytes -= len(piece)
        yield piece
