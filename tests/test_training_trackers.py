"""TensorBoard and wandb beside the run log: only when asked for, without a network, and no run is lost to one."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_training import HOOK, MemorySource, one_thread, synthetic  # noqa: F401  # a fixture
from test_cli import scope

from scope.errors import InterruptedRunError, InvalidInputError, MissingDependencyError, UnknownNameError
from scope.training import TrainConfig, trackers, train
from scope.training.trackers import Trackers, require_trackers

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(d_sae=48, k=4, tokens=10 * 128, batch_size=128, checkpoint_steps=2, log_steps=1)
LOGGED = {
    *("loss", "l0", "fvu", "dead_share", "over_dense_share", "grad_norm", "tokens_per_s", "data_wait_share"),
    *("tokens", "dead", "learning_rate"),
}


@pytest.fixture(scope="module")
def source() -> MemorySource:
    return MemorySource(synthetic(2000).rows)


def test_the_run_log_has_what_a_reader_looks_for(source: MemorySource) -> None:
    log = train(source, HOOK, CONFIG).log
    assert len(log) == 10
    assert set(log[0]) >= LOGGED
    assert all(0 <= line[name] <= 1 for line in log for name in ("over_dense_share", "dead_share", "data_wait_share"))
    assert log[-1]["over_dense_share"] > 0  # 48 features, 4 a row: one in ten of the rows is nothing


def test_a_missing_package_or_name_is_answered_before_anything_is_read(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="tensorboard"):
        require_trackers(["tensorbord"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"scope-workbench\[trackers\]"):
        train(source, HOOK, CONFIG, tmp_path / "one", trackers=["tensorboard"])
    answer = scope(
        *("train", tmp_path / "none.zarr", "--hook", HOOK, "--d-sae", 8, "--k", 2, "--out", tmp_path / "one"),
        *("--tracker", "wandb", "--json"),
        code=1,
    )
    assert answer["error"]["type"] == "MissingDependencyError"
    assert list(tmp_path.iterdir()) == []


def test_neither_is_imported_unless_asked_for() -> None:
    code = "import sys, scope.training.run; from scope.training.trackers import *; require_trackers(['wandb'])"
    code += "; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "scope.training.single" in loaded
    assert not {"wandb", "tensorboard", "torch.utils.tensorboard"} & set(loaded)


def test_tensorboard_gets_every_line_and_goes_on_after_a_stop(source: MemorySource, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(CONFIG, tokens=8 * 128)

    def stop(done: int, total: int | None) -> None:
        if done == 5 * 128:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        train(source, HOOK, config, tmp_path / "one", progress=stop, trackers=["tensorboard"])
    report = train(source, HOOK, config, tmp_path / "one", trackers=["tensorboard"])
    assert report.resumed_at == 4
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "one"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= LOGGED
    for name in ("fvu", "loss"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in report.log]


def test_wandb_writes_to_disk_alone_when_it_is_offline(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train(source, HOOK, replace(CONFIG, tokens=3 * 128), tmp_path / "one", trackers=["wandb"])
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for name in ("fvu", "over_dense_share", "data_wait_share", "d_sae"):
        assert name.encode() in content


def test_one_that_cannot_be_started_stops_the_run_before_its_first_step(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(trackers, "_Wandb", refuse)
    with pytest.raises(InvalidInputError, match="WANDB_MODE=offline"):
        train(
            source,
            HOOK,
            CONFIG,
            tmp_path / "one",
            trackers=["wandb"],
            progress=lambda done, total: pytest.fail("stepped"),
        )
    assert os.listdir(tmp_path) == []


def test_one_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, Mapping[str, float]]] = []

    class Fails:
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            raise OSError("disk full")

        def close(self) -> None:
            raise AssertionError("it was left out")

    class Keeps:
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            seen.append((step, figures))

        def close(self) -> None:
            seen.append((-1, {}))

    both = Trackers({"a": Fails(), "b": Keeps()})
    for step in (1, 2):
        both.log({"step": step, "loss": 0.5, "fvu": float("nan"), "note": "text"})
    both.close()
    assert seen == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), (-1, {})]
    assert caplog.text.count("disk full") == 1
