"""The pages of trainings and comparisons, and verifying on the workspace page, without a browser."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_dashboards as fakes
import numpy as np
import pytest
from helpers_runs import SETTINGS, trained_workspace, write_lines
from helpers_training import HOOK, MemorySource, synthetic

from dashboards.app import create_app
from dashboards.context import Context
from dashboards.trainings import MAX_SHOWN, Trainings, qualities
from dashboards.verifications import Verifier
from dashboards.worker import JobState
from scope.errors import UnknownNameError
from scope.figures import metric_curve, pareto_front, pareto_scatter
from scope.training import TrainConfig, train
from scope.training.evaluate import QUALITY_NAME
from scope.workspace import Workspace

LONG = 120.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_workspace(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def workspace(made: Path, tmp_path: Path) -> Workspace:
    """A copy that a test may change."""
    return Workspace(shutil.copytree(made, tmp_path / "workspace"))


@pytest.fixture
def local(workspace: Workspace) -> fakes.LocalClient:
    return fakes.LocalClient(create_app(workspace))


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LONG
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_training_page_shows_all_states(local: fakes.LocalClient) -> None:
    content = local.content("/training")
    for text in ("topk-2", "finished", "stopped", "lost", "A NaN in the activations", "step 10 (1,280 tokens)"):
        assert text in content
    assert "<b>'Alice'</b>" in content  # as text: it is a child of a component
    assert content.count('"type": "training-curve"') >= 6
    assert "How much is explained" in content


def test_training_page_of_one_run(local: fakes.LocalClient, workspace: Workspace) -> None:
    run = workspace.training("diverged")
    content = local.content(f"/training/{run.id}")
    assert "It did not reach its end" in content
    assert "Its last good checkpoint" in content
    assert "There is no training" in local.content("/training/nothing")


def test_a_training_grows_without_a_reload(local: fakes.LocalClient, workspace: Workspace) -> None:
    write_lines(workspace.path, "live", range(1, 4))
    ids = [{"type": "training-curve", "metric": metric} for metric in ("fvu", "loss")]

    def poll(seen: Any) -> Any:
        callback = next(one for one in local._callbacks if "training-seen.data" in one["output"])
        body = {
            "output": callback["output"],
            "outputs": [
                {"id": "training-runs", "property": "children"},
                [{"id": one, "property": "figure"} for one in ids],
                {"id": "training-seen", "property": "data"},
            ],
            "inputs": [
                {"id": "training-poll", "property": "n_intervals", "value": 1},
                {"id": "theme-now", "property": "data", "value": "light"},
            ],
            "state": [
                {"id": "training-about", "property": "data", "value": {"runs": "live", "one": "", "x": "tokens"}},
                {"id": "training-seen", "property": "data", "value": seen},
                [{"id": one, "property": "id", "value": one} for one in ids],
            ],
            "changedPropIds": ["training-poll.n_intervals"],
        }
        answer = local._ask("POST", "/_dash-update-component", json.dumps(body))
        return json.loads(answer)["response"] if answer else None

    first = poll(None)
    seen = first["training-seen"]["data"]
    assert poll(seen) is None  # nothing new: nothing is sent
    write_lines(workspace.path, "live", range(4, 7))
    grown = poll(seen)
    assert '"600"' in json.dumps(grown["training-runs"]["children"])
    figures = [value["figure"] for key, value in grown.items() if "training-curve" in key]
    assert len(figures) == 2


def test_runs_are_chosen_by_the_address(workspace: Workspace) -> None:
    for number in range(MAX_SHOWN + 2):
        write_lines(workspace.path, f"live-{number}", range(1, 3))
    trainings = Trainings(Context(workspace))
    runs = trainings.runs()
    assert len(trainings.chosen(runs, "")) == MAX_SHOWN
    assert [run.name for run in trainings.chosen(runs, "topk-4,live-0,topk-4")] == ["topk-4", "live-0"]
    with pytest.raises(UnknownNameError):
        trainings.chosen(runs, "../..")
    frame = trainings.frame(workspace.training("topk-2"))
    assert (frame["seconds"].diff().dropna() >= 0).all()
    assert frame["tokens"].iloc[-1] == 2560


def test_held_out_figures_count_where_they_were_saved(workspace: Workspace) -> None:
    (workspace.path / "saes" / "topk-4" / QUALITY_NAME).write_text('{"fvu": 0.25, "l0": 4.0, "delta_ce": 0.1}')
    frame = qualities(workspace).set_index("name")
    assert bool(frame.loc["topk-4", "held_out"])
    assert frame.loc["topk-4", "fvu"] == 0.25
    assert not frame.loc["topk-2", "held_out"]
    assert frame["front"].all()  # each is the only one measured on its kind of rows
    assert len(pareto_scatter(frame.reset_index()).data) == 3


def test_pareto_front_is_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    l0, fvu = rng.integers(1, 9, 40).tolist(), rng.integers(1, 9, 40).tolist()
    on_front = pareto_front(l0, fvu)
    for i in range(40):
        beaten = any(l0[j] <= l0[i] and fvu[j] <= fvu[i] and (l0[j], fvu[j]) != (l0[i], fvu[i]) for j in range(40))
        assert on_front[i] is not beaten


def test_long_curves_are_thinned_and_keep_their_ends(workspace: Workspace) -> None:
    import pandas as pd

    frame = pd.DataFrame({"tokens": np.arange(10_000), "fvu": np.linspace(1, 0.1, 10_000)})
    (line,) = metric_curve({"<i>": frame}, "fvu").data
    assert len(line.x) <= 600
    assert (line.x[0], line.x[-1]) == (0, 9_999)
    assert line.name == "&lt;i&gt;"
    assert len(metric_curve({"one": frame}, "missing").data) == 0


def compared(local: fakes.LocalClient, search: str) -> str:
    """The page once its job is done."""
    return until(lambda: (content := local.content("/compare", search)) and "skeleton" not in content and content)


def test_compare_page_matches_two_saes_and_a_checkpoint(local: fakes.LocalClient, workspace: Workspace) -> None:
    ids = {name: workspace.find(name, "sae").id for name in ("topk-2", "topk-4")}
    content = local.content("/compare")
    assert "diverged, step 10" in content
    content = compared(local, f"?a={ids['topk-2']}&b={ids['topk-4']}")
    for text in ("matched", "only in A", "Only in B", "compare-histogram", "mean nearest cosine"):
        assert text in content
    run = workspace.training("diverged")
    content = compared(local, f"?a={run.id}&b=topk-4&show=only-b")
    assert re.search(r"nearest of A|None\.", content)
    assert "There is no SAE" in local.content("/compare", "?a=/etc/passwd&b=topk-4")


def test_between_steps_of_one_training_features_are_born_and_go(tmp_path: Path) -> None:
    source, config = MemorySource(synthetic(600).rows), TrainConfig(k=2, **SETTINGS)
    train(source, HOOK, config, tmp_path / "saes" / "kept", snapshots=3)
    train(source, HOOK, TrainConfig(k=3, **SETTINGS), tmp_path / "saes" / "other")
    workspace = Workspace(tmp_path)
    local, run = fakes.LocalClient(create_app(workspace)), workspace.training("kept")
    steps = [one.steps for one in run.snapshots]
    content = local.content(f"/training/{run.id}")
    assert f"step {steps[0]} → step {steps[1]}" in content
    assert f"step {steps[0]} → the end" in content
    content = compared(local, f"?a={run.id}-{steps[0]}&b={run.sae}")
    for words in ("Born by B", "Gone since A", "Kept"):
        assert words in content
    content = compared(local, f"?a={run.sae}&b=other")
    assert "Born" not in content
    assert "Only in B" in content


def test_compare_page_without_two_dictionaries_says_what_to_do(tmp_path: Path) -> None:
    content = fakes.LocalClient(create_app(Workspace(tmp_path))).content("/compare")
    assert "scope train" in content


def test_verifying_finds_a_changed_weight(workspace: Workspace) -> None:
    verifier = Verifier(Context(workspace))
    good, bad = (workspace.find(name, "sae") for name in ("topk-2", "topk-4"))
    weights = bad.path / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    job = verifier.start(good.id)
    assert verifier.start("topk-2") is job or not job.pending
    until(lambda: not job.pending)
    assert job.state is JobState.DONE
    assert job.result.n_faults == 0
    broken = verifier.start(bad.id)
    until(lambda: not broken.pending)
    assert broken.state is JobState.FAILED
    assert verifier.job(bad.id) is broken
    with pytest.raises(UnknownNameError):
        verifier.start("../../etc")


def test_workspace_page_lists_trainings_and_buttons_that_verify(local: fakes.LocalClient, workspace: Workspace) -> None:
    (workspace.path / "graphs").mkdir()
    (workspace.path / "graphs" / "a-circuit.json").write_text("{}")
    content = local.content("/")
    made = f"topk-2 ({workspace.find('topk-2', 'sae').id})"
    kept = "a checkpoint of step 10"
    for text in ("Trainings", "Models", "a-circuit.json", "Verify topk-2", "diverged", "What it made", made, kept):
        assert text in content
