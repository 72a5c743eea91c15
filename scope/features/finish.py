"""The second phase of a build, from committed segments to a complete index.

1. Compare what the segments appended with their records; where an index grows, all that it held with its digests.
2. Merge their runs, and the lists that it held, into the feature lists; statistics are gathered as the merged pieces
   go by.
3. Count co-firing features; compare decoder rows; compute logit effects.
4. Write tables, digests, manifest.

It starts over when it is interrupted: its result depends on nothing but the segments, the SAE and the model, and on
what the index held. Where an index grows, the new lists and tables are made beside the old ones, and the manifest is
what decides which of them count (`layout`).
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from activations.disk import sync_folder
from activations.manifest import write_manifest
from activations.spec import fingerprint_of
from scope._version import __version__
from scope.features.cofiring import Cofiring, cofiring_features
from scope.features.digests import digest_file, write_digests
from scope.features.layout import (
    APPENDED_PARTS,
    DERIVED_PARTS,
    FIRINGS,
    FORMAT,
    SPOKEN,
    dtype_of,
    file_of,
    grown_folder,
    listed_as,
    place_of,
    row_dtype,
)
from scope.features.lists import ListReader, ListWriter
from scope.features.media import copy_media
from scope.features.merge import Run, merge_runs, open_runs
from scope.features.segments import SegmentLog
from scope.features.statistics import Codes, ListStatistics, RowLookup, SpreadStatistics, TokenStatistics, extremes
from scope.features.steps import Step
from scope.features.table import Gathered, feature_table
from scope.features.texts import RowCounts, Texts, count_rows, read_texts
from scope.features.vocabulary import Vocabulary, vocabulary_table
from scope.features.weights import weight_facts

if TYPE_CHECKING:
    from scope.features.growth import GrowingIndex

__all__ = ["finish_index"]


class _MergedLists(NamedTuple):
    """What merging gave beside the lists themselves."""

    indptr: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lists: ListStatistics
    tokens: TokenStatistics
    spread: SpreadStatistics


def finish_index(
    log: SegmentLog,
    source: Any,
    hook: str,
    sae: Any,
    model: Any,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    budget: int,
    step: Step,
    growing: "GrowingIndex | None" = None,
) -> None:
    """Complete the index whose rows are all committed.

    Args:
        log: its segments.
        source, hook, sae, model: as `build_index` got them.
        identity: what the fingerprint is made of.
        extra: further entries of the manifest.
        budget: firings to hold in memory at once.
        step: told what is done.
        growing: what it held before, where it grows.
    """
    folder, derived = log.folder, "" if growing is None else grown_folder(log.n_rows)
    for part in DERIVED_PARTS:
        shutil.rmtree(place_of(folder, part, derived), ignore_errors=True)
        place_of(folder, part, derived).mkdir(parents=True)
    if growing is not None:
        growing.check()
    for number, segment in enumerate(log.segments, start=1):
        log.check(segment)
        step("check", number, len(log.segments))
    arrays = _Arrays(folder, log, derived)
    texts = read_texts(source, log.n_rows)
    rows = count_rows({name: arrays[f"rows/{name}"] for name in log.columns}, texts, int(extra["excluded_flags"]))
    runs = open_runs(log.segments, [log.run_path(segment.number) for segment in log.segments], log.d_sae)
    lists = _merge([*([] if growing is None else [growing.run]), *runs], log, arrays, texts, rows, budget, step)
    cofiring = _cofiring(arrays, lists.indptr, step)
    finals = np.unique(arrays["rows/final_id"]) if "final_id" in log.columns else np.empty(0, np.int64)
    gathered = _gather(lists, log, texts, rows, sae, model, step, growing, finals)
    _write_statistics(arrays, gathered, cofiring)
    tables = {
        "features": feature_table(gathered),
        "documents": texts.documents,
        "sequences": texts.sequences,
        "vocabulary": gathered.vocabulary.table,
    }
    media = copy_media(source, folder, texts.sequences)
    if media is not None:
        tables["media"] = media
    for name, table in tables.items():
        table.to_parquet(place_of(folder, f"tables/{name}.parquet", derived), index=False, compression="zstd")
    if growing is not None:
        growing.take_over_tables(derived)
    step("write", 0.5)
    _write_digests(folder, derived)
    write_manifest(
        folder,
        FORMAT,
        fingerprint_of(identity),
        [identity["store"], identity["sae"]],
        f"scope-workbench {__version__}",
        **extra,
        **_description(source, hook, sae, str(identity["sae"]), model),
        n_rows=log.n_rows,
        n_indexed_rows=int(rows.by_language.sum()),
        n_firings=log.n_firings,
        languages=[[name, int(n)] for name, n in zip(texts.languages, rows.by_language, strict=True)],
        sources=[[name, int(n)] for name, n in zip(texts.sources, rows.by_source, strict=True)],
        **_spoken(source, rows),
        arrays=arrays.description(),
        **({"derived": derived} if derived else {}),
    )
    step("write", 1)


def _spoken(source: Any, rows: RowCounts) -> dict[str, Any]:
    """What the manifest says of chats, media or denoising: rows of each role, kind, modality and state that there is,
    and how chats are written, or how the text was generated."""
    if not rows.by_spoken:
        return {}
    listed = {
        listed_as(name): [[SPOKEN[name][code], int(counts[code])] for code in np.flatnonzero(counts)]
        for name, counts in rows.by_spoken.items()
    }
    if "state" in rows.by_spoken:
        return {**listed, "denoising": source.manifest["denoising"]}
    chats = source.manifest.get("chats")
    return listed if chats is None else {**listed, "chat_template": chats["template"]}


def _codes(code: np.ndarray, counts: np.ndarray) -> Codes:
    there = counts > 0
    return Codes(code, np.cumsum(there) - 1, int(there.sum()))


class _Arrays:
    """The flat arrays of an index under construction; `derived` as in the manifest."""

    def __init__(self, folder: Path, log: SegmentLog, derived: str) -> None:
        self.folder, self.derived = folder, derived
        self._arrays: dict[str, tuple[str, np.ndarray]] = {}
        for name, dtype in log.arrays.items():
            path = file_of(folder, name, dtype)
            size = path.stat().st_size
            # As a plain array: slicing a np.memmap costs microseconds.
            array = np.asarray(np.memmap(path, dtype_of(dtype), "r")) if size else np.empty(0, dtype_of(dtype))
            self._arrays[name] = (dtype, array)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name][1]

    def write(self, name: str, dtype: str, array: np.ndarray) -> None:
        """Add an array."""
        stored = np.ascontiguousarray(array, dtype_of(dtype))
        file_of(self.folder, name, dtype, self.derived).write_bytes(stored.tobytes())
        self._arrays[name] = (dtype, stored)

    def description(self) -> dict[str, dict[str, Any]]:
        """dtype and shape of each, for the manifest."""
        return {name: {"dtype": dtype, "shape": list(array.shape)} for name, (dtype, array) in self._arrays.items()}


def _merge(
    runs: list[Run], log: SegmentLog, arrays: _Arrays, texts: Texts, rows_of: RowCounts, budget: int, step: Step
) -> _MergedLists:
    lookup = RowLookup(
        arrays["rows/token_id"],
        arrays["rows/position"],
        arrays["rows/sequence"],
        texts.language_of,
        texts.source_of,
        texts.document_of,
        len(texts.languages),
        len(texts.sources),
        {name: _codes(arrays[f"rows/{name}"], counts) for name, counts in rows_of.by_spoken.items()},
    )
    indptr = sum((run.indptr for run in runs), np.zeros(log.d_sae + 1, np.int64))
    low, high = extremes(runs, log.d_sae)
    lists = ListStatistics(indptr, low, high, lookup)
    tokens = TokenStatistics(log.d_sae, lookup.token_id, rows_of.by_token_indexed)
    spread = SpreadStatistics(log.d_sae, lookup)
    folder = place_of(log.folder, FIRINGS, arrays.derived)
    folder.mkdir()
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    rows, values = ListWriter(folder / "row", row_dtype(log.n_rows)), ListWriter(folder / "value", "uint16")
    for piece in merge_runs(runs, log.d_sae, log.n_rows, budget):
        rows.append(piece.rows)
        values.append(piece.values)
        for statistics in (lists, tokens, spread):
            statistics.add(piece)
        step("merge", piece.start + len(piece.rows), log.n_firings)
    rows.close()
    values.close()
    arrays.write("by_feature/indptr", "int64", indptr)
    return _MergedLists(indptr, low, high, lists, tokens, spread)


def _cofiring(arrays: _Arrays, indptr: np.ndarray, step: Step) -> Cofiring:
    folder = place_of(arrays.folder, FIRINGS, arrays.derived)
    rows = ListReader(folder / "row", row_dtype(len(arrays["rows/flags"])))
    d_sae = len(indptr) - 1
    return cofiring_features(
        indptr,
        rows.read,
        arrays["by_token/indptr"],
        arrays["by_token/feature"],
        lambda done: step("cofiring", done, d_sae),
    )


def _gather(
    lists: _MergedLists,
    log: SegmentLog,
    texts: Texts,
    rows: RowCounts,
    sae: Any,
    model: Any,
    step: Step,
    growing: "GrowingIndex | None",
    finals: np.ndarray,
) -> Gathered:
    facts = weight_facts(sae, model, step) if growing is None else growing.weight_facts
    token_ids = np.union1d(np.union1d(np.flatnonzero(rows.by_token), facts.shown_tokens), finals)
    n_rows = np.append(rows.by_token, np.zeros(max(0, int(token_ids[-1]) + 1 - len(rows.by_token)), np.int64))
    vocabulary = Vocabulary(vocabulary_table(token_ids, n_rows[token_ids], model))
    return Gathered(
        n_firings=np.diff(lists.indptr),
        n_indexed=int(rows.by_language.sum()),
        low=lists.low,
        high=lists.high,
        lists=lists.lists,
        tokens=lists.tokens,
        spread=lists.spread,
        special=log.special,
        texts=texts,
        rows=rows,
        weights=facts.columns(vocabulary),
        vocabulary=vocabulary,
    )


def _write_statistics(arrays: _Arrays, gathered: Gathered, cofiring: Cofiring) -> None:
    lists, tokens, spread = gathered.lists, gathered.tokens, gathered.spread
    count = row_dtype(len(arrays["rows/flags"]))  # no feature fires more often than there are rows
    for name, dtype, array in (
        ("histogram", count, lists.histogram),
        ("language_firings", count, lists.by_language),
        ("language_strength", "float32", lists.strength_by_language),
        ("language_windows", count, spread.windows),
        ("language_documents", count, spread.documents),
        ("position_firings", count, lists.by_position),
        ("special_strength", "float64", gathered.special),
        ("source_firings", count, lists.by_source),
        ("source_strength", "float32", lists.strength_by_source),
        *((f"{name}_firings", count, counts) for name, counts in lists.by_spoken.items()),
        *((f"{name}_strength", "float32", strengths) for name, strengths in lists.strength_by_spoken.items()),
        ("token_id", "int32", tokens.tokens),
        ("token_firings", count, tokens.counts),
        ("token_strength", "float32", tokens.strengths),
        ("cofiring_feature", "int32", cofiring.features),
        ("cofiring_both", "float32", cofiring.both),
    ):
        arrays.write(f"statistics/{name}", dtype, array)


def _write_digests(folder: Path, derived: str) -> None:
    """Record what the index consists of, once all of it is safe from a power cut."""
    digests = {}
    parts = [*(folder / part for part in APPENDED_PARTS), *(place_of(folder, part, derived) for part in DERIVED_PARTS)]
    files = [path for part in parts for path in sorted(part.rglob("*")) if path.is_file()]
    for path in files:
        name = path.relative_to(folder / derived if path.is_relative_to(folder / derived) else folder)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[name.as_posix()] = digest_file(path)
    for part in {path.parent for path in files} | {folder, folder / derived}:
        sync_folder(part)
    write_digests(folder, digests, derived)


def _description(source: Any, hook: str, sae: Any, sae_fingerprint: str, model: Any) -> dict[str, Any]:
    spec = source.spec
    config = sae.cfg.to_dict()
    metadata = config.pop("metadata", {})
    return {
        "hook_name": hook,
        "d_sae": sae.d_sae,
        "sae": {"fingerprint": sae_fingerprint, **config, "hook_name": sae.hook_name, "metadata": metadata},
        "model": {
            "name": spec.model,
            "revision": spec.revision,
            "weight_hash": spec.weight_hash,
            "tokenizer_hash": spec.tokenizer_hash,
            "context_size": spec.context_size,
            "bos_token_id": spec.bos_token_id,
            "compute_dtype": spec.compute_dtype,
            "activation_dtype": spec.dtype,
            "load_name": getattr(getattr(model, "files", None), "load_name", None),
        },
        "has_strings": model is not None,
    }
