"""The second phase of a build, from committed segments to a complete index.

1. Compare what the segments appended with their records.
2. Merge their runs into the feature lists; statistics are gathered as the merged pieces go by.
3. Count co-firing features; compare decoder rows; compute logit effects.
4. Write tables, digests, manifest.

It starts over when it is interrupted: its result depends on nothing but the segments, the SAE and the model.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from activations.manifest import write_manifest
from activations.spec import fingerprint_of
from scope._version import __version__
from scope.features import decoder
from scope.features.cofiring import Cofiring, cofiring_features
from scope.features.digests import digest_file, write_digests
from scope.features.layout import FORMAT, dtype_of, file_of, row_dtype
from scope.features.lists import ListReader, ListWriter
from scope.features.merge import merge_runs, open_runs
from scope.features.segments import SegmentLog
from scope.features.statistics import ListStatistics, RowLookup, TokenStatistics, extremes
from scope.features.table import Gathered, feature_table
from scope.features.vocabulary import Vocabulary, vocabulary_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["finish_index"]

WEIGHTS = {"check": 2.0, "merge": 30.0, "cofiring": 20.0, "decoder": 5.0, "logits": 30.0, "write": 3.0}
"""What each step counts for in the progress."""
CHUNK_ROWS = 2**20
UNKNOWN = "unknown"


class _Texts(NamedTuple):
    """The text's tables and what rows have to do with them."""

    documents: "pd.DataFrame"
    sequences: "pd.DataFrame"
    languages: tuple[str, ...]
    sources: tuple[str, ...]
    language_of: np.ndarray
    """Language number by sequence."""
    source_of: np.ndarray


