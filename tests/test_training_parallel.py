"""Two processes that train one SAE, by rows and by features: one process's result, its stops and its errors."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_ranks import CASES, Trainers, config_of, hooks_of, source_of
from helpers_training import one_thread  # noqa: F401  # a fixture

from scope.errors import InvalidInputError
from scope.saes import formats
from scope.training import TrainReport, train
from scope.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
PARALLEL = ("data", "features")
TIMES = ("tokens_per_s", "data_wait_share")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    with Trainers(tmp_path_factory.mktemp("reports")) as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> dict[str, TrainReport]:
    """What one process makes of each case."""
    torch.set_num_threads(1)
    configs = {name: config_of(**settings) for name, settings in CASES.items()}
    return {name: train(source_of(), **hooks_of(config.arch), config=config) for name, config in configs.items()}


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_make_what_one_makes(
    trainers: Trainers, alone: dict[str, TrainReport], tmp_path: Path, parallel: str
) -> None:
    ended = trainers.run("cases", 2, folder=tmp_path, names=list(CASES), parallel=parallel)
    assert [end.status for end in ended] == [0, 0], ended
    for name, report in alone.items():
        assert report.log[-1]["fvu"] != pytest.approx(report.log[0]["fvu"], rel=0.005), name
        weights = formats.load(tmp_path / name).weights()
        for key, expected in report.sae.weights().items():
            off = (weights[key] - expected).abs().max() / expected.abs().max()
            assert off < 1e-5, (name, key)
        log = [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for line, expected in zip(log, report.log, strict=True):
            assert line.keys() == expected.keys()
            assert all(line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7) for key in line.keys() - {*TIMES})
    assert {key for report in alone.values() for key in report.log[-1] if key.endswith("_loss")} >= {
        *("auxk_loss", "sparsity_loss", "gate_loss", "nested_loss", "frequency_loss")
    }


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_run_goes_on_with_the_same_number_of_processes_or_another(
    trainers: Trainers, tmp_path: Path, parallel: str
) -> None:
    """The second process fails at step 9, after the checkpoint of step 8: the first learns why, and who goes on gets
    to the weights of an uninterrupted run."""
    settings = {"arch": "batchtopk", "parallel": parallel}
    whole = trainers.run("one", 2, out=tmp_path / "whole", settings=settings)[0].said
    for name, goes_on in (("two", 2), ("one", 1)):
        out = tmp_path / name
        ended = trainers.run("one", 2, out=out, settings=settings, dies_at=9, error="no such sector")
        assert [end.said["error"] for end in ended] == ["LostProcessError", "OSError"]
        assert "Process 1 said: no such sector" in ended[0].said["message"]
        said = trainers.run("one", goes_on, out=out, settings=settings)[0].said
        assert said["resumed_at"] == 8
        if goes_on == 2:
            assert said == {**whole, "resumed_at": 8}
        weights, expected = (formats.load(tmp_path / each).weights() for each in (name, "whole"))
        assert all(torch.allclose(weights[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


def test_a_process_that_is_killed_ends_the_others(trainers: Trainers, tmp_path: Path) -> None:
    ended = trainers.run("one", 2, out=tmp_path / "one", settings={}, dies_at=6)
    assert ended[1].status == signal.SIGKILL
    assert "left no word" in ended[0].said["message"]
    assert (tmp_path / ".one.training" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_nan_on_one_process_stops_all(trainers: Trainers, tmp_path: Path, parallel: str) -> None:
    """All name the row, none moves its weights, and the checkpoint of before stays."""
    settings = {"parallel": parallel, "arch": "jumprelu"}
    ended = trainers.run("one", 2, out=tmp_path / "one", settings=settings, dies_at=9, error="nan")
    assert [end.said["error"] for end in ended] == ["NonFiniteError"] * 2
    assert all("1 rows of a batch hold a NaN" in end.said["message"] for end in ended)
    assert "The last checkpoint stays in" in ended[0].said["message"]
    assert trainers.run("one", 2, out=tmp_path / "one", settings=settings)[0].said["resumed_at"] == 8


def test_an_occupied_folder_is_said_to_all(trainers: Trainers, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("something")
    ended = trainers.run("one", 2, out=tmp_path / "one", settings={})
    assert ended[0].said["error"] == "OccupiedError"
    assert "the first process" in ended[1].said["message"].lower()


def test_two_processes_make_a_sweep(trainers: Trainers, tmp_path: Path) -> None:
    values = {"k": [2, 4], "arch": ["topk", "jumprelu"]}
    first = trainers.run("sweep", 2, out=tmp_path, settings={"parallel": "features"}, values=values)[0].said
    again = trainers.run("sweep", 2, out=tmp_path, settings={"parallel": "data"}, values=values)[0].said
    assert [run["fingerprint"] for run in first] == [run["fingerprint"] for run in again]
    assert all(run["resumed_at"] == config_of().steps for run in again)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"resample_steps": 5}, 2, "--parallel data"),
        ({"d_sae": 1, "k": 1}, 2, "cannot divide d_sae"),
    ],
)
def test_what_cannot_be_divided_by_features_is_refused(settings: dict[str, int], processes: int, message: str) -> None:
    config = TrainConfig(**{"d_sae": 8, "k": 2, **settings})
    config.require_divisible(1, 1)
    with pytest.raises(InvalidInputError, match=message):
        config.require_divisible(processes, 1)
    with pytest.raises(InvalidInputError, match="each of 2 layers"):
        TrainConfig(d_sae=6, k=2).require_divisible(2, 2)
