"""`make_excerpt`: from an index over a large text, the little of it that ships with the SAE.

1. Check that the index holds whole windows of whole documents, so that an example's place in its document says which
   tokens stand around it.
2. Per feature: choose its strongest examples and some of each band, as the index itself does, and read the feature's
   other strengths in the window of each.
3. Take the statistics from the index's tables.
4. Pack the arrays; write the manifest last, in a folder beside the place that is then renamed.

A feature costs a few milliseconds, whatever the number of its firings.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from activations.disk import sync_folder
from activations.manifest import write_atomically, write_manifest
from activations.source import RowFlag, float32_to_bf16
from activations.spec import fingerprint_of
from scope._version import __version__
from scope.errors import InvalidInputError, OccupiedError
from scope.features.examples import BANDS, band_ranks, choose, ranked_firings
from scope.features.excerpt import ARRAYS, EXACT, FORMAT, ROUNDED, FeatureExcerpt
from scope.features.excerpt_settings import ExcerptSettings
from scope.features.excerpt_text import digest_of_tokens, write_text
from scope.features.firings import order_key
from scope.features.packed import pack_arrays, rounded
from scope.features.reader import IndexReader

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["make_excerpt"]


def make_excerpt(
    index: "FeatureIndex",
    out: str | Path,
    settings: ExcerptSettings | None = None,
    *,
    text: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> FeatureExcerpt:
    """Write what an index says of each feature, with examples, as a small artefact.

    Args:
        index: over the text that is to be excerpted, built from whole documents (capped ones are whole up to the cap).
        out: the folder to make, `NAME.excerpt`.
        settings: how much to keep.
        text: keep the tokens beside it too, so that the examples can be read at once; as large as the text. Without,
            `FeatureExcerpt.read_text` gets them from the documents.
        progress: called with (features done, features in all).
    Raises:
        OccupiedError: there is something at `out`.
        InvalidInputError: the index is of some tokens of its documents only (`scope capture --every`, roles and the
            like), or its text has images or sounds.
    """
    settings, out = settings or ExcerptSettings(), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OccupiedError(f"{out} is there already. Give another folder, or delete it.")
    reader = index._reader
    if "modality" in reader.spoken:
        raise InvalidInputError(
            "The text of this index has images or sounds, which an excerpt does not keep. Share the index itself."
        )
    layout = _layout_of(reader)
    chosen = _Chosen(reader, layout, settings)
    for feature in range(index.d_sae):
        chosen.add(feature)
        if progress is not None:
            progress(feature + 1, index.d_sae)
    arrays = {**_statistics(index, settings.tokens), **chosen.arrays(), "document_tokens": layout.lengths}
    content, packed = pack_arrays(arrays)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_atomically(part / ARRAYS, content)
    about = {**asdict(settings), "bands": BANDS}
    if text:
        documents = index.documents[["title", "source", "language"]]
        write_text(part, np.concatenate([*_documents(reader), np.empty(0, np.int32)]), documents, index.vocabulary)
    write_manifest(
        part,
        FORMAT,
        fingerprint_of({"index": index.fingerprint, "settings": about}),
        [index.fingerprint, index.sae_info["fingerprint"]],
        f"scope-workbench {__version__}",
        **{name: index.manifest[name] for name in _KEPT},
        settings=about,
        packed=packed,
        text={
            "n_documents": len(layout.lengths),
            "n_tokens": int(layout.lengths.sum()),
            "window_tokens": layout.stride,
            "has_bos": bool(reader.has_bos),
            "tokenizer_hash": index.model_info["tokenizer_hash"],
            "xxh3_128": digest_of_tokens(_documents(reader)),
        },
    )
    if out.is_dir():
        out.rmdir()
    part.rename(out)
    sync_folder(out.parent)
    return FeatureExcerpt.open(out)


_KEPT = ("sae", "model", "hook_name", "d_sae", "n_rows", "n_indexed_rows", "n_firings", "languages", "sources")
"""Entries of the index's manifest that an excerpt's repeats."""


class _Layout(NamedTuple):
    """Where the rows of an index are in its text."""

    lengths: np.ndarray
    """Tokens of each document, BOS aside, int64."""
    starts: np.ndarray
    """Tokens of the documents before each, int64."""
    stride: int
    """Tokens of a whole window, BOS aside; every document is cut into such."""


def _documents(reader: IndexReader) -> Iterator[np.ndarray]:
    """Token ids of each document, int32, BOS aside."""
    column = reader.row_column("token_id")
    for document in reader.table("documents")["document"].tolist():
        yield column.take(reader.document_rows(document))


def _layout_of(reader: IndexReader) -> _Layout:
    """Step 1; raises InvalidInputError."""
    windows = reader.windows
    flags, position = reader.row_column("flags"), reader.row_column("position")
    bos = (flags.take(windows.start_row) & int(RowFlag.BOS) > 0).astype(np.int64)
    n = windows.n_rows - bos
    numbers = reader.table("documents")["document"].to_numpy(np.int64)
    lengths = np.bincount(windows.document, weights=n, minlength=len(numbers)).astype(np.int64)
    first = np.concatenate([[True], windows.document[1:] != windows.document[:-1]])[: len(n)]
    before = np.cumsum(n) - n
    offsets = before - np.maximum.accumulate(np.where(first, before, 0))
    stride = int(n.max(initial=1))
    last = windows.start_row + windows.n_rows - 1
    spans = position.take(last) - position.take(windows.start_row)
    whole = (
        np.array_equal(numbers, np.arange(len(numbers)))
        and bool((np.diff(windows.document) >= 0).all())
        and np.array_equal(offsets, windows.document_offset)
        and bool((offsets % stride == 0).all())
        and np.array_equal(spans, windows.n_rows - 1)
    )
    if not whole:
        raise InvalidInputError(
            f"{reader.path} is not of whole documents: some of their tokens were left out when they were captured. An "
            "excerpt says of its examples only where they stand, so it is made of whole documents."
        )
    return _Layout(lengths, np.cumsum(lengths) - lengths, stride)


class _Chosen:
    """The examples of the features, gathered one feature after the other."""

    def __init__(self, reader: IndexReader, layout: _Layout, settings: ExcerptSettings) -> None:
        self._reader, self._layout, self._settings = reader, layout, settings
        self._n_top: list[int] = []
        self._ranks: list[int] = []
        self._parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("place", "values", "n_beside", "beside_offset", "beside_value")
        }

    def add(self, feature: int) -> None:
        """Step 2."""
        reader, settings = self._reader, self._settings
        top = choose(reader, ranked_firings(reader, feature), settings.top, distinct=True, per_sequence=2)
        total = reader.n_firings_of(feature)
        ranks = [rank for band in BANDS for rank in band_ranks(feature, total, *band, settings.per_band, settings.seed)]
        rows, values = reader.firings_at(feature, np.array(ranks, np.int64))
        self._n_top.append(len(top))
        self._ranks += [firing.rank for firing in top]
        rows = np.concatenate([np.array([firing.row for firing in top], np.int64), rows])
        self._parts["values"].append(np.concatenate([np.array([one.value for one in top], np.float32), values]))
        self._add_places(feature, rows)

    def _add_places(self, feature: int, rows: np.ndarray) -> None:
        reader, layout, settings = self._reader, self._layout, self._settings
        windows = reader.windows
        at = windows.place[reader.row_column("sequence").take(rows)]
        first, stop = windows.start_row[at], windows.start_row[at] + windows.n_rows[at]
        first = first + (reader.row_column("flags").take(first) & int(RowFlag.BOS) > 0)
        offsets = windows.document_offset[at] + rows - first
        self._parts["place"].append(layout.starts[windows.document[at]] + offsets)
        starts, stops = np.maximum(first, rows - settings.before), np.minimum(stop, rows + settings.after + 1)
        counts = []
        for row, start, end in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True):
            values = reader.values_on(feature, start, end)
            values[row - start] = 0
            beside = np.flatnonzero(values)
            counts.append(len(beside))
            self._parts["beside_offset"].append(beside.astype(np.uint8))
            self._parts["beside_value"].append(float32_to_bf16(values[beside]))
        self._parts["n_beside"].append(np.array(counts, np.uint8))

    def arrays(self) -> dict[str, np.ndarray]:
        """What they are stored as."""
        kinds = {"place": np.int64, "n_beside": np.uint8, "beside_offset": np.uint8, "beside_value": np.uint16}
        joined = {name: np.concatenate([*self._parts[name], np.empty(0, kind)]) for name, kind in kinds.items()}
        values = np.concatenate([*self._parts["values"], np.empty(0, np.float32)])
        keys = order_key(float32_to_bf16(values.astype(np.float32)))
        return {
            "n_top": np.array(self._n_top, np.uint8),
            "top_rank": np.array(self._ranks, np.int64),
            "key_step": np.diff(keys, prepend=np.uint16(0)),
            **{name: array.astype(kinds[name]) for name, array in joined.items()},
        }


def _statistics(index: "FeatureIndex", n_tokens: int) -> dict[str, np.ndarray]:
    """Step 3."""
    table, reader = index.table, index._reader
    found = {name: table[name].to_numpy() for name in EXACT}
    found |= {name: rounded(table[name].to_numpy(np.float32)) for name in ROUNDED if name in table}
    tokens = {name: reader.array(f"statistics/{name}").all()[:, :n_tokens] for name in ("token_id", "token_firings")}
    strength = rounded(reader.array("statistics/token_strength").all()[:, :n_tokens])
    groups = {name: reader.array(f"statistics/{name}").all() for name in ("language_firings", "source_firings")}
    histogram = reader.array("statistics/histogram").all()
    return {**found, **tokens, "token_strength": strength, **groups, "histogram": histogram}