def finish_index(
    log: SegmentLog,
    source: Any,
    hook: str,
    sae: Any,
    model: Any,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    budget: int,
    progress: Callable[[float], None],
) -> None:
    """Complete the index whose rows are all committed.

    Args:
        log: its segments.
        source, hook, sae, model: as `build_index` got them.
        identity: what the fingerprint is made of.
        extra: further entries of the manifest.
        budget: firings to hold in memory at once.
        progress: told the share that is done.
    """
    step = _step(progress)
    folder = log.folder
    for part in ("by_feature", "statistics", "tables"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir()
    for number, segment in enumerate(log.segments, start=1):
        log.check(segment)
        step("check", number / len(log.segments))
    arrays = _Arrays(folder, log)
    texts = _texts(source, log.n_rows)
    n_indexed = sum(segment.n_indexed for segment in log.segments)
    rows_by_language, rows_by_source, token_rows = _count_rows(arrays, texts, int(extra["excluded_flags"]))
    lookup = RowLookup(
        arrays["rows/token_id"],
        arrays["rows/position"],
        arrays["rows/sequence"],
        texts.language_of,
        texts.source_of,
        len(texts.languages),
        len(texts.sources),
    )
    indptr, low, high, lists, tokens = _merge(log, arrays, lookup, budget, step)
    cofiring = _cofiring(arrays, indptr, sae.d_sae, step)
    unit = decoder.unit_decoder(sae)
    neighbours = decoder.nearest_decoders(unit, lambda done: step("decoder", done / sae.d_sae))
    logits = None
    if model is not None and unit.shape[1] == model.d_model:
        logits = decoder.extreme_logits(unit, model, lambda done: step("logits", done / sae.d_sae))
    occurring = np.flatnonzero(token_rows)
    shown = [logits.top_tokens, logits.bottom_tokens] if logits is not None else []
    token_ids = np.unique(np.concatenate([occurring, *[part.reshape(-1).astype(np.int64) for part in shown]]))
    known = np.append(token_rows, np.zeros(max(0, int(token_ids.max(initial=0)) + 1 - len(token_rows)), np.int64))
    vocabulary = vocabulary_table(token_ids, known[token_ids], model)
    gathered = Gathered(
        n_firings=np.diff(indptr),
        n_indexed=n_indexed,
        low=low,
        high=high,
        lists=lists,
        tokens=tokens,
        languages=texts.languages,
        rows_by_language=rows_by_language,
        sources=texts.sources,
        rows_by_source=rows_by_source,
        neighbours=neighbours,
        cosine=decoder.encoder_decoder_cosine(sae),
        logits=logits,
        vocabulary=Vocabulary(vocabulary),
    )
    _write_statistics(arrays, gathered, cofiring)
    tables = {
        "features": feature_table(gathered),
        "documents": texts.documents,
        "sequences": texts.sequences,
        "vocabulary": vocabulary,
    }
    for name, table in tables.items():
        table.to_parquet(folder / "tables" / f"{name}.parquet", index=False, compression="zstd")
    step("write", 0.5)
    _write_digests(folder)
    write_manifest(
        folder,
        FORMAT,
        fingerprint_of(identity),
        [source.fingerprint, sae.fingerprint],
        f"scope-workbench {__version__}",
        **extra,
        **_description(source, hook, sae, model),
        n_rows=log.n_rows,
        n_indexed_rows=n_indexed,
        n_firings=log.n_firings,
        languages=[[name, int(n)] for name, n in zip(texts.languages, rows_by_language, strict=True)],
        sources=[[name, int(n)] for name, n in zip(texts.sources, rows_by_source, strict=True)],
        arrays=arrays.description(),
    )
    step("write", 1.0)


class _Arrays:
    """The flat arrays of an index under construction."""

    def __init__(self, folder: Path, log: SegmentLog) -> None:
        self._folder = folder
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
        file_of(self._folder, name, dtype).write_bytes(stored.tobytes())
        self._arrays[name] = (dtype, stored)

    def description(self) -> dict[str, dict[str, Any]]:
        """dtype and shape of each, for the manifest."""
        return {name: {"dtype": dtype, "shape": list(array.shape)} for name, (dtype, array) in self._arrays.items()}


def _step(progress: Callable[[float], None]) -> Callable[[str, float], None]:
    total = sum(WEIGHTS.values())
    names = list(WEIGHTS)
    before = {name: sum(WEIGHTS[earlier] for earlier in names[:place]) for place, name in enumerate(names)}
    return lambda name, share: progress((before[name] + WEIGHTS[name] * share) / total)


def _texts(source: Any, n_rows: int) -> _Texts:
    sequences = source.sequences()
    sequences = sequences[sequences["start_row"] < n_rows].reset_index(drop=True)
    sequences["n_rows"] = sequences["n_rows"].clip(upper=n_rows - sequences["start_row"])
    documents = source.documents()
    documents = documents[documents["document"].isin(sequences["document"])].reset_index(drop=True)
    codes = {}
    for column in ("language", "source"):
        names = documents[column].fillna("").replace("", UNKNOWN).astype(str)
        documents[column] = names
        known = tuple(sorted(names.unique()))
        of_document = dict(
            zip(documents["document"], names.map({name: n for n, name in enumerate(known)}), strict=True)
        )
        of_sequence = np.zeros(int(sequences["sequence"].max()) + 1, np.int64)
        of_sequence[sequences["sequence"]] = sequences["document"].map(of_document)
        codes[column] = (known, of_sequence)
    (languages, language_of), (sources, source_of) = codes["language"], codes["source"]
    return _Texts(documents, sequences, languages, sources, language_of, source_of)


def _count_rows(arrays: _Arrays, texts: _Texts, excluded: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indexed rows by language, by source and by token id (there also the rows that are not indexed)."""
    by_language = np.zeros(len(texts.languages), np.int64)
    by_source = np.zeros(len(texts.sources), np.int64)
    n_rows = len(arrays["rows/flags"])
    token_rows = np.zeros(1 + max(int(arrays["rows/token_id"].max()), 0), np.int64)
    for start in range(0, n_rows, CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        sequence = arrays["rows/sequence"][chunk][arrays["rows/flags"][chunk] & excluded == 0]
        by_language += np.bincount(texts.language_of[sequence], minlength=len(by_language))
        by_source += np.bincount(texts.source_of[sequence], minlength=len(by_source))
        token_rows += np.bincount(arrays["rows/token_id"][chunk], minlength=len(token_rows))
    return by_language, by_source, token_rows


def _merge(
    log: SegmentLog, arrays: _Arrays, lookup: RowLookup, budget: int, step: Callable[[str, float], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, ListStatistics, TokenStatistics]:
    d_sae = log.d_sae
    runs = open_runs(log.segments, [log.run_path(segment.number) for segment in log.segments], d_sae)
    indptr = sum((run.indptr for run in runs), np.zeros(d_sae + 1, np.int64))
    low, high = extremes(runs, d_sae)
    lists = ListStatistics(indptr, low, high, lookup)
    tokens = TokenStatistics(d_sae, lookup.token_id)
    firings = log.folder / "by_feature" / "firings.zarr"
    firings.mkdir()
    (firings / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    rows, values = ListWriter(firings / "row", row_dtype(log.n_rows)), ListWriter(firings / "value", "uint16")
    for piece in merge_runs(runs, d_sae, log.n_rows, budget):
        rows.append(piece.rows)
        values.append(piece.values)
        lists.add(piece)
        tokens.add(piece)
        step("merge", (piece.start + len(piece.rows)) / max(log.n_firings, 1))
    rows.close()
    values.close()
    arrays.write("by_feature/indptr", "int64", indptr)
    return indptr, low, high, lists, tokens


def _cofiring(arrays: _Arrays, indptr: np.ndarray, d_sae: int, step: Callable[[str, float], None]) -> Cofiring:
    rows = ListReader(arrays._folder / "by_feature" / "firings.zarr" / "row", row_dtype(len(arrays["rows/flags"])))
    return cofiring_features(
        indptr,
        rows.read,
        arrays["by_token/indptr"],
        arrays["by_token/feature"],
        lambda done: step("cofiring", done / d_sae),
    )


def _write_statistics(arrays: _Arrays, gathered: Gathered, cofiring: Cofiring) -> None:
    lists, tokens = gathered.lists, gathered.tokens
    for name, dtype, array in (
        ("histogram", "int64", lists.histogram),
        ("language_firings", "int64", lists.by_language),
        ("language_strength", "float64", lists.strength_by_language),
        ("source_firings", "int64", lists.by_source),
        ("source_strength", "float64", lists.strength_by_source),
        ("token_id", "int32", tokens.tokens),
        ("token_firings", "int64", tokens.counts),
        ("token_strength", "float64", tokens.strengths),
        ("cofiring_feature", "int32", cofiring.features),
        ("cofiring_both", "float64", cofiring.both),
    ):
        arrays.write(f"statistics/{name}", dtype, array)


def _write_digests(folder: Path) -> None:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "build"
    )
    names = {path.relative_to(folder).as_posix(): path for path in files}
    own = {"manifest.json", "digests.json"}
    write_digests(folder, {name: digest_file(path) for name, path in names.items() if name not in own})


def _description(source: Any, hook: str, sae: Any, model: Any) -> dict[str, Any]:
    spec = source.spec
    config = sae.cfg.to_dict()
    metadata = config.pop("metadata", {})
    return {
        "hook_name": hook,
        "d_sae": sae.d_sae,
        "sae": {"fingerprint": sae.fingerprint, **config, "hook_name": sae.hook_name, "metadata": metadata},
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
