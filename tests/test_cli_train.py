"""`scope train` on a tiny model: sweeps, several hooks, options that an architecture does not have."""

import json
from pathlib import Path
from typing import Any

import helpers_models
import pytest
from helpers_training import one_thread  # noqa: F401  # a fixture
from test_cli import scope

from scope.saes.formats import load

pytestmark = pytest.mark.usefixtures("one_thread")
RESID, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"
COMMON = ("--tokens", 2560, "--batch-size", 256, "--evaluate-tokens", 60, "--json")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    with open(folder / "text.jsonl", "w") as file:
        for number in range(30):
            text = "the quick brown fox jumps over the lazy dog. " * (2 + number % 4)
            file.write(json.dumps({"text": text, "title": f"page-{number}"}) + "\n")
    hooks = [argument for hook in (RESID, MLP_IN, MLP_OUT) for argument in ("--hook", hook)]
    scope(
        *("capture", "--model", helpers_models.tiny_folder("gemma3"), "--data", folder / "text.jsonl", *hooks),
        *("--out", folder / "a.zarr", "--context-size", 32, "--rows-per-group", 512, "--json"),
    )
    return folder / "a.zarr"


def trained(store: Path, *arguments: Any, code: int = 0) -> Any:
    return scope("train", store, *arguments, *COMMON, code=code)


def test_commas_and_several_hooks_make_a_sweep(store: Path, tmp_path: Path) -> None:
    sweep = ("--hook", RESID, "--hook", MLP_OUT, "--k", "2,4", "--d-sae", 32, "--lr", "1e-3", "--out", tmp_path / "all")
    runs = trained(store, *sweep)["runs"]
    names = [f"{hook}_k-{k}" for hook in (RESID, MLP_OUT) for k in (2, 4)]
    assert [Path(run["sae"]).name for run in runs] == names
    for run in runs:
        assert {"fvu", "delta_ce", "train_l0"} <= run.keys()
        assert load(run["sae"]).fingerprint[:12] == run["id"]
    assert [run["id"] for run in trained(store, *sweep)["runs"]] == [run["id"] for run in runs]
    one = trained(store, "--hook", RESID, "--k", 4, "--d-sae", 32, "--lr", "1e-3", "--out", tmp_path / "one")
    assert one["hook"] == RESID


@pytest.mark.parametrize(
    ("architecture", "hooks", "measured"),
    [
        ("transcoder", ("--hook", MLP_IN, "--hook-out", MLP_OUT), True),
        ("skip_transcoder", ("--hook", MLP_IN, "--hook-out", MLP_OUT), True),
        ("crosscoder", ("--hook", MLP_IN, "--hook", RESID), False),
    ],
)
def test_dictionaries_of_several_hooks(
    store: Path, tmp_path: Path, architecture: str, hooks: tuple[str, ...], measured: bool
) -> None:
    sizes = ("--arch", architecture, "--activation", "jumprelu", "--d-sae", 32, "--k", 4, "--out", tmp_path / "one")
    result = trained(store, *hooks, *sizes)
    assert result["fvu"] > 0
    assert ("delta_ce" in result) == measured
    assert ("fvu_by_output" in result) == (architecture == "crosscoder")
    again = trained(store, *hooks, *sizes)
    assert again["id"] == result["id"]
    assert load(tmp_path / "one").cfg.to_dict()["activation"] == "jumprelu"


def test_a_crosscoder_over_two_stores(store: Path, tmp_path: Path) -> None:
    hooks = ("--beside", store, "--hook", f"a:{RESID}", "--hook", f"b:{MLP_IN}", "--arch", "crosscoder")
    result = trained(store, *hooks, "--d-sae", 32, "--k", 4, "--out", tmp_path / "one")
    assert set(result["fvu_by_output"]) == {f"a:{RESID}", f"b:{MLP_IN}"}
    assert trained(store, *hooks, "--d-sae", 32, "--k", 4, "--out", tmp_path / "one")["id"] == result["id"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hook", RESID, "--arch", "topp", "--k", 4), "topk"),
        (("--hook", RESID, "--k", "4,x"), "separated by commas"),
        (("--hook", RESID, "--k", "4,400"), "k is 400"),
        (("--hook", RESID, "--k", 4, "--bandwidth", 0.1), "topk does not have"),
        (("--hook", RESID, "--k", 4, "--arch", "matryoshka", "--prefixes", "16,8"), "ascending"),
        (("--hook", RESID, "--k", 4, "--arch", "transcoder"), "hook_out"),
        (("--hook", MLP_IN, "--hook-out", MLP_OUT, "--k", 4), "transcoder"),
        (("--hook", MLP_IN, "--hook", RESID, "--hook-out", MLP_OUT, "--k", 4, "--arch", "transcoder"), "one by one"),
        (("--hook", MLP_IN, "--hook", RESID, "--k", 4, "--arch", "crosscoder,topk"), "two sweeps"),
    ],
)
def test_wrong_use_is_answered_before_anything_is_written(
    store: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    answer = trained(store, *arguments, "--d-sae", 32, "--out", tmp_path / "none", code=2)
    assert message in answer["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_lists_in_a_file_and_help(store: Path, tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text('k = [2, 3]\nd-sae = 32\narch = "matryoshka"\nprefixes = [4, 8]\n')
    result = trained(store, "--config", tmp_path / "train.toml", "--hook", RESID, "--out", tmp_path / "all")
    assert [Path(run["sae"]).name for run in result["runs"]] == ["k-2", "k-3"]
    training = load(tmp_path / "all" / "k-2").cfg.metadata.training
    assert training is not None
    assert tuple(training["prefixes"]) == (4, 8)
    text = " ".join(scope("train", "--help").stdout.split())
    assert "--hook-out" in text
    assert "make a sweep" in text
