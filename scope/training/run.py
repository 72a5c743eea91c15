"""`train`: from a source of activations to an SAE on disk; `train_sweep`: to many, from one pass over the data.

1. Batches come shuffled from the source (`scope.training.data`), without BOS and other special tokens, held-out
   documents and outlier norms.
2. Each trainer takes them one at a time; every few steps a line goes to its run log and a checkpoint to disk. While it
   runs, all this lies in its working folder (`scope.training.workfolder`).
3. At the end the SAE and its log are put in the output folder as a whole. A run that stopped early leaves its working
   folder, and the same call goes on from its last checkpoint to the weights of an uninterrupted run.

In a sweep the batches start where the trainer that is furthest behind has to go on; the others wait for their own.
"""

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from activations.manifest import read_manifest
from activations.source import ActivationSource
from scope._version import __version__
from scope.errors import InterruptedRunError, NonFiniteError
from scope.saes import formats
from scope.saes.base import SAEMetadata
from scope.training.config import TrainConfig
from scope.training.data import (
    Batch,
    BatchStream,
    as_hooks,
    ports_of,
    provenance_of,
    shuffled_batches,
    side_by_side,
)
from scope.training.report import TrainReport
from scope.training.sweeps import SweepRun, require_one_pass
from scope.training.trainer import SAETrainer, StepReport
from scope.training.workfolder import LOG_NAME, WorkFolder

__all__ = ["is_result_of", "train", "train_sweep"]

SAMPLE_ROWS = 8192
"""Rows that settle the scale and b_dec; they are trained on too."""
OVER_DENSE = 0.1
"""A feature that fires on a larger share of the rows is over-dense."""


