"""What the compare page asks of the model worker: which dictionaries there are, and how two of them correspond."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dashboards.context import Context
from dashboards.worker import Job
from scope.errors import ScopeError, UnknownNameError
from scope.training.runs import CHECKPOINT_NAME

if TYPE_CHECKING:
    from scope.features.compare import Match
    from scope.features.index import FeatureIndex

__all__ = ["Compared", "Comparisons", "Side"]


@dataclass(frozen=True)
class Side:
    """A dictionary that can be compared: an SAE, or what a training was at some step."""

    id: str
    name: str
    kind: str
    """ "SAE", "snapshot" (kept along the way) or "checkpoint" (the last one)."""
    path: Path
    hook: str
    version: str
    """Changes when it does."""
    fingerprint: str = ""
    """Of an SAE; of what a training was on the way, that of the SAE that it ended as, "" before it has ended."""
    run: str = ""
    """The id of the training that it is of, where that is here."""


@dataclass(frozen=True, eq=False)
class Compared:
    """The result of a comparison."""

    a: Side
    b: Side
    match: "Match"
    index_a: str | None
    """The id of an index of `a`, whose pages features link to."""
    index_b: str | None

    @property
    def one_training(self) -> bool:
        """Whether both are of the same training, so that what differs came or went with its steps."""
        return bool(self.a.run) and self.a.run == self.b.run


class Comparisons:
    """The jobs of the compare page."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def sides(self) -> list[Side]:
        """What can be compared: the readable SAEs by name, the decoders that trainings kept along the way, and the last
        checkpoints of those that are not finished."""
        runs = self.context.workspace.trainings()
        fingerprints = {
            entry.id: str(entry.manifest["fingerprint"])
            for entry in self.context.workspace.saes()
            if entry.problem is None
        }
        ended = {run.id: fingerprints.get(run.sae or "", "") for run in runs}
        run_of = {run.sae: run.id for run in runs if run.sae}
        saes = [
            Side(
                entry.id,
                entry.name,
                "SAE",
                entry.path,
                str((entry.manifest.get("training") or {}).get("hook") or ""),
                str(entry.manifest["fingerprint"]),
                str(entry.manifest["fingerprint"]),
                run_of.get(entry.id, ""),
            )
            for entry in self.context.workspace.saes()
            if entry.problem is None
        ]
        snapshots = [
            Side(
                f"{run.id}-{kept.steps}",
                f"{run.name}, step {kept.steps:,}",
                "snapshot",
                kept.path,
                run.hook,
                f"{run.id} {kept.steps} {kept.path.stat().st_mtime_ns}",
                ended[run.id],
                run.id,
            )
            for run in runs
            for kept in run.snapshots
        ]
        checkpoints = [
            Side(
                run.id,
                f"{run.name}, step {run.checkpoint.steps:,}",
                "checkpoint",
                run.path / CHECKPOINT_NAME,
                run.hook,
                f"{run.id} {run.checkpoint.steps}",
                ended[run.id],
                run.id,
            )
            for run in runs
            if run.checkpoint is not None
        ]
        return [*saes, *snapshots, *checkpoints]

    def side(self, id: str) -> Side:
        """The dictionary with this id or name.

        Raises:
            UnknownNameError: there is none.
        """
        sides = self.sides()
        for side in sides:
            if id in (side.id, side.name):
                return side
        raise UnknownNameError("SAE or training", id, [name for side in sides for name in (side.name, side.id)])

    def submit(self, a: Side, b: Side) -> Job:
        """Queue a comparison; the job's result is a `Compared`."""
        key = ("compare", a.version, b.version)
        return self.context.worker.submit(key, lambda job: self._compare(job, a, b))

    def _compare(self, job: Job, a: Side, b: Side) -> Compared:
        job.report("loading the decoders")
        from scope.features.compare import decoder_of, match, same_rows

        first, second = decoder_of(a.path), decoder_of(b.path)
        pair = self._indexes(a, b, same_rows) if a.kind == b.kind == "SAE" else None
        both = pair if pair and pair[0] and pair[1] else None
        words = "comparing decoders and firings" if both else "comparing decoders"
        found = match(
            first,
            second,
            indexes=both,
            progress=lambda done, total: job.report(words, done, total),
        )
        of_a, of_b = pair if pair else (self._first_index(a), self._first_index(b))
        return Compared(a, b, found, of_a.id if of_a else None, of_b.id if of_b else None)

    def _indexes(
        self, a: Side, b: Side, same_rows: Callable[[Any, Any], bool]
    ) -> "tuple[FeatureIndex, FeatureIndex] | None":
        """Indexes of both over the same rows."""
        for first in self._indexes_of(a):
            for second in self._indexes_of(b):
                if same_rows(first, second):
                    return first, second
        return None

    def _indexes_of(self, side: Side) -> "list[FeatureIndex]":
        opened = []
        for entry in self.context.indexes():
            if side.fingerprint and side.fingerprint in entry.manifest.get("parents", ()):
                try:
                    opened.append(self.context.index(entry.id))
                except (ScopeError, OSError):
                    continue
        return opened

    def _first_index(self, side: Side) -> "FeatureIndex | None":
        return next(iter(self._indexes_of(side)), None)
