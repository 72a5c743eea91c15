"""One SAE in training, as the loop of `scope.training.run` drives it: steps, log, checkpoints, report and folder.

Where several processes train it (`scope.training.distributed`), each has a `SingleRun`, and the first one alone writes.
All must see the output folder, from which they take up a run.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from activations.manifest import read_manifest
from activations.source import ActivationSource
from scope._version import __version__
from scope.errors import MismatchError
from scope.saes import formats
from scope.saes.base import SAEMetadata
from scope.training.checkpoints import load_checkpoint
from scope.training.config import TrainConfig
from scope.training.data import Batch, ports_of, provenance_of, side_by_side
from scope.training.distributed import local_device, team_for
from scope.training.report import TrainReport
from scope.training.snapshots import save_snapshot, snapshot_steps
from scope.training.sweeps import SweepRun
from scope.training.trackers import Trackers, open_tracker, require_trackers
from scope.training.trainer import OVER_DENSE, SAETrainer, StepReport
from scope.training.workfolder import CHECKPOINT_NAME, LOG_NAME, WorkFolder, clear_beside, folder_beside

__all__ = ["SingleRun", "is_result_of"]


class SingleRun:
    """One SAE in training: its trainer, its ports, and, with an output folder, its working folder.

    Args:
        source: where rows come from.
        run: the hooks and the settings.
        out: the folder to make; None for none.
        provenance: fields of `SAEMetadata` to record beside what the source itself knows.
        trackers: where else the run log's lines go (`scope.training.trackers`).
        snapshots: decoders to keep along the way (`scope.training.snapshots`).

    Raises:
        MissingDependencyError: a tracker's package is not installed.
        UnknownNameError, InvalidInputError: the source or the architecture does not fit the hooks or the settings.
    """

    def __init__(
        self,
        source: ActivationSource,
        run: SweepRun,
        out: str | Path | None,
        provenance: Mapping[str, Any],
        trackers: Sequence[str] = (),
        snapshots: int = 0,
    ) -> None:
        self.config = run.config
        self.tracker_names, self.trackers = require_trackers(trackers), Trackers({})
        self.out = None if out is None else Path(out)
        self.snapshots_at = snapshot_steps(run.config.steps, snapshots)
        self.ports, reshape = ports_of(source, run.hooks, run.hooks_out)
        self.metadata = provenance_of(source, self.ports, provenance)
        device = local_device(run.config.device)
        self.team = team_for(run.config.parallel, device)
        self.trainer = SAETrainer(replace(run.config, device=device), self.ports, self.metadata, reshape, self.team)
        self._density: Tensor | None = None
        self.work: WorkFolder | None = None
        self.lines: list[dict[str, Any]] = []
        self.seconds_before, self.resumed_at = 0.0, 0
        self.waited, self._logged_at = 0.0, (0.0, 0.0)

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
        """What the run is, JSON-able: a resume with another is refused. How many processes it has, and what they
        divide, is not part of it."""
        return {
            "config": _without_parallel(self.config.to_dict()),
            "hook": self.label,
            "d_in": self.trainer.sae.d_in,
            "source": self.metadata.store_fingerprint,
        }

    def open(self, stack: contextlib.ExitStack) -> None:
        """Take up the working folder, where there is to be one, and what an earlier call left in it."""
        if self.out is not None:
            self.team.led(lambda: self._take_up(stack))
            if not self.team.leads:
                self._follow()
            self.resumed_at = self.trainer.steps_done
            if self.team.same(self.resumed_at) != self.resumed_at:
                raise MismatchError(
                    f"Process {self.team.rank} sees another checkpoint in {folder_beside(self.out)} than the first "
                    "one. The output folder must be one that all processes see."
                )
        self._logged_at = (self.seconds_before, 0.0)
        if self.team.leads:
            self._open_trackers(stack)

    def _take_up(self, stack: contextlib.ExitStack) -> None:
        assert self.out is not None
        self.work = stack.enter_context(WorkFolder(self.out, self.description()))
        self.seconds_before = self.work.resume(self.trainer)
        self.lines = [json.loads(line) for line in self.work.log().splitlines()]

    def _follow(self) -> None:
        """Take up what the first process has taken up; it writes, and this one reads alone."""
        assert self.out is not None
        folder = folder_beside(self.out)
        if (folder / CHECKPOINT_NAME).is_file():
            load_checkpoint(folder / CHECKPOINT_NAME, self.trainer)
            self.lines = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]

    def _open_trackers(self, stack: contextlib.ExitStack) -> None:
        key = self.work.tracker_key() if self.work and self.tracker_names else None
        settings = {**self.config.to_dict(), "hook": self.label, "d_in": self.trainer.sae.d_in}
        for name in self.tracker_names:
            self.trackers.add(name, open_tracker(name, self.out, settings, key, self.resumed_at))
        stack.callback(self.trackers.close)

    def rows_of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Inputs and, where they are others, targets of a batch."""
        target = side_by_side(batch.values, self.ports.outputs) if self.ports.outputs else None
        return side_by_side(batch.values, self.ports.inputs), target

    def take(self, batch: Batch, seconds: float, waited: float = 0.0) -> None:
        """A step and its line in the log; `waited` is how long of this call the loop has waited for batches."""
        self.waited = waited
        values, target = self.rows_of(batch)
        step = self.trainer.step(values, batch.rows, target)
        if step.step % self.config.log_steps == 0 or step.step == self.config.steps:
            self._log(step, seconds)

    def checkpoint_if_due(self, seconds: float) -> None:
        """Replace the checkpoint every so many steps, and at the last one: saving the SAE may fail, on a full disk."""
        steps_done = self.trainer.steps_done
        if steps_done in self.snapshots_at and self.out is not None:
            self._snapshot(self.out, seconds)
        if steps_done % self.config.checkpoint_steps == 0 or steps_done == self.config.steps:
            self.checkpoint(seconds)

    def _snapshot(self, out: Path, seconds: float) -> None:
        rows, trainer = self.trainer.export().W_dec, self.trainer
        self.team.led(lambda: save_snapshot(out, rows, trainer.steps_done, trainer.tokens_done, seconds))

    def checkpoint(self, seconds: float) -> None:
        """Replace the checkpoint, where there is a working folder; one with a NaN in it would replace a good one."""
        self.trainer.require_finite_weights()
        if self.out is None:
            return
        tensors, counters = self.trainer.state_tensors(), self.trainer.counters()

        def write() -> None:
            assert self.work is not None
            self.work.checkpoint(tensors, counters, seconds)

        self.team.led(write)

    def _log(self, step: StepReport, seconds: float) -> None:
        (before, waited_before), self._logged_at = self._logged_at, (seconds, self.waited)
        took = seconds - before
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
            **({} if step.over_dense is None else {"over_dense_share": float(step.over_dense) / self.config.d_sae}),
            "learning_rate": step.learning_rate,
            "grad_norm": float(step.grad_norm),
            "tokens_per_s": round(step.tokens / seconds, 1),
            "data_wait_share": round((self.waited - waited_before) / took, 4) if took > 0 else 0.0,
        }
        self.lines.append(line)
        self.trackers.log(line)
        if self.work:
            self.work.append(line)

    def report(self, seconds: float) -> TrainReport:
        """The finished run."""
        trainer, config = self.trainer, self.config
        sae = trainer.export()
        scale = trainer.scale if len(trainer.scales or ()) == 1 else trainer.scales
        training = {**config.to_dict(), "peak_lr": config.peak_lr, "norm_scale": scale}
        sae.cfg = replace(sae.cfg, metadata=replace(sae.cfg.metadata, training=training, scope_version=__version__))
        if self.team.size > 1:
            training["processes"] = self.team.size
        self._density = trainer.density
        tail = self.lines[-max(1, len(self.lines) // 10) :]
        return TrainReport(
            sae=sae,
            path=self.out,
            hook=self.label,
            steps=trainer.steps_done,
            tokens=trainer.tokens_done,
            seconds=seconds,
            resumed_at=self.resumed_at,
            fvu=fmean(line["fvu"] for line in tail),
            l0=fmean(line["l0"] for line in tail),
            dead_share=trainer.dead_share,
            dead_tokens=config.dead_after,
            over_dense_share=float((self._density > OVER_DENSE).float().mean()),
            data_wait_share=self.waited / max(1e-9, seconds - self.seconds_before),
            log=tuple(self.lines),
        )

    def save(self, report: TrainReport) -> None:
        """Put the SAE and its log in the output folder, and end the working folder."""
        self.team.led(lambda: self._save(report))

    def _save(self, report: TrainReport) -> None:
        if self.work is None:
            return
        log, figures = {LOG_NAME: self.work.log()}, report.to_dict()
        formats.save(report.sae, self.work.out, density=self._density, companions=log, training=figures)
        self.work.remove()

    @property
    def is_half_done(self) -> bool:
        """Whether there is a working folder; beside a finished SAE it is what a killed process could not delete."""
        return self.out is not None and folder_beside(self.out).is_dir()

    def finished(self) -> TrainReport | None:
        """The report of this very run where its SAE is in the output folder; None where it is not.

        What a process that was killed right then has left of the working folder is deleted.
        """
        there = self.out is not None and is_result_of(self.out, self.metadata, self.config)
        if not self.team.same(int(there)):
            return None
        assert self.out is not None
        if self.team.leads:
            clear_beside(self.out)
        lines = [json.loads(line) for line in (self.out / LOG_NAME).read_text().splitlines()]
        figures = read_manifest(self.out, "sae")["training"]
        named = {name.removeprefix("train_"): value for name, value in figures.items()}
        kept = {f.name: named[f.name] for f in fields(TrainReport) if f.name in named and f.name != "path"}
        return TrainReport(
            sae=formats.load(self.out), path=self.out, **{**kept, "resumed_at": self.config.steps}, log=tuple(lines)
        )


def _without_parallel(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide what comes out: what processes divide among them does not."""
    return {name: value for name, value in settings.items() if name != "parallel"}


def is_result_of(folder: Path, metadata: SAEMetadata, config: TrainConfig) -> bool:
    """Whether a folder holds the SAE of a run with these hooks, this source and these settings."""
    if not (folder / "manifest.json").is_file() or not metadata.store_fingerprint:
        return False
    found = formats.load(folder).cfg.metadata
    recorded = json.loads(json.dumps(dict(found.training or {})))
    asked = _without_parallel(json.loads(json.dumps(config.to_dict())))
    same = ("hook_name", "hook_name_out", "hook_names", "hook_names_out", "store_fingerprint")
    return all(getattr(found, name) == getattr(metadata, name) for name in same) and {**recorded, **asked} == recorded
