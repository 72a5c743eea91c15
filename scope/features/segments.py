"""The first phase of a build: segments of rows, each committed whole.

1. Batches gather until a segment has enough firings.
2. Its firings are appended to the flat arrays of `by_token/`, its tokens to `rows/`, and its firings, packed and
   sorted by feature (see `firings`), become a *run* in `build/`.
3. The strengths that features have on rows left out (BOS and the like) are added up; the sums so far are a file too.
4. All is fsynced, then `build/NNNNNN.json` is written: rows, firings, and the xxh3-128 digests of the parts. **A
   segment exists when its record does.** What a dead writer appended beyond the last record is cut off on resume.

An index that grows is appended to in the same way, from the rows that it has (`Grown`).
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from activations.manifest import write_atomically
from activations.source import bf16_to_float32
from scope.errors import IntegrityError
from scope.features.firings import RowFirings, bits_for, pack
from scope.features.layout import ROW_COLUMNS, dtype_of, feature_dtype, file_of

__all__ = ["Grown", "LeftOut", "Segment", "SegmentLog"]


class LeftOut(NamedTuple):
    """What would fire on rows that are left out, row after row, `(n,)` each."""

    features: np.ndarray
    """uint32."""
    values: np.ndarray
    """bfloat16 bits, uint16."""


class Grown(NamedTuple):
    """What an index that grows holds already."""

    n_rows: int
    n_firings: int
    special: np.ndarray
    """float64 `(d_sae,)`, as `SegmentLog.special`."""


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
        grown: what it held before, where it grows.
        spoken: the columns of chats that its rows have besides, with their dtypes.
    """

    def __init__(
        self, folder: Path, d_sae: int, grown: Grown | None = None, spoken: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.d_sae = d_sae
        self.grown = grown or Grown(0, 0, np.zeros(d_sae))
        self.build = folder / "build"
        self.columns = ROW_COLUMNS | dict(spoken or {})
        """The columns of `rows/` and their dtypes."""
        self.arrays = {
            "by_token/indptr": "int64",
            "by_token/feature": feature_dtype(d_sae),
            "by_token/value": "bfloat16",
            **{f"rows/{name}": dtype for name, dtype in self.columns.items()},
        }
        for part in ("by_token", "rows", "build"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.segments = self._committed()
        self._cut_back()
        self.special = self._special_sums()
        """float64 `(d_sae,)`: the sum of |strength| over the rows left out. Added up one row after the other, so that
        it does not depend on where segments end."""

    @property
    def n_rows(self) -> int:
        return self.segments[-1].stop if self.segments else self.grown.n_rows

    @property
    def n_firings(self) -> int:
        return self.segments[-1].firing_stop if self.segments else self.grown.n_firings

    def commit(
        self, firings: RowFirings, columns: dict[str, np.ndarray], n_indexed: int, left_out: LeftOut | None = None
    ) -> Segment:
        """Append the rows that follow the last committed one.

        Args:
            firings: what fires on them.
            columns: the columns of `rows/`, `(n,)` each.
            n_indexed: rows among them on which features may fire.
            left_out: what would fire on the others.
        """
        n = len(firings.counts)
        start, firing_start = self.n_rows, self.n_firings
        number = len(self.segments)
        ends = firing_start + np.cumsum(firings.counts)
        parts = {
            "by_token/indptr": ends if start else np.concatenate([[0], ends]),
            "by_token/feature": firings.features,
            "by_token/value": firings.values,
            **{f"rows/{name}": columns[name] for name in self.columns},
        }
        digests = {}
        for name, dtype in self.arrays.items():
            digests[name] = _append(file_of(self.folder, name, dtype), parts[name].astype(dtype_of(dtype)))
        run = pack(firings.features, firings.values, np.repeat(np.arange(n), firings.counts), bits_for(n))
        run.sort()
        run_path = self.run_path(number)
        run_path.unlink(missing_ok=True)
        digests["run"] = _append(run_path, run)
        special = self.special.copy()
        if left_out is not None:
            np.add.at(special, left_out.features, np.abs(bf16_to_float32(left_out.values)).astype(np.float64))
        self._special_path(number).unlink(missing_ok=True)
        digests["special"] = _append(self._special_path(number), special)
        stop, firing_stop = start + n, firing_start + len(firings.features)
        segment = Segment(number, start, stop, firing_start, firing_stop, int(n_indexed), digests)
        write_atomically(self.build / f"{number:06d}.json", json.dumps(asdict(segment)).encode())
        self.segments.append(segment)
        self.special = special
        self._special_path(number - 1).unlink(missing_ok=True)
        return segment

    def run_path(self, number: int) -> Path:
        """The file of a segment's packed and sorted firings."""
        return self.build / f"{number:06d}.run.uint64"

    def _special_path(self, number: int) -> Path:
        return self.build / f"{number:06d}.special.float64"

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
        if self.grown.n_rows:
            return f"{path} changed after it was written. Delete {self.build} and let the index grow again."
        return f"{path} changed after it was written. Delete {self.folder} and build the index again."

    def _extent(self, name: str, segment: Segment) -> tuple[int, int]:
        """Bytes of an array's file that a segment wrote."""
        if name == "by_token/indptr" and segment.stop == 0:
            first, last = 0, 0
        elif name == "by_token/indptr":
            first, last = segment.start + (segment.start > 0), segment.stop + 1
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

    def _before(self) -> Segment:
        """What was there before the first segment, as one."""
        return Segment(-1, 0, self.grown.n_rows, 0, self.grown.n_firings, 0, {})

    def _special_sums(self) -> np.ndarray:
        if not self.segments:
            return self.grown.special.astype(np.float64)
        last = self.segments[-1]
        path = self._special_path(last.number)
        content = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128_hexdigest(content) != last.digests["special"]:
            raise IntegrityError(self._rotten(path))
        return np.frombuffer(content, "<f8").astype(np.float64)

    def _cut_back(self) -> None:
        for name, dtype in self.arrays.items():
            path = file_of(self.folder, name, dtype)
            length = self._extent(name, self.segments[-1] if self.segments else self._before())[1]
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
