"""`build_index`: from a source of activations and an SAE to a `FeatureIndex`; `build_indexes`: many SAEs in one pass.

1. Check that source, SAE and model belong together, and what the output folder holds.
2. Encode the rows in segments, each committed whole (`encode`, `segments`); a later call goes on after the last one.
3. Merge the segments' runs into one list per feature and gather statistics on the way (`finish`, `merge`).
4. Write the tables, the digests and, last, the manifest: an index exists when its manifest does.

An index of the same SAE over a store that had fewer rows then grows (`growth`): only the new rows are encoded.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.chats import CHAT_COLUMNS
from activations.denoising import DENOISING_COLUMNS
from activations.ledger import WriterLock
from activations.manifest import read_manifest, write_atomically
from activations.media import MEDIA_COLUMNS
from activations.source import RowFlag
from scope.errors import IntegrityError, InterruptedRunError, InvalidInputError, OccupiedError
from scope.features.checks import check_model, check_sae
from scope.features.growth import GrowingIndex, clear_leftovers, identity_of
from scope.features.index import FeatureIndex
from scope.features.layout import FORMAT
from scope.features.live import indexable
from scope.features.steps import BuildProgress, Sizes

if TYPE_CHECKING:
    from scope.features.segments import SegmentLog

__all__ = ["EXCLUDED", "build_index", "build_indexes"]

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
    batch_size: int = 2048,
    segment_firings: int = 2**23,
    progress: Callable[[int, int | None], None] | None = None,
) -> FeatureIndex:
    """Index every firing of `sae` over the rows of `source`.

    Args:
        source: an ActivationStore, a live source (`model.source(...)`), or anything with the store's `batches`, `rows`,
            `sequences`, `documents` and `spec`.
        sae: the dictionary; its `hook_name` says which activations it reads.
        out: folder of the index, `NAME.index`. Taken as it is when it already holds this very index, resumed when
            it holds part of it, and extended when the store has grown since.
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
    (index,) = build_indexes(
        source,
        [sae],
        [out],
        model=model,
        metrics=[metrics],
        allow_mismatch=allow_mismatch,
        batch_size=batch_size,
        segment_firings=segment_firings,
        progress=progress,
    )
    return index


