"""A sweep: many SAEs from one pass, each as if it were trained alone, and several hooks in one run."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_training import one_thread, synthetic  # noqa: F401  # a fixture
from torch import Tensor

from activations.source import ActivationBatch
from activations.spec import StorageDtype
from scope.errors import InvalidInputError, OccupiedError, UnknownNameError
from scope.saes import formats
from scope.training import SweepRun, TrainConfig, sweep, train, train_sweep
from scope.training.data import BatchStream, shuffled_batches

pytestmark = pytest.mark.usefixtures("one_thread")
IN, OUT, Z = "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"
CONFIG = TrainConfig(
    d_sae=48, k=4, tokens=30 * 128, batch_size=128, lr=3e-3, checkpoint_steps=10, log_steps=5, shuffle_bytes=2**22
)


class Several:
    """An `ActivationSource` over float32 tensors by hook, whose rows belong together."""

    fingerprint = "e" * 64
    dtype: StorageDtype = "float32"

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.hooks = tuple(values)
        self.n_rows = len(next(iter(values.values())))

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape[1:])

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        for at in range(start, self.n_rows, batch_size):
            rows = np.arange(at, min(at + batch_size, self.n_rows))
            values = {hook: self.values[hook].numpy()[rows] for hook in hooks}
            norms = {
                hook: np.linalg.norm(v.reshape(len(v), -1), axis=1).astype(np.float32) for hook, v in values.items()
            }
            yield ActivationBatch(rows, values, np.zeros(len(rows), np.uint8), norms)


@pytest.fixture
def source() -> Several:
    rows = synthetic(4000).rows
    mixed = 0.3 * rows @ torch.randn(32, 24, generator=torch.Generator().manual_seed(9)) - 2
    return Several({IN: rows, OUT: mixed, Z: rows.view(-1, 4, 8)})


def test_every_sae_of_a_sweep_is_as_if_trained_alone_and_all_see_one_pass(
    source: Several, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sweep(CONFIG, [IN], arch=["topk", "jumprelu"], k=[2, 4], d_sae=[32])
    assert [run.name for run in runs] == ["arch-topk_k-2", "arch-topk_k-4", "arch-jumprelu_k-2", "arch-jumprelu_k-4"]
    alone = [train(source, IN, run.config).sae.fingerprint for run in runs]
    streams: list[object] = []

    def counted(*arguments: Any) -> BatchStream:
        streams.append(arguments)
        return shuffled_batches(*arguments)

    monkeypatch.setattr("scope.training.run.shuffled_batches", counted)
    seen: list[tuple[int, int | None]] = []
    reports = train_sweep(source, runs, tmp_path / "all", progress=lambda *done: seen.append(done))
    assert len(streams) == 1
    assert seen[-1] == (CONFIG.tokens, CONFIG.tokens)
    assert [report.sae.fingerprint for report in reports] == alone
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(run.name for run in runs)
    for run, report in zip(runs, reports, strict=True):
        assert formats.load(tmp_path / "all" / run.name).fingerprint == report.sae.fingerprint
        lines = (tmp_path / "all" / run.name / "train.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20, 25, 30]


class CrashError(Exception):
    """The process dies."""


@pytest.mark.parametrize("steps", [7, 29])
def test_a_stopped_sweep_goes_on_to_the_same_weights(source: Several, tmp_path: Path, steps: int) -> None:
    runs = sweep(CONFIG, [IN, Z], k=[2, 4])
    whole = [report.sae.fingerprint for report in train_sweep(source, runs)]

    def die(done: int, total: int | None) -> None:
        if done == steps * 128:
            raise CrashError

    with pytest.raises(CrashError):
        train_sweep(source, runs, tmp_path, progress=die)
    assert [report.sae.fingerprint for report in train_sweep(source, runs, tmp_path)] == whole


def test_trainers_at_different_steps_are_brought_together(
    source: Several, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the checkpoints of two runs, and one between the saving of two SAEs."""
    from scope.training.workfolder import WorkFolder

    runs = sweep(CONFIG, [IN], k=[2, 3, 4])
    whole = [report.sae.fingerprint for report in train_sweep(source, runs)]
    write = WorkFolder.checkpoint

    def die_on_the_second(self: WorkFolder, tensors: object, counters: dict[str, int], seconds: float) -> None:
        if counters["steps_done"] == 20 and runs[1].name in self.path.name:
            raise CrashError
        write(self, tensors, counters, seconds)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "checkpoint", die_on_the_second)
        with pytest.raises(CrashError):
            train_sweep(source, runs, tmp_path)
    saved: list[int] = []

    def die_after_one(*arguments: object, **options: object) -> None:
        if saved:
            raise CrashError
        saved.append(1)
        save(*arguments, **options)  # type: ignore[arg-type]

    save = formats.save
    with monkeypatch.context() as patch:
        patch.setattr(formats, "save", die_after_one)
        with pytest.raises(CrashError):
            train_sweep(source, runs, tmp_path)
    reports = train_sweep(source, runs, tmp_path)
    assert [report.sae.fingerprint for report in reports] == whole
    assert [report.resumed_at for report in reports] == [30, 30, 30]
    assert reports[0].l0 == pytest.approx(2, abs=0.1)
    assert reports[0].log == tuple(
        json.loads(line) for line in (tmp_path / "k-2" / "train.jsonl").read_text().splitlines()
    )


