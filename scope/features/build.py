"""`build_index`: from a source of activations and an SAE to a `FeatureIndex`.

1. Check that source, SAE and model belong together, and what the output folder holds.
2. Encode the rows in segments, each committed whole (`encode`, `segments`); a later call goes on after the last one.
3. Merge the segments' runs into one list per feature and gather statistics on the way (`finish`, `merge`).
4. Write the tables, the digests and, last, the manifest: an index exists when its manifest does.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.ledger import WriterLock
from activations.manifest import read_manifest, write_atomically
from activations.source import RowFlag
from activations.spec import fingerprint_of
from scope.errors import InterruptedRunError, InvalidInputError, OccupiedError
from scope.features.checks import check_model, check_sae
from scope.features.index import FeatureIndex
from scope.features.layout import FORMAT
from scope.features.steps import BuildProgress

if TYPE_CHECKING:
    from scope.features.segments import SegmentLog

__all__ = ["EXCLUDED", "build_index"]

EXCLUDED = RowFlag.BOS | RowFlag.SPECIAL
"""Rows on which no firing is kept."""


def build_index(
    source: Any,
    sae: Any,
    out: str | Path,
    *,
    model: Any = None,
    metrics: Mapping[str, Any] | None = None,
    allow_mismatch: bool = False,
    batch_size: int = 4096,
    segment_firings: int = 2**23,
    progress: Callable[[int, int | None], None] | None = None,
) -> FeatureIndex:
    """Index every firing of `sae` over the rows of `source`.

    Args:
        source: an ActivationStore, or anything with its `batches`, `rows`, `sequences`, `documents` and `spec`.
        sae: the dictionary; its `hook_name` says which activations it reads.
        out: folder of the index, `NAME.index`. Taken as it is when it already holds this very index, resumed when
            it holds part of it.
        model: gives tokens their strings and features their logit effects; without it tokens show as their ids.
        metrics: JSON-able facts about the SAE to keep in the manifest, such as fvu, l0 and delta_ce.
        allow_mismatch: index although the SAE was trained on another model or tokenizer; recorded in the manifest.
        batch_size: rows to encode at once.
        segment_firings: firings to hold in memory at once, about 40 bytes each.
        progress: called with (work done, work in all), counted in rows; what follows their encoding counts as so
            many rows more.
    Raises:
        UnknownNameError: the store lacks the SAE's hook.
        MismatchError: the SAE has another width, model or tokenizer than the store.
        OccupiedError: `out` holds something else.
        NonFiniteError: an activation or a feature is NaN or infinite.
        IntegrityError: the store, or what an earlier call committed, is damaged.
        LockedError: another process is building this index.
        InterruptedRunError: Ctrl-C or a full disk; what is committed stays.
    """
    if batch_size < 1 or segment_firings < 1:
        raise InvalidInputError(
            f"batch_size is {batch_size} and segment_firings {segment_firings}; expected 1 or more."
        )
    hook, mismatches = check_sae(source, sae, allow_mismatch)
    if model is not None:
        mismatches += check_model(source, model, allow_mismatch)
    n_rows = int(source.rows_of(hook) if hasattr(source, "rows_of") else source.n_rows)
    if n_rows == 0:
        raise InvalidInputError(f"There are no rows of {hook} to index. Capture some first.")
    identity = {
        "sae": sae.fingerprint,
        "store": source.fingerprint,
        "hook": hook,
        "n_rows": n_rows,
        "excluded_flags": int(EXCLUDED),
        "model": None if model is None else model.identity.weight_hash,
    }
    out = Path(out)
    if _is_complete(out, fingerprint_of(identity)):
        return FeatureIndex.open(out)
    _claim(out, identity)
    from scope.features.encode import encode_segments
    from scope.features.finish import finish_index
    from scope.features.segments import SegmentLog

    extra = {"metrics": dict(metrics or {}), "allowed_mismatches": mismatches, "excluded_flags": int(EXCLUDED)}
    with WriterLock(out / "build"):
        log = SegmentLog(out, sae.d_sae)
        step = BuildProgress(progress, n_rows, sae.d_sae, 0 if model is None else model.d_vocab)
        step("encode", log.n_rows, n_rows)
        with _resumable(log):
            encode_segments(
                source,
                hook,
                sae,
                log,
                n_rows,
                exclude=int(EXCLUDED),
                batch_size=batch_size,
                segment_firings=segment_firings,
                progress=lambda rows: step("encode", rows, n_rows),
            )
            finish_index(log, source, hook, sae, model, identity, extra, segment_firings, step)
    _clear_build(out)
    return FeatureIndex.open(out)


@contextmanager
def _resumable(log: "SegmentLog") -> Iterator[None]:
    """Say what stays when a build is interrupted or can't write."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        why = f"a file could not be written or read: {error}" if isinstance(error, OSError) else "it was interrupted"
        raise InterruptedRunError(
            f"The build of {log.folder} stopped: {why}. {log.n_rows:,} rows are committed; run the same again to go on."
        ) from error


def _is_complete(out: Path, fingerprint: str) -> bool:
    """Whether the folder holds this very index already; raises OccupiedError if it holds another artefact."""
    if not (out / "manifest.json").is_file():
        return False
    manifest = read_manifest(out)
    if (manifest["format"], manifest["fingerprint"]) != (FORMAT, fingerprint):
        raise OccupiedError(
            f"{out} already holds {'another index' if manifest['format'] == FORMAT else 'a ' + manifest['format']} "
            f"(id {manifest['fingerprint'][:12]}). Give another folder, or delete this one."
        )
    _clear_build(out)
    return True


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, or make sure that what is in it is this index half built."""
    content = json.dumps(identity, sort_keys=True, indent=1)
    path = out / "build" / "identity.json"
    if path.is_file():
        if path.read_text() != content:
            raise OccupiedError(
                f"{out} holds another index, half built: {_differing(path, identity)}. "
                "Delete it or give another folder."
            )
        return
    if out.exists() and not _is_empty(out):
        raise OccupiedError(f"{out} exists and is no index. Give another folder, or delete this one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.encode())


def _is_empty(out: Path) -> bool:
    """Whether there is nothing in the folder but what a claim leaves that died halfway."""
    leftovers = (out / "build", "identity.json.tmp-")
    return out.is_dir() and all(
        child == leftovers[0] and child.is_dir() and all(file.name.startswith(leftovers[1]) for file in child.iterdir())
        for child in out.iterdir()
    )


def _differing(path: Path, identity: Mapping[str, Any]) -> str:
    try:
        other = json.loads(path.read_text())
    except ValueError:
        return "its identity cannot be read"
    names = [name for name, value in identity.items() if other.get(name) != value]
    return f"another {', '.join(names)}"


def _clear_build(out: Path) -> None:
    """Remove what only the build needed; the manifest is there already."""
    import shutil

    shutil.rmtree(out / "build", ignore_errors=True)