def train(
    source: ActivationSource,
    hook: str | Sequence[str],
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    hook_out: str | Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
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

    Raises:
        UnknownNameError: the source has no such hook, or there is no such architecture.
        InvalidInputError: the settings cannot be met, such as more rows in a batch than the source has to train on, or
            an architecture that does not read or write so many hooks.
        OccupiedError: `out` holds something else, or an unfinished run with other settings.
        NonFiniteError: a NaN or an Inf in the activations; the last checkpoint stays.
        InterruptedRunError: Ctrl-C; the checkpoint taken then says where to go on.
    """
    run = _Run(source, SweepRun("", as_hooks(hook), as_hooks(hook_out), config), out, provenance or {})
    return _train_all([run], source, progress)[0]


def train_sweep(
    source: ActivationSource,
    runs: Sequence[SweepRun],
    out: str | Path | None = None,
    *,
    progress: Callable[[int, int | None], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> list[TrainReport]:
    """Train many SAEs from one pass over the data, each as `train` would alone on the same rows.

    With several hooks the rows are those that are no outlier at any of them.

    Args:
        source: as for `train`.
        runs: what to train, such as `scope.training.sweep` makes them; all with the same batches.
        out: each run's SAE is put in the folder of its name below this one. None keeps them in memory.
        progress: called with (rows done, rows in all).
        provenance: as for `train`.

    Returns:
        A report for each run; one whose SAE is there already, from the same source and settings, is not trained again.

    Raises:
        InvalidInputError: there are no runs, two have one name, or they do not take the same batches.
        UnknownNameError, OccupiedError, NonFiniteError, InterruptedRunError: as `train`; all runs can be taken up.
    """
    require_one_pass(runs)
    folder = None if out is None else Path(out)
    made = [_Run(source, run, folder / run.name if folder else None, provenance or {}) for run in runs]
    finished = [run.finished() for run in made]
    left = [run for run, report in zip(made, finished, strict=True) if report is None]
    reports = iter(_train_all(left, source, progress))
    return [report or next(reports) for report in finished]


class _Run:
    """One SAE in training: its trainer, its ports, and, with an output folder, its working folder."""

    def __init__(
        self, source: ActivationSource, run: SweepRun, out: str | Path | None, provenance: Mapping[str, Any]
    ) -> None:
        self.config = run.config
        self.out = None if out is None else Path(out)
        self.ports, reshape = ports_of(source, run.hooks, run.hooks_out)
        self.metadata = provenance_of(source, self.ports, provenance)
        self.trainer = SAETrainer(run.config, self.ports, self.metadata, reshape)
        self.work: WorkFolder | None = None
        self.lines: list[dict[str, Any]] = []
        self.seconds_before, self.resumed_at = 0.0, 0

    @property
    def hooks(self) -> list[str]:
        """All hooks that the run reads rows of."""
        return [str(port.hook) for side in self.ports for port in side]

    @property
    def label(self) -> str:
        """The hooks, for a person."""
        sides = [", ".join(str(port.hook) for port in side) for side in self.ports if side]
        return " -> ".join(sides)

    def description(self) -> dict[str, Any]:
        """What the run is, JSON-able: a resume with another is refused."""
        return {
            "config": self.config.to_dict(),
            "hook": self.label,
            "d_in": self.trainer.sae.d_in,
            "source": self.metadata.store_fingerprint,
        }

    def open(self, stack: contextlib.ExitStack) -> None:
        """Take up the working folder, where there is to be one, and what an earlier call left in it."""
        if self.out is None:
            return
        self.work = stack.enter_context(WorkFolder(self.out, self.description()))
        self.seconds_before = self.work.resume(self.trainer)
        self.lines = [json.loads(line) for line in self.work.log().splitlines()]
        self.resumed_at = self.trainer.steps_done

    def rows_of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Inputs and, where they are others, targets of a batch."""
        target = side_by_side(batch.values, self.ports.outputs) if self.ports.outputs else None
        return side_by_side(batch.values, self.ports.inputs), target

    def take(self, batch: Batch, seconds: float) -> None:
        """A step and its line in the log."""
        values, target = self.rows_of(batch)
        step = self.trainer.step(values, batch.rows, target)
        if step.step % self.config.log_steps == 0 or step.step == self.config.steps:
            self._log(step, seconds)

    def checkpoint_if_due(self, seconds: float) -> None:
        """Replace the checkpoint every so many steps, and at the last one: saving the SAE may fail, on a full disk."""
        steps_done = self.trainer.steps_done
        if steps_done % self.config.checkpoint_steps == 0 or steps_done == self.config.steps:
            self.checkpoint(seconds)

    def checkpoint(self, seconds: float) -> None:
        """Replace the checkpoint, where there is a working folder."""
        if self.work:
            self.work.checkpoint(self.trainer, seconds)

    def _log(self, step: StepReport, seconds: float) -> None:
        line = {
            "step": step.step,
            "tokens": step.tokens,
            "loss": float(step.loss),
            "fvu": float(step.fvu),
            "l0": float(step.l0),
            **{f"{name}_loss": float(value) for name, value in step.parts.items()},
            **({} if step.coefficient is None else {"sparsity_coefficient": float(step.coefficient)}),
            "dead": int(step.dead),
            "dead_share": float(step.dead) / self.config.d_sae,
            "learning_rate": step.learning_rate,
            "grad_norm": float(step.grad_norm),
            "tokens_per_s": round(step.tokens / seconds, 1),
        }
        self.lines.append(line)
        if self.work:
            self.work.append(line)

    def report(self, seconds: float) -> TrainReport:
        """The finished run."""
        trainer, config = self.trainer, self.config
        sae = trainer.export()
        scale = trainer.scale if len(trainer.scales or ()) == 1 else trainer.scales
        training = {**config.to_dict(), "peak_lr": config.peak_lr, "norm_scale": scale}
        sae.cfg = replace(sae.cfg, metadata=replace(sae.cfg.metadata, training=training, scope_version=__version__))
        tail = self.lines[-max(1, len(self.lines) // 10) :]
        return TrainReport(
            sae=sae,
            path=self.work.out if self.work else None,
            hook=self.label,
            steps=trainer.steps_done,
            tokens=trainer.tokens_done,
            seconds=seconds,
            resumed_at=self.resumed_at,
            fvu=fmean(line["fvu"] for line in tail),
            l0=fmean(line["l0"] for line in tail),
            dead_share=float((trainer.tokens_since_fired >= config.dead_after).float().mean()),
            dead_tokens=config.dead_after,
            over_dense_share=float((trainer.density > OVER_DENSE).float().mean()),
            log=tuple(self.lines),
        )

    def save(self, report: TrainReport) -> None:
        """Put the SAE and its log in the output folder, and end the working folder."""
        if self.work is None:
            return
        log, figures = {LOG_NAME: self.work.log()}, report.to_dict()
        formats.save(report.sae, self.work.out, density=self.trainer.density, companions=log, training=figures)
        self.work.remove()

    def finished(self) -> TrainReport | None:
        """The report of this very run where its SAE is in the output folder; None where it is not."""
        if self.out is None or not is_result_of(self.out, self.metadata, self.config):
            return None
        lines = [json.loads(line) for line in (self.out / LOG_NAME).read_text().splitlines()]
        figures = read_manifest(self.out, "sae")["training"]
        named = {name.removeprefix("train_"): value for name, value in figures.items()}
        kept = {f.name: named[f.name] for f in fields(TrainReport) if f.name in named and f.name != "path"}
        return TrainReport(
            sae=formats.load(self.out), path=self.out, **{**kept, "resumed_at": self.config.steps}, log=tuple(lines)
        )


def is_result_of(folder: Path, metadata: SAEMetadata, config: TrainConfig) -> bool:
    """Whether a folder holds the SAE of a run with these hooks, this source and these settings."""
    if not (folder / "manifest.json").is_file() or not metadata.store_fingerprint:
        return False
    found = formats.load(folder).cfg.metadata
    recorded = json.loads(json.dumps(dict(found.training or {})))
    asked = json.loads(json.dumps(config.to_dict()))
    same = ("hook_name", "hook_name_out", "hook_names", "hook_names_out", "store_fingerprint")
    return all(getattr(found, name) == getattr(metadata, name) for name in same) and {**recorded, **asked} == recorded


def _train_all(
    runs: list[_Run], source: ActivationSource, progress: Callable[[int, int | None], None] | None
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
        runs: list[_Run],
        stream: BatchStream,
        source: ActivationSource,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.runs, self.stream, self.source = runs, stream, source
        self.config = runs[0].config
        self.progress = progress or (lambda done, total: None)

    def run(self) -> list[TrainReport]:
        config = self.config
        start = min(run.trainer.steps_done for run in self.runs)
        batches = self._initialised(self.stream(start))
        started = time.perf_counter() - max(run.seconds_before for run in self.runs)
        with _interrupt_deferred() as interrupted:
            for number, batch in zip(range(start, config.steps), batches, strict=False):
                seconds = time.perf_counter() - started
                due = [run for run in self.runs if run.trainer.steps_done == number]
                for run in due:
                    self._naming_the_document(run.take, batch, seconds)
                self.progress((number + 1) * config.batch_size, config.steps * config.batch_size)
                for run in due:
                    run.checkpoint_if_due(seconds)
                if interrupted():
                    self._stop(time.perf_counter() - started)
        return [run.report(time.perf_counter() - started) for run in self.runs]

    def _initialised(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        fresh = [run for run in self.runs if run.trainer.scales is None]
        if not fresh:
            return batches
        sample = list(itertools.islice(batches, -(-SAMPLE_ROWS // self.config.batch_size)))
        for run in fresh:
            parts = [run.rows_of(batch) for batch in sample]
            for batch, part in zip(sample, parts, strict=True):
                for values in part:
                    if values is not None:
                        self._naming_the_document(run.trainer.require_finite, values, batch.rows)
            targets = [target for _, target in parts if target is not None]
            run.trainer.initialise(torch.cat([values for values, _ in parts]), torch.cat(targets) if targets else None)
        return itertools.chain(sample, batches)

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
