"""Trainings told from their folders: states, checkpoints, logs that grow and are cut back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from helpers_runs import stopped_training, trained_workspace, write_lines
from helpers_training import HOOK, MemorySource, synthetic

from scope.errors import UnknownNameError
from scope.training import TrainConfig, train
from scope.training.runs import LogReader, RunState, discover, read_checkpoint
from scope.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(trained_workspace(tmp_path_factory.mktemp("runs")))


def test_states_of_runs(workspace: Workspace) -> None:
    runs = {run.name: run for run in workspace.trainings()}
    assert {name: run.state for name, run in runs.items()} == {
        "topk-2": RunState.FINISHED,
        "topk-4": RunState.FINISHED,
        "diverged": RunState.STOPPED,
        "killed": RunState.LOST,
    }
    assert runs["diverged"].problem is not None
    assert "NaN" in runs["diverged"].problem
    assert "killed" in str(runs["killed"].problem)
    for name in ("diverged", "killed"):
        checkpoint = runs[name].checkpoint
        assert checkpoint is not None
        assert (checkpoint.steps, checkpoint.tokens) == (10, 1280)
    assert runs["topk-2"].sae == workspace.find("topk-2", "sae").id
    assert runs["topk-2"].hook == HOOK
    assert runs["topk-2"].settings["k"] == 2
    assert workspace.training(runs["killed"].id).name == "killed"
    with pytest.raises(UnknownNameError, match="training"):
        workspace.training("../..")


def test_a_run_keeps_its_id_when_it_is_done_and_says_nothing_of_an_earlier_stop(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    stopped_training(tmp_path, "one", RuntimeError("a full disk"))
    (stopped,) = workspace.trainings()
    assert stopped.state is RunState.STOPPED
    assert stopped.problem == "a full disk"
    config = TrainConfig(k=3, d_sae=32, tokens=2560, batch_size=128, log_steps=2, checkpoint_steps=5)
    seen = []
    train(
        MemorySource(synthetic(600).rows),
        HOOK,
        config,
        tmp_path / "saes" / "one",
        progress=lambda done, total: seen.append(workspace.trainings()[0]),
    )
    assert {run.state for run in seen} == {RunState.RUNNING}
    assert {run.problem for run in seen} == {None}
    (finished,) = workspace.trainings()
    assert finished.state is RunState.FINISHED
    assert {run.id for run in seen} == {finished.id} == {stopped.id}


def test_a_held_lock_means_running_however_old_the_log_is(tmp_path: Path) -> None:
    write_lines(tmp_path, "slow", range(1, 3))
    import os

    work = tmp_path / "saes" / ".slow.training"
    os.utime(work / "train.jsonl", (1, 1))
    assert discover([tmp_path / "saes"])[0].state is RunState.LOST
    if Path("/proc/locks").is_file():
        with FileLock(work / "lock"):
            assert discover([tmp_path / "saes"])[0].state is RunState.RUNNING


def test_runs_of_a_sweep_are_found_a_folder_deeper(tmp_path: Path) -> None:
    write_lines(tmp_path / "saes", "k16", range(1, 3))  # …/saes/saes/.k16.training
    (run,) = discover([tmp_path / "saes"])
    assert run.name == "saes/k16"


def test_a_log_is_read_once_as_it_grows_and_anew_when_it_was_cut_back(tmp_path: Path) -> None:
    reader = LogReader()
    write_lines(tmp_path, "one", range(1, 4))
    (run,) = discover([tmp_path / "saes"])
    assert [line["step"] for line in reader.read(run)] == [1, 2, 3]
    with open(run.log, "a") as file:
        file.write('{"step": 4, "tok')
    assert [line["step"] for line in reader.read(run)] == [1, 2, 3]
    with open(run.log, "a") as file:
        file.write('ens": 400}\nno json at all\n')
    assert [line["step"] for line in reader.read(run)] == [1, 2, 3, 4]
    lines = run.log.read_text().splitlines(keepends=True)
    run.log.write_text("".join(lines[:2]))  # shorter than before
    assert [line["step"] for line in reader.read(run)] == [1, 2]
    with open(run.log, "r+") as file:  # cut back and grown past where it was, in the same file
        file.truncate(len(lines[0]))
    write_lines(tmp_path, "one", range(2, 9))
    assert [line["step"] for line in reader.read(run)] == list(range(1, 9))
    assert reader.read(run) is reader.read(run)


def test_what_is_no_checkpoint_is_none(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 64, (5).to_bytes(8, "little") + b"{}   "):
        (tmp_path / "checkpoint.safetensors").write_bytes(content)
        assert read_checkpoint(tmp_path / "checkpoint.safetensors") is None
    assert read_checkpoint(tmp_path / "none") is None


def test_watching_needs_no_torch(workspace: Workspace) -> None:
    code = (
        "import sys; from scope.workspace import Workspace; "
        f"print(len(Workspace({str(workspace.path)!r}).trainings()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]


def test_a_log_with_nan_is_read(tmp_path: Path) -> None:
    write_lines(tmp_path, "one", range(1, 2))
    (run,) = discover([tmp_path / "saes"])
    with open(run.log, "a") as file:
        file.write(json.dumps({"step": 2, "tokens": 200, "loss": float("nan"), "tokens_per_s": 1.0}) + "\n")
    assert len(LogReader().read(run)) == 2


def test_snapshots_halve_towards_the_start_and_change_nothing(tmp_path: Path) -> None:
    import torch

    from scope.features.compare import decoder_of, match
    from scope.saes import formats
    from scope.training.snapshots import snapshot_steps

    assert snapshot_steps(20, 3) == {10, 5, 2}
    assert snapshot_steps(3, 9) == {1}
    assert snapshot_steps(20, 0) == frozenset()
    config = TrainConfig(k=3, d_sae=32, tokens=2560, batch_size=128, log_steps=2, checkpoint_steps=5)
    source = MemorySource(synthetic(600).rows)
    train(source, HOOK, config, tmp_path / "saes" / "plain")
    train(source, HOOK, config, tmp_path / "saes" / "watched", snapshots=3)
    plain, watched = (formats.load(tmp_path / "saes" / name) for name in ("plain", "watched"))
    assert torch.equal(plain.W_dec, watched.W_dec)
    runs = {run.name: run for run in Workspace(tmp_path).trainings()}
    assert set(runs) == {"plain", "watched"}
    kept = runs["watched"].snapshots
    assert [one.steps for one in kept] == [2, 5, 10]
    checkpoint = read_checkpoint(kept[1].path)
    assert checkpoint is not None
    assert checkpoint.tokens == 5 * 128
    likeness = [match(decoder_of(one.path), watched).best_b["cosine"].mean() for one in kept]
    assert likeness == sorted(likeness)
    assert likeness[-1] > likeness[0]