def build_indexes(
    source: Any,
    saes: Sequence[Any],
    out: Sequence[str | Path],
    *,
    model: Any = None,
    metrics: Sequence[Mapping[str, Any] | None] | None = None,
    allow_mismatch: bool = False,
    batch_size: int = 2048,
    segment_firings: int = 2**23,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[FeatureIndex]:
    """Index the firings of many SAEs, of one hook or of several, in one pass over the source.

    Each index has the bytes that `build_index` gives it alone, and may be resumed, extended or taken as it is like
    one. `segment_firings` is for all SAEs together.

    Args:
        source: as of `build_index`.
        saes: the dictionaries.
        out: the folder of each.
        metrics: what to keep in the manifest of each.
        model, allow_mismatch, batch_size, segment_firings, progress: as of `build_index`.
    Raises:
        InvalidInputError: there is not one folder for each SAE.
        UnknownNameError, MismatchError, OccupiedError: as of `build_index`, for any of them before the first row is
            encoded.
    """
    if batch_size < 1 or segment_firings < 1:
        raise InvalidInputError(
            f"batch_size is {batch_size} and segment_firings {segment_firings}; expected 1 or more."
        )
    outs = [Path(folder) for folder in out]
    if not saes or len(saes) != len(outs) or len({folder.absolute() for folder in outs}) != len(outs):
        raise InvalidInputError(f"Got {len(saes)} SAEs and {len(set(outs))} folders; expected one folder for each SAE.")
    checked = [check_sae(source, sae, allow_mismatch) for sae in saes]
    mismatches = [] if model is None else check_model(source, model, allow_mismatch)
    source = indexable(source)
    builds = [
        _build_of(source, sae, folder, hook, model, dict(facts or {}), differing + mismatches)
        for sae, folder, (hook, differing), facts in zip(
            saes, outs, checked, metrics or [None] * len(saes), strict=True
        )
    ]
    todo = [build for build in builds if not build.complete]
    for build in todo:
        build.claim()
    with ExitStack() as locks:
        for build in todo:
            locks.enter_context(WriterLock(build.out / "build"))
            build.require_unchanged()
        _run(source, todo, model, batch_size, segment_firings, progress)
    for build in builds:
        clear_leftovers(build.out)
    return [FeatureIndex.open(folder) for folder in outs]


@dataclass
class _Build:
    """What is to be done for one SAE."""

    sae: Any
    out: Path
    hook: str
    identity: dict[str, Any]
    extra: dict[str, Any]
    complete: bool
    growing: GrowingIndex | None

    @property
    def n_rows(self) -> int:
        """Rows of the index to make."""
        return int(self.identity["n_rows"])

    def sizes(self, d_vocab: int) -> Sizes:
        """How much there is to do."""
        if self.growing is None:
            return Sizes(self.n_rows, self.n_rows, self.sae.d_sae, d_vocab)
        return Sizes(self.n_rows, self.n_rows - self.growing.n_rows, 0, 0)

    def require_unchanged(self) -> None:
        """Raise OccupiedError if another process has completed the index since it was looked at."""
        manifest = read_manifest(self.out) if (self.out / "manifest.json").is_file() else None
        known = None if self.growing is None else self.growing.fingerprint
        if (manifest and manifest["fingerprint"]) != known:
            raise OccupiedError(f"{self.out} was built by another process meanwhile. Run the same again.")

    def claim(self) -> None:
        """Make the folder, or make sure that what is in it is this index half built."""
        content = json.dumps(self.identity, sort_keys=True, indent=1)
        path = self.out / "build" / "identity.json"
        if path.is_file():
            differing = _differing(path, self.identity)
            # Rows may have been added to the store since.
            if differing and differing != ["n_rows"]:
                raise OccupiedError(
                    f"{self.out} holds another index, half built: another {', '.join(differing)}. Delete "
                    f"{self.out if self.growing is None else self.out / 'build'} or give another folder."
                )
        elif self.growing is None and self.out.exists() and not _is_empty(self.out):
            raise OccupiedError(f"{self.out} exists and is no index. Give another folder, or delete this one.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != content:
            write_atomically(path, content.encode())


def _build_of(
    source: Any, sae: Any, out: Path, hook: str, model: Any, metrics: dict[str, Any], mismatches: list[str]
) -> _Build:
    """What there is to do for one SAE; raises OccupiedError if the folder holds another artefact."""
    n_rows = int(source.rows_of(hook) if hasattr(source, "rows_of") else source.n_rows)
    if n_rows == 0:
        raise InvalidInputError(f"There are no rows of {hook} to index. Capture some first.")
    of_hook = getattr(source, "fingerprint_of", None)
    identity = {
        "sae": sae.fingerprint,
        "store": source.fingerprint if of_hook is None else of_hook(hook),
        "hook": hook,
        "n_rows": n_rows,
        "excluded_flags": int(EXCLUDED),
        "model": None if model is None else model.identity.weight_hash,
    }
    extra = {"metrics": metrics, "allowed_mismatches": mismatches, "excluded_flags": int(EXCLUDED)}
    build = _Build(sae, out, hook, identity, extra, complete=False, growing=None)
    if not (out / "manifest.json").is_file():
        return build
    manifest = read_manifest(out)
    held = identity_of(manifest) if manifest["format"] == FORMAT else None
    if held == identity:
        build.complete = True
    elif held is not None and {**held, "n_rows": n_rows} == identity and held["n_rows"] < n_rows:
        _clear_stale(out, held["n_rows"])
        build.growing = GrowingIndex(out)
    else:
        raise OccupiedError(_occupied(out, manifest, held, identity))
    return build


def _occupied(
    out: Path, manifest: Mapping[str, Any], held: Mapping[str, Any] | None, identity: Mapping[str, Any]
) -> str:
    what = "another index" if manifest["format"] == FORMAT else f"a {manifest['format']}"
    differing = [name for name, value in identity.items() if held is not None and held.get(name) != value]
    if differing == ["n_rows"]:
        why = f"of {manifest['n_rows']:,} rows; the store has {identity['n_rows']:,}"
    else:
        why = f"id {manifest['fingerprint'][:12]}{f', another {chr(44).join(differing)}' if differing else ''}"
    return f"{out} already holds {what} ({why}). Give another folder, or delete this one."


def _run(
    source: Any,
    builds: Sequence[_Build],
    model: Any,
    batch_size: int,
    segment_firings: int,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Encode what is lacking, in one pass, and complete the indexes one after the other."""
    if not builds:
        return
    from scope.features.encode import Encoder, encode_segments
    from scope.features.finish import finish_index
    from scope.features.segments import SegmentLog

    logs = [
        SegmentLog(
            build.out, build.sae.d_sae, None if build.growing is None else build.growing.grown, _spoken(source, build)
        )
        for build in builds
    ]
    held = sum(0 if build.growing is None else build.growing.n_rows for build in builds)
    _require_rows(builds, logs)
    d_vocab = 0 if model is None else model.d_vocab
    steps = BuildProgress(progress, [build.sizes(d_vocab) for build in builds])
    with _resumable(logs):
        encoders = [Encoder(build.hook, build.sae, log, int(EXCLUDED)) for build, log in zip(builds, logs, strict=True)]

        def encoded() -> None:
            steps.encoded(sum(encoder.n_rows for encoder in encoders) - held)

        encoded()
        # Hooks that have the same rows go in one pass.
        for n_rows in sorted({build.n_rows for build in builds}):
            together = [encoder for encoder, build in zip(encoders, builds, strict=True) if build.n_rows == n_rows]
            encode_segments(
                source,
                together,
                n_rows,
                batch_size=batch_size,
                segment_firings=segment_firings,
                progress=encoded,
            )
        for number, (build, log) in enumerate(zip(builds, logs, strict=True)):
            finish_index(
                log,
                source,
                build.hook,
                build.sae,
                model,
                build.identity,
                build.extra,
                segment_firings,
                steps.of(number),
                build.growing,
            )


def _spoken(source: Any, build: _Build) -> dict[str, str]:
    """The columns of chats, media or denoising that the rows of an index have: those of the source, if it does not grow
    without."""
    known = set(getattr(source, "token_columns", ()))
    own = known if build.growing is None else build.growing.columns
    wanted = (CHAT_COLUMNS, MEDIA_COLUMNS, DENOISING_COLUMNS)
    return {name: dtype for columns in wanted if set(columns) <= known & own for name, dtype in columns.items()}


@contextmanager
def _resumable(logs: "Sequence[SegmentLog]") -> Iterator[None]:
    """Say what stays when a build is interrupted or can't write."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        why = f"a file could not be written or read: {error}" if isinstance(error, OSError) else "it was interrupted"
        what = ", ".join(str(log.folder) for log in logs)
        rows = min(log.n_rows for log in logs)
        raise InterruptedRunError(
            f"The build of {what} stopped: {why}. {rows:,} rows are committed; run the same again to go on."
        ) from error


def _require_rows(builds: Sequence[_Build], logs: "Sequence[SegmentLog]") -> None:
    for build, log in zip(builds, logs, strict=True):
        if log.n_rows > build.n_rows:
            raise IntegrityError(
                f"{log.n_rows:,} rows are committed to {build.out}; the store has only {build.n_rows:,}. Restore the "
                f"store, or delete {build.out / 'build'}."
            )


def _is_empty(out: Path) -> bool:
    """Whether there is nothing in the folder but what a claim leaves that died halfway."""
    leftovers = (out / "build", "identity.json.tmp-")
    return out.is_dir() and all(
        child == leftovers[0] and child.is_dir() and all(file.name.startswith(leftovers[1]) for file in child.iterdir())
        for child in out.iterdir()
    )


def _clear_stale(out: Path, n_rows: int) -> None:
    """Remove what a build left behind that died after it had written the manifest."""
    path = out / "build" / "identity.json"
    try:
        stale = path.is_file() and json.loads(path.read_text())["n_rows"] <= n_rows
    except (ValueError, KeyError, TypeError):
        return
    if stale:
        clear_leftovers(out)


def _differing(path: Path, identity: Mapping[str, Any]) -> list[str]:
    try:
        other = json.loads(path.read_text())
    except ValueError:
        other = {}
    return [name for name, value in identity.items() if other.get(name) != value]
