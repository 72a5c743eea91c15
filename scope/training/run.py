"""`train`: from a source of activations to an SAE on disk; `train_sweep`: to many, from one pass over the data.

1. Batches come shuffled from the source (`scope.training.data`), without BOS and other special tokens, held-out
   documents and outlier norms.
2. Each trainer takes them one at a time; every few steps a line goes to its run log and a checkpoint to disk. While it
   runs, all this lies in its working folder (`scope.training.workfolder`).
3. At the end the SAE and its log are put in the output folder as a whole. A run that stopped early leaves its working
   folder, and the same call goes on from its last checkpoint to the weights of an uninterrupted run.

Several processes started by torchrun divide each batch, or the SAE (`scope.training.distributed`); the first one
writes.

In a sweep the batches start where the trainer that is furthest behind has to go on; the others wait for their own.
"""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations.source import ActivationSource
from scope.errors import InterruptedRunError, NonFiniteError
from scope.training.config import TrainConfig
from scope.training.data import (
    Batch,
    BatchStream,
    as_hooks,
    shuffled_batches,
)
from scope.training.distributed import watched
from scope.training.prefetch import Timed, on_device
from scope.training.report import TrainReport
from scope.training.single import SingleRun
from scope.training.sweeps import SweepRun, require_one_pass

__all__ = ["train", "train_sweep"]

SAMPLE_ROWS = 8192
"""Rows that settle the scale and b_dec; they are trained on too."""
INTERRUPT_STEPS = 16
"""Steps after which several processes with GPUs ask each other for a Ctrl-C, for which their hosts wait."""


def train(
    source: ActivationSource,
    hook: str | Sequence[str],
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    hook_out: str | Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    trackers: Sequence[str] = (),
    snapshots: int = 0,
) -> TrainReport:
    """Train an SAE on one hook of a source, or a transcoder or crosscoder on several.

    Args:
        source: a store, or anything else that satisfies `ActivationSource`.
        hook: the hook's name; those of a crosscoder or a cross-layer transcoder in order.
        config: the settings.
        out: the folder to make; None keeps the SAE in memory only, without checkpoints.
        hook_out: the hook that a transcoder writes; those of a cross-layer transcoder in order.
        progress: called with (rows done, rows in all).
        provenance: fields of `SAEMetadata` to record beside what the source itself knows.
        trackers: where else the lines of the run log go: "tensorboard", "wandb".
        snapshots: decoders to keep along the way beside `out`, for comparisons (`scope.training.snapshots`).

    Raises:
        MissingDependencyError: a tracker's package is not installed.
        UnknownNameError: the source has no such hook, or there is no such architecture.
        InvalidInputError: the settings cannot be met, such as more rows in a batch than the source has to train on, or
            an architecture that does not read or write so many hooks.
        OccupiedError: `out` holds something else, or an unfinished run with other settings.
        NonFiniteError: a NaN or an Inf in the activations; the last checkpoint stays.
        InterruptedRunError: Ctrl-C; the checkpoint taken then says where to go on.
    """
    with watched():
        one = SweepRun("", as_hooks(hook), as_hooks(hook_out), config)
        run = SingleRun(source, one, out, provenance or {}, trackers, snapshots)
        # A process that was killed between putting the SAE there and deleting its working folder had finished.
        report = run.finished() if run.team.same(int(run.is_half_done)) else None
        return report or _train_all([run], source, progress)[0]


