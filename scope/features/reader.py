"""`IndexReader`: the arrays and tables of an index as they lie on disk, checked as they are read.

`FeatureIndex` is what people use; it stands on this.
"""

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from activations.manifest import read_manifest
from activations.source import RowFlag, bf16_to_float32
from scope.errors import IntegrityError, InvalidInputError, OutOfRangeError
from scope.features.digests import BLOCK, CheckedArray, digest_file, gone, read_digests
from scope.features.layout import (
    FIRINGS,
    FORMAT,
    SPOKEN,
    dtype_of,
    file_of,
    is_appended,
    listed_as,
    place_of,
    row_dtype,
)
from scope.features.lists import ListReader

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.vocabulary import Vocabulary

__all__ = ["DocumentInfo", "IndexFault", "IndexReader", "Window"]


class IndexFault(NamedTuple):
    """Something in an index that is not what its ledger says."""

    object: str
    """Path inside the index."""
    problem: str


class Window(NamedTuple):
    """The window of the text that a row belongs to."""

    sequence: int
    start: int
    """Row id of its first token after BOS."""
    stop: int
    document: int
    document_offset: int
    """Place of its first token in the document, in tokens."""


class DocumentInfo(NamedTuple):
    """Where a text comes from."""

    title: str
    source: str
    language: str


