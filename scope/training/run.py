"""`train`: from a source of activations to an SAE on disk.

1. Batches come shuffled from the source (`scope.training.data`), without BOS and other special tokens, held-out
   documents and outlier norms.
2. The trainer takes them one at a time; every few steps a line goes to the run log and a checkpoint to disk. While it
   runs, all this lies in the working folder (`scope.training.workfolder`).
3. At the end the SAE and its log are put in the output folder as a whole. A run that stopped early leaves its working
   folder, and the same call goes on from its last checkpoint to the weights of an uninterrupted run.
"""

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations.source import ActivationSource
from scope._version import __version__
from scope.errors import InterruptedRunError, NonFiniteError
from scope.saes import formats
from scope.training.config import TrainConfig
from scope.training.data import Batch, BatchStream, provenance_of, resolve_hook, shuffled_batches, width_of
from scope.training.report import TrainReport
from scope.training.trainer import SAETrainer, StepReport
from scope.training.workfolder import LOG_NAME, WorkFolder

__all__ = ["train"]

SAMPLE_ROWS = 8192
"""Rows that settle the scale and b_dec; they are trained on too."""
OVER_DENSE = 0.1
"""A feature that fires on a larger share of the rows is over-dense."""


def train(
    source: ActivationSource,
    hook: str,
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    progress: Callable[[int, int | None], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> TrainReport:
    """Train an SAE on one hook of a source.

    Args:
        source: a store, or anything else that satisfies `ActivationSource`.
        hook: the hook's name.
        config: the settings.
        out: the folder to make; None keeps the SAE in memory only, without checkpoints.
        progress: called with (rows done, rows in all).
        provenance: fields of `SAEMetadata` to record beside what the source itself knows.

    Raises:
        UnknownNameError: the source has no such hook, or there is no such architecture.
        InvalidInputError: the settings cannot be met, such as more rows in a batch than the source has to train on.
        OccupiedError: `out` holds something else, or an unfinished run with other settings.
        NonFiniteError: a NaN or an Inf in the activations; the last checkpoint stays.
        InterruptedRunError: Ctrl-C; the checkpoint taken then says where to go on.
    """
    hook = resolve_hook(source, hook)
    d_in, reshape = width_of(source, hook)
    metadata = provenance_of(source, hook, provenance or {})
    trainer = SAETrainer(config, d_in, metadata, reshape)
    stream = shuffled_batches(source, hook, config)
    description = {"config": config.to_dict(), "hook": hook, "d_in": d_in, "source": metadata.store_fingerprint}
    if out is None:
        return _Loop(trainer, stream, None, source, progress).run()
    with WorkFolder(Path(out), description) as work:
        try:
            report = _Loop(trainer, stream, work, source, progress).run()
        except KeyboardInterrupt as error:  # outside of the steps, or a second one within
            kept = (
                f"The last checkpoint stays in {work.path}; give the same command or call again to go on from it."
                if work.has_checkpoint
                else "There was no checkpoint yet; nothing was kept."
            )
            raise InterruptedRunError(f"Training was interrupted. {kept}") from error
        log, figures = {LOG_NAME: work.log()}, report.to_dict()
        formats.save(report.sae, work.out, density=trainer.density, companions=log, training=figures)
        work.remove()
    return report


class _Loop:
    """The loop around one trainer, with or without a working folder."""

    def __init__(
        self,
        trainer: SAETrainer,
        stream: BatchStream,
        work: WorkFolder | None,
        source: ActivationSource,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.trainer, self.stream, self.work, self.source = trainer, stream, work, source
        self.config = trainer.config
        self.progress = progress or (lambda done, total: None)
        self.lines: list[dict[str, Any]] = []

    def run(self) -> TrainReport:
        trainer, config, work = self.trainer, self.config, self.work
        seconds_before = work.resume(trainer) if work else 0.0
        self.lines = [json.loads(line) for line in work.log().splitlines()] if work else []
        resumed_at = trainer.steps_done
        batches = self._initialised(self.stream(resumed_at))
        started = time.perf_counter() - seconds_before
        with _interrupt_deferred() as interrupted:
            for rows, values in itertools.islice(batches, config.steps - resumed_at):
                step: StepReport = self._naming_the_document(trainer.step, values, rows)
                seconds = time.perf_counter() - started
                if step.step % config.log_steps == 0 or step.step == config.steps:
                    self._log(step, seconds)
                self.progress(step.tokens, config.steps * config.batch_size)
                if work and (step.step % config.checkpoint_steps == 0 or step.step == config.steps):
                    work.checkpoint(trainer, seconds)  # the last one too: saving the SAE may fail, on a full disk say
                if interrupted():
                    self._stop(seconds)
        return self._report(time.perf_counter() - started, resumed_at)

    def _initialised(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        if self.trainer.scale is not None:
            return batches
        sample = list(itertools.islice(batches, -(-SAMPLE_ROWS // self.config.batch_size)))
        for rows, values in sample:
            self._naming_the_document(self.trainer.require_finite, values, rows)
        self.trainer.initialise(torch.cat([batch.values for batch in sample]))
        return itertools.chain(sample, batches)

    def _naming_the_document(self, act: Callable[[Tensor, np.ndarray], Any], values: Tensor, rows: np.ndarray) -> Any:
        try:
            return act(values, rows)
        except NonFiniteError as error:
            bad, locate = getattr(error, "rows", None), getattr(self.source, "document_at", None)
            if not bad or locate is None:
                raise
            document = locate(bad[0])
            named = document.get("title") or document.get("document")
            raise NonFiniteError(f"{error} Row {bad[0]:,} is of the document {named!r}.") from error

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

    def _stop(self, seconds: float) -> None:
        done = f"{self.trainer.tokens_done:,} of {self.config.steps * self.config.batch_size:,} rows"
        if self.work is None:
            raise InterruptedRunError(
                f"Training was interrupted after {done}; without an output folder nothing is kept."
            )
        self.work.checkpoint(self.trainer, seconds)
        raise InterruptedRunError(
            f"Training was interrupted after {done}. A checkpoint lies in {self.work.path}; "
            "give the same command or call again to go on from it."
        )

    def _report(self, seconds: float, resumed_at: int) -> TrainReport:
        trainer, config = self.trainer, self.config
        sae = trainer.export()
        training = {**config.to_dict(), "peak_lr": config.peak_lr, "norm_scale": trainer.scale}
        sae.cfg = replace(sae.cfg, metadata=replace(sae.cfg.metadata, training=training, scope_version=__version__))
        tail = self.lines[-max(1, len(self.lines) // 10) :]
        return TrainReport(
            sae=sae,
            path=self.work.out if self.work else None,
            hook=str(sae.hook_name),
            steps=trainer.steps_done,
            tokens=trainer.tokens_done,
            seconds=seconds,
            resumed_at=resumed_at,
            fvu=fmean(line["fvu"] for line in tail),
            l0=fmean(line["l0"] for line in tail),
            dead_share=float((trainer.tokens_since_fired >= config.dead_after).float().mean()),
            dead_tokens=config.dead_after,
            over_dense_share=float((trainer.density > OVER_DENSE).float().mean()),
            log=tuple(self.lines),
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