def train_sweep(
    source: ActivationSource,
    runs: Sequence[SweepRun],
    out: str | Path | None = None,
    *,
    progress: Callable[[int, int | None], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    trackers: Sequence[str] = (),
    snapshots: int = 0,
) -> list[TrainReport]:
    """Train many SAEs from one pass over the data, each as `train` would alone on the same rows.

    With several hooks the rows are those that are no outlier at any of them.

    Args:
        source: as for `train`.
        runs: what to train, such as `scope.training.sweep` makes them; all with the same batches.
        out: each run's SAE is put in the folder of its name below this one. None keeps them in memory.
        progress: called with (rows done, rows in all).
        provenance: as for `train`.
        trackers: as for `train`; each run has its own.
        snapshots: as for `train`.

    Returns:
        A report for each run; one whose SAE is there already, from the same source and settings, is not trained again.

    Raises:
        InvalidInputError: there are no runs, two have one name, or they do not take the same batches.
        UnknownNameError, OccupiedError, NonFiniteError, InterruptedRunError: as `train`; all runs can be taken up.
    """
    require_one_pass(runs)
    folder = None if out is None else Path(out)
    with watched():
        known = provenance or {}
        made = [
            SingleRun(source, run, folder / run.name if folder else None, known, trackers, snapshots) for run in runs
        ]
        finished = [run.finished() for run in made]
        left = [run for run, report in zip(made, finished, strict=True) if report is None]
        reports = iter(_train_all(left, source, progress))
        return [report or next(reports) for report in finished]


def _train_all(
    runs: list[SingleRun], source: ActivationSource, progress: Callable[[int, int | None], None] | None
) -> list[TrainReport]:
    """Train what is not finished, together, and save each."""
    if not runs:
        return []
    hooks = list(dict.fromkeys(hook for run in runs for hook in run.hooks))
    stream = shuffled_batches(source, hooks, runs[0].config)
    with contextlib.ExitStack() as stack:
        try:
            for run in runs:
                run.open(stack)
            reports = _Loop(runs, stream, source, progress).run()
        except NonFiniteError as error:
            kept = [str(run.work.path) for run in runs if run.work and run.work.has_checkpoint]
            if not kept:
                raise
            raise NonFiniteError(f"{error} The last checkpoint stays in {', '.join(kept)}.") from error
        except KeyboardInterrupt as error:  # outside of the steps, or a second one within
            kept = [str(run.work.path) for run in runs if run.work and run.work.has_checkpoint]
            if runs[0].out is None:
                raise
            told = (
                f"The last checkpoint stays in {', '.join(kept)}; give the same command or call again to go on from it."
                if kept
                else "There was no checkpoint yet; nothing was kept."
            )
            raise InterruptedRunError(f"Training was interrupted. {told}") from error
        for run, report in zip(runs, reports, strict=True):
            run.save(report)
    return reports


class _Loop:
    """The loop around some trainers, with or without working folders."""

    def __init__(
        self,
        runs: list[SingleRun],
        stream: BatchStream,
        source: ActivationSource,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.runs, self.stream, self.source = runs, stream, source
        self.config, self.team = runs[0].trainer.config, runs[0].team
        self.progress = progress if progress and self.team.leads else lambda done, total: None
        together = self.team.size > 1 and self.config.device.startswith("cuda")
        self.look_every = INTERRUPT_STEPS if together else 1

    def run(self) -> list[TrainReport]:
        config = self.config
        start = min(run.trainer.steps_done for run in self.runs)
        own = (batch.part(self.team.part_of(len(batch.rows))) for batch in self.stream(start))
        batches = Timed(self._initialised(on_device(own, config.device)))
        started = time.perf_counter() - max(run.seconds_before for run in self.runs)
        with _interrupt_deferred() as interrupted:
            for number, batch in zip(range(start, config.steps), batches, strict=False):
                seconds = time.perf_counter() - started
                due = [run for run in self.runs if run.trainer.steps_done == number]
                for run in due:
                    self._naming_the_document(run.take, batch, seconds, batches.waited)
                self.progress((number + 1) * config.batch_size, config.steps * config.batch_size)
                for run in due:
                    run.checkpoint_if_due(seconds)
                if (number + 1) % self.look_every == 0 and self.team.any(interrupted()):
                    self._stop(time.perf_counter() - started)
        return [run.report(time.perf_counter() - started) for run in self.runs]

    def _initialised(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        fresh = [run for run in self.runs if run.trainer.scales is None]
        if not fresh:
            return batches
        sample = list(itertools.islice(batches, -(-SAMPLE_ROWS // self.config.batch_size)))
        for run in fresh:
            values: list[Tensor] = []
            targets: list[Tensor] = []
            for batch in sample:
                own, target = run.rows_of(batch)
                values.append(self._whole_of(run, own, batch.rows))
                if target is not None:
                    targets.append(self._whole_of(run, target, batch.rows))
            run.trainer.initialise(torch.cat(values), torch.cat(targets) if targets else None)
        return itertools.chain(sample, batches)

    def _whole_of(self, run: SingleRun, own: Tensor, rows: np.ndarray) -> Tensor:
        """All processes' rows of a batch, found finite."""
        self._naming_the_document(run.trainer.require_finite, own, rows)
        return own if self.team.size == 1 else self.team.all_rows(own.float().flatten(1))

    def _naming_the_document(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except NonFiniteError as error:
            bad, locate = getattr(error, "rows", None), getattr(self.source, "document_at", None)
            if not bad or locate is None:
                raise
            document = locate(bad[0])
            named = document.get("title") or document.get("document")
            raise NonFiniteError(f"{error} Row {bad[0]:,} is of the document {named!r}.") from error

    def _stop(self, seconds: float) -> None:
        done = max(run.trainer.tokens_done for run in self.runs)
        told = f"Training was interrupted after {done:,} of {self.config.steps * self.config.batch_size:,} rows"
        if self.runs[0].work is None:
            raise InterruptedRunError(f"{told}; without an output folder nothing is kept.")
        for run in self.runs:
            run.checkpoint(seconds)
        folders = ", ".join(str(run.work.path) for run in self.runs if run.work)
        raise InterruptedRunError(
            f"{told}. A checkpoint lies in {folders}; give the same command or call again to go on from it."
        )


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the function it yields return True; a second one interrupts at once.

    Outside of the main thread, where signals cannot be caught, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
