"""`scope train` on a tiny model: sweeps, several hooks, options that an architecture does not have."""

import json
import os
import subprocess
import sys
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
        (("--hook", "blocks.*.nothing", "--k", 4), "stands for a layer"),
        (("--hook", MLP_IN, "--hook", RESID, "--k", 4, "--arch", "crosscoder,topk"), "two sweeps"),
        (
            ("--hook", RESID, "--k", 4, "--max-tokens", 100, "--text-column", "text"),
            "--max-tokens, --text-column belong",
        ),
        (("--hook", RESID, "--k", 4, "--parallel", "rows"), "data"),
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


def test_a_live_run_takes_part_of_a_text_in_a_random_order(store: Path, tmp_path: Path) -> None:
    """The rows, and so the SAE, are those of a store that is captured with the same options."""
    with open(tmp_path / "text.jsonl", "w") as file:
        for number in range(30):
            file.write(
                json.dumps({"body": f"page {number} tells of foxes, dogs and the rest. " * 5, "title": f"p{number}"})
                + "\n"
            )
    text = ("--model", helpers_models.tiny_folder("gemma3"), "--data", tmp_path / "text.jsonl", "--text-column", "body")
    options = (*text, "--max-tokens", 700, "--shuffle-seed", 3, "--context-size", 32)
    run = ("--hook", RESID, "--d-sae", 32, "--k", 4, "--tokens", 1024, "--batch-size", 128, "--evaluate-tokens", 0)
    scope("capture", *options, "--hook", RESID, "--out", tmp_path / "part.zarr", "--json")
    stored = scope("train", tmp_path / "part.zarr", *run, "--out", tmp_path / "stored", "--json")
    live = scope("train", *options, *run, "--out", tmp_path / "live", "--json")
    ends = [load(folder["sae"]).cfg.metadata.store_fingerprint for folder in (stored, live)]
    assert ends[0] == ends[1]
    assert live["tokens"] == stored["tokens"] == 1024
    answer = scope("train", *text[:4], *run, "--out", tmp_path / "none", "--json", code=2)
    assert "body" in answer["error"]["message"] or "text" in answer["error"]["message"]


def test_torchrun_starts_one_run_of_two_processes(store: Path, tmp_path: Path) -> None:
    """One of them speaks, and the SAE is what one process makes."""
    options = ["--hook", RESID, "--d-sae", "32", "--k", "4", "--tokens", "2560", "--batch-size", "256", "--json"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scope.cli", "train"]
    done = subprocess.run(
        [sys.executable, *command, str(store), *options, "--evaluate-tokens", "0", "--out", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = json.loads(done.stdout)
    assert (result["tokens"], Path(result["sae"])) == (2560, tmp_path / "two")
    assert result["fvu"] > 0
    one = scope("train", store, *options, "--evaluate-tokens", 0, "--out", tmp_path / "one")
    assert one["fvu"] == pytest.approx(result["fvu"], rel=1e-4)
    training = load(tmp_path / "two").cfg.metadata.training
    assert training is not None
    assert training["processes"] == 2
