"""Kill -9 at random moments: a run that is taken up again ends with the weights and the log of one never killed."""

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_ranks import Ended, Trainers

from scope.saes import formats

SETTINGS = {"d_sae": 32, "checkpoint_steps": 2, "log_steps": 1, "tokens": 24 * 64, "arch": "topk"}
KILLS = 30


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    with Trainers(tmp_path_factory.mktemp("reports")) as server:
        yield server


def killed_and_resumed(
    trainers: Trainers, kills: int, folder: Path, job: str, processes: int = 1, **arguments: Any
) -> tuple[list[Any], int]:
    """Kill a job at random moments, and give it again until so many were killed; every one that ends begins a new one.

    A moment is drawn from a run's whole length, or is one at which a file has just appeared or gone. One that was
    killed after it published what it made counts as killed, and the next begins a new one. Returns what the jobs that
    ended said, and how many were killed.
    """
    rng = random.Random(0)
    killed = 0
    said: list[Any] = []
    begun = time.monotonic()
    whole = trainers.run(job, processes, out=folder / "timed", **arguments)[0]
    lasts = time.monotonic() - begun
    assert whole.status == 0, whole
    while True:
        out = folder / str(len(said))
        ranks = trainers.start(job, processes, out=out, **arguments)
        if killed < kills:
            wait_for_a_moment(folder, out, rng, lasts)
            ranks.kill()
        ended: list[Ended] = ranks.wait()
        if ended[0].status == signal.SIGKILL:
            killed += 1
            if job == "one" and out.exists():
                assert formats.load(out).fingerprint == whole.said["fingerprint"]
                shutil.rmtree(out)
            continue
        assert ended[0].status == 0, ended
        said.append(ended[0].said)
        if killed >= kills:
            return said, killed
        lasts *= 0.9  # the kill came too late


def wait_for_a_moment(folder: Path, out: Path, rng: random.Random, lasts: float) -> None:
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, lasts))
        return
    deadline = time.monotonic() + lasts
    seen, changes = files_of(folder, out), rng.randint(1, 12)
    while changes and time.monotonic() < deadline:
        now = files_of(folder, out)
        changes -= now != seen
        seen = now
        time.sleep(0.0002)


def files_of(folder: Path, out: Path) -> set[tuple[str, int]]:
    """Names and inodes of what belongs to a run: a file that is replaced gets another."""
    found = set()
    for pattern in (f".{out.name}.*/*", f".{out.name}.*", f"{out.name}*"):
        paths = folder.glob(pattern)
        with contextlib.suppress(FileNotFoundError):  # a folder may go while it is listed
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    found.add((str(path), path.stat().st_ino))
    return found


def without_where(said: Any) -> Any:
    return {name: value for name, value in said.items() if name != "resumed_at"}


def test_kill_9_at_thirty_moments(trainers: Trainers, tmp_path: Path) -> None:
    whole = trainers.run("one", out=tmp_path / "whole", settings=SETTINGS)[0].said
    said, killed = killed_and_resumed(trainers, KILLS, tmp_path, "one", settings=SETTINGS)
    assert killed == KILLS
    assert [without_where(each) for each in said] == [without_where(whole)] * len(said)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"whole", "timed", *map(str, range(len(said)))}


def test_killed_at_a_step_it_goes_on_from_the_last_checkpoint(trainers: Trainers, tmp_path: Path) -> None:
    whole = trainers.run("one", out=tmp_path / "whole", settings=SETTINGS)[0].said
    for step in (0, 1, 2, 13, 23):
        arguments = {"out": tmp_path / str(step), "settings": SETTINGS}
        assert trainers.run("one", dies_at=step, **arguments)[0].status == signal.SIGKILL
        assert trainers.run("one", **arguments)[0].said == {**whole, "resumed_at": step // 2 * 2}


def test_kill_9_in_a_sweep(trainers: Trainers, tmp_path: Path) -> None:
    settings = {**SETTINGS, "arch": "jumprelu", "tokens": 12 * 64}
    values = {"k": [2, 4]}
    whole = trainers.run("sweep", out=tmp_path / "whole", settings=settings, values=values)[0].said
    said, _ = killed_and_resumed(trainers, 6, tmp_path, "sweep", settings=settings, values=values)
    for each in said:
        assert [without_where(run) for run in each] == [without_where(run) for run in whole]


@pytest.mark.parametrize("parallel", ["data", "features"])
def test_kill_9_of_two_processes(trainers: Trainers, tmp_path: Path, parallel: str) -> None:
    settings = {**SETTINGS, "parallel": parallel, "arch": "batchtopk", "tokens": 12 * 64}
    whole = trainers.run("one", 2, out=tmp_path / "whole", settings=settings)[0].said
    said, _ = killed_and_resumed(trainers, 4, tmp_path, "one", 2, settings=settings)
    for each in said:
        assert without_where(each) == without_where(whole)
