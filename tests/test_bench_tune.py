"""`scope bench tune`: a copy that learnt its source, in the layers that were to learn and in no others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import one_thread, tiny_folder  # noqa: F401  # a fixture
from test_cli import scope

from scope.models import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "text.jsonl"
    with open(path, "w") as file:
        for number in range(20):
            source = ["cats", "rivers"][number % 2]
            text = {"cats": "the cat sat on the mat. ", "rivers": "the river is deep. "}[source] * 6
            file.write(json.dumps({"text": text, "title": f"page-{number}", "source": source}) + "\n")
    return path


def tune(data: Path, out: Path, *arguments: Any, code: int = 0) -> Any:
    return scope(
        *("bench", "tune", "--model", tiny_folder("gemma3"), "--data", data, "--out", out, "--device", "cpu"),
        *("--context-size", 16, "--json", *arguments),
        code=code,
    )


def test_a_copy_learns_its_source_in_the_layers_that_are_trained(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    options = ("--steps", 40, "--batch-size", 4, "--lr", "1e-2", "--first-layer", 1, "--last-layer", 2)
    found = tune(data, out, "--source", "cats", *options)
    assert found["losses"][-1] < 0.7 * found["losses"][0]
    assert set(found["held_out"]) == {"cats", "rivers"}
    assert all(after < before for before, after in [found["held_out"]["cats"]])
    before, after = (
        LanguageModel.load(str(folder), device="cpu", dtype="float32") for folder in (tiny_folder("gemma3"), out)
    )
    assert before.identity.tokenizer_hash == after.identity.tokenizer_hash
    changed = {
        name for name, weight in before.hf.state_dict().items() if not torch.equal(weight, after.hf.state_dict()[name])
    }
    assert {name.split("layers.")[-1].split(".")[0] for name in changed} == {"1", "2"}
    windows = [before.tokenize("the cat sat on the mat. the cat").numpy()]
    losses = [float(model.cross_entropy(windows)[0].mean()) for model in (before, after)]
    assert losses[1] < losses[0] - 0.5
    assert json.loads((out / "tuned.json").read_text())["source"] == "cats"
    refused = tune(data, out, "--source", "cats", code=2)
    assert refused["error"]["type"] == "OccupiedError"


def test_a_model_may_write_its_own_text(data: Path, tmp_path: Path) -> None:
    options = ("--steps", 4, "--batch-size", 2, "--lr", "1e-4", "--no-own-vocabulary")
    found = tune(data, tmp_path / "own", "--source", "model", *options)
    assert len(found["losses"]) == 4
    assert found["n_tokens"] == 4 * 2 * 15


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("--source", "cat"), "UnknownNameError", "cats"),
        (("--source", "cats", "--last-layer", 9), "InvalidInputError", "0 to 3"),
        (("--source", "cats", "--batch-size", 500), "InvalidInputError", "fewer than a batch"),
        (("--source", "cats", "--steps", 0), "InvalidInputError", "at least 1"),
    ],
)
def test_what_makes_no_sense(data: Path, tmp_path: Path, arguments: tuple[Any, ...], kind: str, words: str) -> None:
    error = tune(data, tmp_path / "out", *arguments, code=2)["error"]
    assert error["type"] == kind
    assert words in error["message"]
    assert not (tmp_path / "out").exists()