class IndexReader:
    """Reads an index. Safe across threads.

    Raises:
        UnknownNameError: there is no index at `path`.
        InvalidInputError: it is something else, newer than this release, or not built to the end.
        IntegrityError: a file is missing or is not what the ledger says.
    """

    def __init__(self, path: Path) -> None:
        if (path / "build" / "identity.json").is_file() and not (path / "manifest.json").is_file():
            raise InvalidInputError(f"{path} is half built. Run the same `scope index` again to complete it.")
        self.path = path
        self.manifest = read_manifest(path, FORMAT)
        self.derived = str(self.manifest.get("derived", ""))
        self._digests = read_digests(path, self.derived)
        self._lock = threading.Lock()
        self._arrays: dict[str, CheckedArray] = {}
        self.d_sae = int(self.manifest["d_sae"])
        self.n_rows = int(self.manifest["n_rows"])
        firings = place_of(path, FIRINGS, self.derived)
        self._list_rows = ListReader(firings / "row", row_dtype(self.n_rows))
        self._list_values = ListReader(firings / "value", "uint16")

    def array(self, name: str) -> CheckedArray:
        """A flat array, such as `by_token/indptr`."""
        with self._lock:
            if name not in self._arrays:
                described = self.manifest["arrays"][name]
                path = file_of(self.path, name, described["dtype"], self.derived)
                entry = self._digests.get(f"{name}.{described['dtype']}")
                if entry is None:
                    raise IntegrityError(f"The ledger of {self.path} does not know {path.name}. Build it again.")
                self._arrays[name] = CheckedArray(path, dtype_of(described["dtype"]), described["shape"], entry)
            return self._arrays[name]

    def release(self) -> None:
        """Forget the mapped arrays; they are mapped again, and checked again, on their next use."""
        with self._lock:
            self._arrays.clear()

    def table(self, name: str) -> "pd.DataFrame":
        """A table, such as `features`."""
        import pyarrow
        from pyarrow import parquet

        file = place_of(self.path, f"tables/{name}.parquet", self.derived)
        try:
            content = file.read_bytes()
        except FileNotFoundError as error:
            raise IntegrityError(gone(file)) from error
        blocks = [xxhash.xxh3_128_hexdigest(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
        if blocks != self._digests[f"tables/{name}.parquet"]["blocks"]:
            raise IntegrityError(f"{file} is damaged. Build the index again; `scope verify` lists all faults.")
        # In this thread alone: Arrow's own may give Python's bytes back when Python is already gone, and abort.
        opened = parquet.ParquetFile(pyarrow.BufferReader(content), pre_buffer=False)
        return opened.read(use_threads=False).to_pandas()

    def has_table(self, name: str) -> bool:
        """Whether the index holds a table that not every index has, and that may be added to one that is open."""
        file = f"tables/{name}.parquet"
        if file not in self._digests and place_of(self.path, file, self.derived).is_file():
            self._digests = read_digests(self.path, self.derived)
        return file in self._digests

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        from scope.features.vocabulary import Vocabulary

        return Vocabulary(self.table("vocabulary"))

    @property
    def n_bytes(self) -> int:
        """Size on disk, without the manifest."""
        return sum(int(entry["bytes"]) for entry in self._digests.values())

    def verify(self, progress: Callable[[int, int | None], None] | None = None) -> list[IndexFault]:
        """Compare every file with the ledger; `progress` counts bytes."""
        faults = []
        done = 0

        def told(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if progress is not None:
                progress(done, self.n_bytes)

        for name, entry in self._digests.items():
            path = place_of(self.path, name, self.derived)
            problem = _verify_file(path, entry, told, is_appended(name))
            if problem is not None:
                faults.append(IndexFault(path.relative_to(self.path).as_posix(), problem))
        return faults

    # --- features ---------------------------------------------------------------------------------------------

    def check_feature(self, feature: Any) -> int:
        """The id as an int; raises OutOfRangeError."""
        if isinstance(feature, (bool, np.bool_)) or not isinstance(feature, (int, np.integer)):
            raise OutOfRangeError(f"A feature id is a whole number from 0 to {self.d_sae - 1:,}; got {feature!r}.")
        if not 0 <= feature < self.d_sae:
            raise OutOfRangeError(f"There is no feature {feature}: this index has features 0 to {self.d_sae - 1:,}.")
        return int(feature)

    def _bounds(self, feature: int) -> tuple[int, int]:
        start, stop = self.array("by_feature/indptr").slice(feature, feature + 2).tolist()
        return start, stop

    def n_firings_of(self, feature: int) -> int:
        """How often a feature fires."""
        start, stop = self._bounds(feature)
        return stop - start

    def firing_arrays(self, feature: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64) and strengths (float32) of a feature's firings from rank `start` to `stop`."""
        first, _ = self._bounds(feature)
        rows = self._list_rows.read(first + start, first + stop).astype(np.int64)
        return rows, bf16_to_float32(self._list_values.read(first + start, first + stop))

    def firing_rows(self, feature: int, ranks: np.ndarray | None = None) -> np.ndarray:
        """Rows (int64) of a feature's firings: all, the strongest first, or those at some ranks."""
        first, last = self._bounds(feature)
        rows = self._list_rows.read(first, last) if ranks is None else self._list_rows.take(first + ranks)
        return rows.astype(np.int64)

    def firings_at(self, feature: int, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `firing_arrays`, at scattered ranks."""
        first, _ = self._bounds(feature)
        rows = self._list_rows.take(first + ranks).astype(np.int64)
        return rows, bf16_to_float32(self._list_values.take(first + ranks))

    # --- rows -------------------------------------------------------------------------------------------------

    def check_rows(self, start: Any, stop: Any) -> None:
        """Raise OutOfRangeError unless the rows exist."""
        if not 0 <= start <= stop <= self.n_rows:
            raise OutOfRangeError(f"There are no rows {start} to {stop}: this index has rows 0 to {self.n_rows - 1:,}.")

    def check_row(self, row: Any) -> None:
        """Raise OutOfRangeError unless the row exists."""
        if not 0 <= row < self.n_rows:
            raise OutOfRangeError(f"There is no row {row}: this index has rows 0 to {self.n_rows - 1:,}.")

    def row_column(self, name: str) -> CheckedArray:
        """token_id, sequence, position or flags of every row."""
        return self.array(f"rows/{name}")

    @property
    def spoken(self) -> tuple[str, ...]:
        """ "role" and "kind" where the text is chats, "modality" where it has media, "state" where it was denoised."""
        return tuple(name for name in SPOKEN if listed_as(name) in self.manifest)

    def require_spoken(self, group: str) -> None:
        """Raise InvalidInputError unless rows have a role, a kind, a modality, or a state."""
        if group not in self.spoken and group == "modality":
            raise InvalidInputError(
                "The text of this index has no images or sounds. Capture one that has, with --media-column or "
                "--message-media, and index that store."
            )
        if group not in self.spoken and group == "state":
            raise InvalidInputError(
                "The tokens of this index have no state: its text was not denoised. Capture a model that denoises with "
                "scope denoise and index that store."
            )
        if group not in self.spoken:
            raise InvalidInputError(
                f"The tokens of this index have no {group}: its text is no chats. Capture chats with --messages-column "
                "and index that store."
            )

    @cached_property
    def media(self) -> "pd.DataFrame":
        """The table of images and sounds; raises InvalidInputError where there are none."""
        self.require_spoken("modality")
        return self.table("media")

    @cached_property
    def media_digests(self) -> frozenset[str]:
        """What the files of media are called; none of a text without."""
        return frozenset(self.media["digest"]) if "modality" in self.spoken else frozenset()

    def fired_on(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What fires on rows `start` to `stop`: row ids (int64), features, strengths (float32)."""
        indptr = self.array("by_token/indptr").slice(start, stop + 1)
        first, last = int(indptr[0]), int(indptr[-1])
        rows = np.repeat(np.arange(start, stop), np.diff(indptr))
        features = self.array("by_token/feature").slice(first, last)
        return rows, features, bf16_to_float32(self.array("by_token/value").slice(first, last))

    def firing_spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the firings of each row start and stop in `by_token/`, int64 `(n,)` each."""
        indptr = self.array("by_token/indptr")
        return indptr.take(rows), indptr.take(rows + 1)

    def indexed(self, flags: np.ndarray) -> np.ndarray:
        """Whether features may fire on rows with these flags, bool."""
        return flags & int(self.manifest["excluded_flags"]) == 0

    def values_on(self, feature: int, start: int, stop: int) -> np.ndarray:
        """float32 `(stop - start,)`: one feature's strength on each row, 0 where it does not fire."""
        rows, features, values = self.fired_on(start, stop)
        out = np.zeros(stop - start, np.float32)
        here = features == feature
        out[rows[here] - start] = values[here]
        return out

    def values_at(self, feature: int, rows: np.ndarray) -> np.ndarray:
        """As `values_on`, on ascending rows with gaps, float32 `(n,)`."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return np.concatenate([self.values_on(feature, int(run[0]), int(run[-1]) + 1) for run in runs if len(run)])

    def row_window(self, row: int) -> Window:
        """The window that a row belongs to."""
        sequence = int(self.row_column("sequence").slice(row, row + 1)[0])
        windows = self.windows
        place = int(windows.place[sequence])
        first = int(windows.start_row[place])
        bos = int(self.row_column("flags").slice(first, first + 1)[0]) & int(RowFlag.BOS)
        return Window(
            sequence,
            first + bool(bos),
            first + int(windows.n_rows[place]),
            int(windows.document[place]),
            int(windows.document_offset[place]),
        )

    @property
    def has_bos(self) -> bool:
        """Whether windows begin with BOS, be it a row or not."""
        return self.manifest["model"]["bos_token_id"] is not None

    @cached_property
    def windows(self) -> "WindowArrays":
        """The sequence table as arrays."""
        table = self.table("sequences")
        sequences = table["sequence"].to_numpy(np.int64)
        place = np.full(int(sequences.max(initial=-1)) + 1, -1)
        place[sequences] = np.arange(len(sequences))
        columns = (table[name].to_numpy(np.int64) for name in ("document", "start_row", "n_rows", "document_offset"))
        return WindowArrays(sequences, place, *columns)

    @cached_property
    def _document_infos(self) -> dict[int, DocumentInfo]:
        table = self.table("documents")
        columns = (table[name].fillna("").astype(str) for name in DocumentInfo._fields)
        infos = map(DocumentInfo._make, zip(*columns, strict=True))
        return dict(zip(table["document"].astype(int), infos, strict=True))

    def document_info(self, document: Any) -> DocumentInfo:
        """A document's origin; raises OutOfRangeError."""
        info = self._document_infos.get(document)
        if info is None:
            last = max(self._document_infos, default=-1)
            raise OutOfRangeError(f"There is no document {document}: this index has documents 0 to {last:,}.")
        return info

    def document_rows(self, document: Any) -> np.ndarray:
        """Row ids of a document's tokens without BOS, int64; raises OutOfRangeError."""
        self.document_info(document)
        windows = self.windows
        here = windows.document == document
        spans = zip(windows.start_row[here].tolist(), windows.n_rows[here].tolist(), strict=True)
        rows = np.concatenate([np.arange(start, start + n) for start, n in spans])
        return rows[self.row_column("flags").take(rows) & int(RowFlag.BOS) == 0]

    @cached_property
    def _window_groups(self) -> "dict[str, pd.Series]":
        """Language and source by window."""
        table = self.table("documents").set_index("document")
        return {name: table[name].fillna("").astype(str).loc[self.windows.document] for name in ("language", "source")}

    def windows_of(self, language: str | None = None, source: str | None = None) -> np.ndarray:
        """Which entries of `windows` are of a language and a source, bool."""
        kept = np.ones(len(self.windows.sequence), bool)
        for name, wanted in (("language", language), ("source", source)):
            if wanted is not None:
                kept &= (self._window_groups[name] == wanted).to_numpy()
        return kept


def _verify_file(path: Path, entry: dict[str, Any], told: Callable[[int], None], may_grow: bool) -> str | None:
    """What is wrong with a file, if anything; one that may grow is looked at as far as it is recorded."""
    if not path.is_file():
        return "the file is missing"
    found = digest_file(path, told, entry["bytes"] if may_grow else None)
    if found["bytes"] != entry["bytes"]:
        return f"it has {found['bytes']:,} bytes; the ledger says {entry['bytes']:,}"
    damaged = [n for n, (own, known) in enumerate(zip(found["blocks"], entry["blocks"], strict=True)) if own != known]
    return f"bytes from {damaged[0] * BLOCK:,} on changed ({len(damaged)} blocks of 1 MiB)" if damaged else None


class WindowArrays(NamedTuple):
    """The sequence table, `(n_sequences,)` each but `place`."""

    sequence: np.ndarray
    place: np.ndarray
    """Where in the other arrays a sequence stands, by its number."""
    document: np.ndarray
    start_row: np.ndarray
    n_rows: np.ndarray
    document_offset: np.ndarray
