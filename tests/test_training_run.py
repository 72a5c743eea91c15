"""`train` from a source to a folder: what it uses, what it leaves, and how it goes on after a stop."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_activations import FakeModel, write_text
from helpers_training import HOOK, MemorySource, one_thread, synthetic, with_flags  # noqa: F401  # a fixture

from activations.capture import capture
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import (
    IntegrityError,
    InterruptedRunError,
    InvalidInputError,
    LockedError,
    NonFiniteError,
    OccupiedError,
    UnknownNameError,
)
from scope.saes import formats
from scope.training import TrainConfig, train
from scope.training.data import shuffled_batches
from scope.training.metrics import reconstruction_metrics
from scope.training.workfolder import WorkFolder

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(
    d_sae=48, k=4, tokens=30 * 128, batch_size=128, lr=3e-3, checkpoint_steps=10, log_steps=5, shuffle_bytes=2**18
)


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return MemorySource(synthetic(3000).rows)


class Stopping:
    """A progress callback that stops the run after some steps as Ctrl-C would, or as a crash."""

    def __init__(self, steps: int, crash: bool = False) -> None:
        self.left, self.crash = steps, crash

    def __call__(self, done: int, total: int | None) -> None:
        self.left -= 1
        if self.left == 0:
            if self.crash:
                raise RuntimeError("killed")
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_leaves_an_sae_its_log_and_nothing_else(source: MemorySource, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    report = train(source, HOOK, CONFIG, tmp_path / "saes" / "one", progress=lambda *done: seen.append(done))
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["one"]
    names = {"cfg.json", "manifest.json", "sae_weights.safetensors", "sparsity.safetensors", "train.jsonl"}
    assert {path.name for path in (tmp_path / "saes" / "one").iterdir()} == names
    loaded = formats.load(tmp_path / "saes" / "one")
    assert loaded.fingerprint == report.sae.fingerprint
    metadata = loaded.cfg.metadata
    assert (metadata.hook_name, metadata.store_fingerprint) == (HOOK, "e" * 64)
    assert metadata.training is not None
    assert metadata.training["lr"] == 3e-3
    assert seen[-1] == (30 * 128, 30 * 128)
    log = [json.loads(line) for line in (tmp_path / "saes" / "one" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30]
    assert {"tokens", "loss", "fvu", "l0", "dead", "learning_rate", "grad_norm", "tokens_per_s"} <= log[0].keys()
    assert report.fvu < log[0]["fvu"]
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 30
    assert "48 features" in report.summary()
    assert len(report.log_frame()) == 6


def test_without_an_output_folder_the_sae_stays_in_memory(source: MemorySource, tmp_path: Path) -> None:
    saved = train(source, HOOK, CONFIG, tmp_path / "one")
    assert train(source, HOOK, CONFIG).sae.fingerprint == saved.sae.fingerprint


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("steps", [1, 14, 20])
def test_a_stopped_run_goes_on_to_the_same_weights(
    source: MemorySource, tmp_path: Path, steps: int, crash: bool
) -> None:
    whole = train(source, HOOK, CONFIG, tmp_path / "whole")
    expected = RuntimeError if crash else InterruptedRunError
    with pytest.raises(expected, match="killed" if crash else "again to go on"):
        train(source, HOOK, CONFIG, tmp_path / "one", progress=Stopping(steps, crash))
    assert not (tmp_path / "one").exists()
    resumed = train(source, HOOK, CONFIG, tmp_path / "one")
    assert resumed.resumed_at == ((steps - 1) // 10 * 10 if crash else steps)
    assert resumed.sae.fingerprint == whole.sae.fingerprint
    without_time = [
        [{**line, "tokens_per_s": 0, "data_wait_share": 0} for line in report.log] for report in (resumed, whole)
    ]
    assert without_time[0] == without_time[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "whole"]


def test_what_a_kill_leaves_of_a_finished_runs_folder_is_nothing_to_go_on_from(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the folder was taken away, some files are gone and some are not."""

    def removed_in_part(path: Path, *_: object, **__: object) -> None:
        (path / "train.jsonl").unlink(missing_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr("scope.training.workfolder.shutil.rmtree", removed_in_part)
        whole = train(source, HOOK, CONFIG, tmp_path / "one")
    assert (tmp_path / ".one.training").is_dir()
    shutil.rmtree(tmp_path / "one")
    again = train(source, HOOK, CONFIG, tmp_path / "one")
    assert again.resumed_at == 0
    assert again.sae.fingerprint == whole.sae.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_run_that_cannot_be_saved_is_not_lost(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("scope.saes.formats.saelens.write_atomically", full_disk)
        with pytest.raises(OSError, match="No space"):
            train(source, HOOK, CONFIG, tmp_path / "one")
    resumed = train(source, HOOK, CONFIG, tmp_path / "one")
    assert resumed.resumed_at == resumed.steps == 30
    assert resumed.sae.fingerprint == train(source, HOOK, CONFIG).sae.fingerprint


@pytest.mark.parametrize("steps", [3, 13])
def test_a_second_interrupt_stops_at_once(source: MemorySource, tmp_path: Path, steps: int) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done >= steps * 128:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="go on from it" if steps > 10 else "nothing was kept"):
        train(source, HOOK, CONFIG, tmp_path / "one", progress=interrupt)
    assert len(list(tmp_path.iterdir())) == (1 if steps > 10 else 0)


def test_a_run_with_other_settings_is_not_taken_up(source: MemorySource, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(source, HOOK, CONFIG, tmp_path / "one", progress=Stopping(12))
    with pytest.raises(OccupiedError, match="k is 5, there 4"):
        train(source, HOOK, replace(CONFIG, k=5), tmp_path / "one")
    train(source, HOOK, CONFIG, tmp_path / "one")


def test_a_finished_sae_is_not_overwritten(source: MemorySource, tmp_path: Path) -> None:
    train(source, HOOK, CONFIG, tmp_path / "one")
    with pytest.raises(OccupiedError):
        train(source, HOOK, CONFIG, tmp_path / "one")


def test_two_processes_do_not_train_one_sae(source: MemorySource, tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "one", {}), pytest.raises(LockedError):
        train(source, HOOK, CONFIG, tmp_path / "one")


def test_a_broken_checkpoint_is_named(source: MemorySource, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(source, HOOK, CONFIG, tmp_path / "one", progress=Stopping(12))
    os.truncate(tmp_path / ".one.training" / "checkpoint.safetensors", 5000)
    with pytest.raises(IntegrityError, match="checkpoint"):
        train(source, HOOK, CONFIG, tmp_path / "one")


def test_bos_special_held_out_and_outlier_rows_are_never_trained_on() -> None:
    rows = synthetic(3000).rows
    flags = (
        with_flags(3000, 7, RowFlag.BOS)
        | with_flags(3000, 11, RowFlag.HELD_OUT)
        | with_flags(3000, 13, RowFlag.SPECIAL)
    )
    rows[5] *= 1000
    source = MemorySource(rows, flags)
    taken = np.concatenate([batch.rows for batch in shuffled_batches(source, HOOK, CONFIG)(0)])
    assert len(taken) == CONFIG.tokens
    allowed = set(np.flatnonzero(flags == 0)) - {5}
    assert set(taken.tolist()) == allowed


def test_the_stream_goes_on_where_it_is_asked_to(source: MemorySource) -> None:
    stream = shuffled_batches(source, HOOK, CONFIG)
    whole = [batch.rows.tolist() for batch in stream(0)]
    assert [batch.rows.tolist() for batch in stream(17)] == whole[17:]


def test_a_non_finite_row_stops_the_run_and_is_located(tmp_path: Path) -> None:
    rows = synthetic(3000).rows
    rows[1234, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"{HOOK}.*1,?234"):
        train(MemorySource(rows), HOOK, replace(CONFIG, max_norm_ratio=0.0), tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_trained_is_refused_before_anything_is_written(source: MemorySource, tmp_path: Path) -> None:
    out = tmp_path / "one"
    with pytest.raises(UnknownNameError, match=HOOK):
        train(source, "blocks.1.hook_resid_pots", CONFIG, out)
    with pytest.raises(UnknownNameError, match="topk"):
        train(source, HOOK, replace(CONFIG, arch="nothing"), out)
    with pytest.raises(InvalidInputError, match="feature dimension"):
        train(MemorySource(torch.zeros(200, 2, 3, 4)), HOOK, CONFIG, out)
    with pytest.raises(UnknownNameError, match="provenance"):
        train(source, HOOK, CONFIG, out, provenance={"modelname": "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_trained_on_and_measured(tmp_path: Path) -> None:
    text = TextSource([write_text(tmp_path / "text.jsonl", n_documents=60)])
    capture(FakeModel(), text, [HOOK], tmp_path / "a.zarr", context_size=64, dtype="bfloat16")
    store = ActivationStore.open(tmp_path / "a.zarr")
    config = replace(CONFIG, d_sae=24, tokens=10 * 128)
    report = train(store, HOOK, config, tmp_path / "one")
    metadata = report.sae.cfg.metadata
    assert (metadata.model_name, metadata.context_size, metadata.prepend_bos) == ("fake", 64, True)
    assert (metadata.weight_hash, metadata.store_fingerprint) == ("weights of fake", store.fingerprint)
    quality = reconstruction_metrics(report.sae, store)
    held_out = (store.rows(0, store.n_rows).flags & (RowFlag.HELD_OUT | RowFlag.BOS)) == RowFlag.HELD_OUT
    assert quality.n_rows == held_out.sum() > 0
    assert quality.fvu_interval is not None
    with pytest.raises(InvalidInputError, match="fewer than a batch"):
        train(store, HOOK, replace(config, batch_size=100_000, tokens=100_000), tmp_path / "two")
    with pytest.raises(UnknownNameError, match=HOOK):
        train(store, "blocks.1.hook_resid_pots", config, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_heads_of_hook_z_are_flattened(tmp_path: Path) -> None:
    hook = "blocks.0.attn.hook_z"
    source = MemorySource(synthetic(1000).rows.view(-1, 4, 8), hook=hook)
    report = train(source, hook, CONFIG, tmp_path / "z")
    assert report.sae.d_in == 32
    assert formats.load(tmp_path / "z")(source.values[:3]).shape == (3, 4, 8)


@pytest.fixture(autouse=True)
def _signal_handler_is_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_here_reads_or_writes_pickles() -> None:
    root = Path(__file__).parent.parent / "scope"
    for folder in ("saes", "training", "kernels"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text()
            if path.name == "dictionary_learning.py":  # that library's files are pickles: tensors alone are taken
                assert text.count("torch.load(") == text.count("weights_only=True)") == 1
                text = text.replace("torch.load(", "").replace("import pickle", "", 1)
            assert not any(word in text for word in ("torch.load", "torch.save", "import pickle", "pickle.load")), path