def test_what_cannot_be_swept_is_refused_before_anything_is_written(source: Several, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be swept"):
        sweep(CONFIG, [IN], tokens=[1, 2])
    with pytest.raises(InvalidInputError, match="k is 100"):
        sweep(CONFIG, [IN], k=[4, 100])
    one = SweepRun("a", (IN,), (), CONFIG)
    for runs, message in (
        ([], "at least one"),
        ([one, one], "each another"),
        ([one, replace(one, name="b", config=replace(CONFIG, batch_size=64))], "batch_size is 64 and 128"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            train_sweep(source, runs, tmp_path / "none")
    with pytest.raises(UnknownNameError):
        train_sweep(source, [one, SweepRun("b", ("nowhere",), (), CONFIG)], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_finished_run_with_other_settings_stays(source: Several, tmp_path: Path) -> None:
    train_sweep(source, sweep(CONFIG, [IN], k=[2, 3]), tmp_path)
    with pytest.raises(OccupiedError):
        train_sweep(source, sweep(replace(CONFIG, lr=1e-3), [IN], k=[2, 3]), tmp_path)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "crosscoder", "clt"])
def test_several_hooks_in_one_run(source: Several, tmp_path: Path, architecture: str) -> None:
    reads: list[str] = [IN] if "transcoder" in architecture else [IN, Z]
    writes = {"crosscoder": [], "clt": [OUT, "blocks.1.hook_mlp_out"]}.get(architecture, [OUT])
    source.values["blocks.1.hook_mlp_out"] = source.values[OUT].flip(1)
    source.hooks = tuple(source.values)
    config = replace(CONFIG, arch=architecture)
    report = train(source, reads, config, tmp_path / "one", hook_out=writes)
    assert report.fvu < report.log[0]["fvu"]
    sae = formats.load(tmp_path / "one")
    metadata = sae.cfg.metadata
    assert [port.hook for side in sae.cfg.ports for port in side] == [*reads, *writes]
    assert (metadata.hook_name, metadata.hook_name_out) == ((IN, OUT) if "transcoder" in architecture else (None, None))
    assert all(hook in report.summary() for hook in (*reads, *writes))
    x = torch.cat([source.values[hook].flatten(1) for hook in reads], dim=1)[:500]
    y = torch.cat([source.values[hook].flatten(1) for hook in writes or reads], dim=1)[:500]
    with torch.no_grad():
        assert float((sae(x) - y).square().sum()) < 0.95 * float((y - y.mean(0)).square().sum())
    with pytest.raises(InvalidInputError, match="given twice"):
        train(source, [IN, IN], config, hook_out=writes)
