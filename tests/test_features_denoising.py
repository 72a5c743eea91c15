"""Features over the steps of denoising: counts of the index against the store's columns, and a planted feature."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_denoising import captured
from helpers_models import one_thread as one_thread
from helpers_models import tiny_folder, tiny_model
from helpers_saes import make
from test_cli_stores import scope

from activations.denoising import STATES
from activations.denoising_capture import capture_denoising
from activations.documents import Document, is_held_out
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.build import build_index
from scope.features.denoising import commit_table, features_by_step, generation_cells, rate_by_step
from scope.features.index import FeatureIndex
from scope.saes.base import SAEMetadata
from scope.saes.formats import save

HOOK = "blocks.1.hook_resid_post"
D_SAE = 40


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, Any, FeatureIndex]:
    folder = tmp_path_factory.mktemp("denoised")
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("The cat", "In 1905", "She")))
    model = tiny_model("diffusion_gemma")
    store = capture_denoising(model, TextSource(folder / "p.jsonl"), [HOOK], folder / "s.zarr", dtype="float32").store
    sae = make("topk", d_in=32, d_sae=D_SAE, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    return store, sae, build_index(store, sae, folder / "i.index", model=model, batch_size=64, segment_firings=200)


def test_rates_by_step_and_state_are_those_of_the_rows(case: Any) -> None:
    store, sae, index = case
    fires = sae.encode(torch.from_numpy(store.read(HOOK, 0, store.n_rows))).detach().numpy() > 0
    indexed = store.flags(0, store.n_rows) & (RowFlag.BOS | RowFlag.SPECIAL) == 0
    step, state = store.column("step", 0, store.n_rows), store.column("state", 0, store.n_rows)
    assert index.states == STATES[1:]
    for feature in range(0, D_SAE, 7):
        by_step, by_state = rate_by_step(index, feature), index.by_state(feature).set_index("state")
        assert by_step["step"].tolist() == list(range(5))
        for row in by_step.itertuples():
            own = indexed & (step == row.step)
            assert (row.n_rows, row.n_firings) == (own.sum(), fires[own, feature].sum())
            assert row.rate_low <= row.rate <= row.rate_high
        for name, row in by_state.iterrows():
            own = indexed & (state == STATES.index(str(name)))
            assert (row["n_rows"], row["n_firings"]) == (own.sum(), fires[own, feature].sum())
    masked = index.contrast("state:masked", "state:committed", n=5).table
    for row in masked.itertuples():
        own = indexed & (state == STATES.index("masked"))
        assert row.rate_a == pytest.approx(fires[own, row.feature].mean())
    found = features_by_step(index, n=D_SAE, least_firings=1).set_index("feature")
    for feature, row in found.iterrows():
        assert row["mean_step"] == pytest.approx(step[indexed & fires[:, feature]].mean())
    assert index.info()["states"] == dict(index.manifest["states"])
    assert "By state" in index.feature(int(index.table["n_firings"].idxmax()))._repr_html_()


def test_commits_are_counted_once_for_each_token(case: Any) -> None:
    store, _, index = case
    for source in (store, index):
        table = commit_table(source).set_index("step")
        assert table["n_tokens"].sum() == 3 * 16
        assert table["so_far"].iloc[-1] == pytest.approx(1)
        columns = {name: store.column(name, 0, store.n_rows) for name in ("sequence", "step", "commit_step", "state")}
        for number in range(5):
            # at the step itself the token is being committed, or was before and is kept from here on
            here = (columns["step"] == number) & (columns["commit_step"] == number)
            assert table["n_tokens"][number] == here.sum()


def test_commits_beyond_the_rows_of_a_store_are_counted(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "The cat"}))
    model, prompts = tiny_model("diffusion_gemma"), TextSource(tmp_path / "p.jsonl")
    whole = capture_denoising(model, prompts, [HOOK], tmp_path / "whole.zarr").store
    store = capture_denoising(model, prompts, [HOOK], tmp_path / "s.zarr", max_rows=8).store
    assert store.column("step", 0, 8).max() == 0
    commits = whole.column("commit_step", 0, 8)
    assert commits.max() > 0
    table = commit_table(store).set_index("step")
    assert table["n_tokens"].to_dict() == {step: (commits == step).sum() for step in [*range(commits.max() + 1), -1]}
    assert table["so_far"].iloc[-1] == pytest.approx(1)


def test_a_generation_cell_by_cell(case: Any) -> None:
    store, sae, index = case
    feature = int(index.table["n_firings"].idxmax())
    cells = generation_cells(index, 1, feature)
    assert len(cells) == 2 * 5 * 8
    rows = cells["row"].to_numpy()
    strength = sae.encode(torch.from_numpy(store.read(HOOK, 0, store.n_rows))).detach().numpy()[rows, feature]
    assert np.array_equal(cells["value"] > 0, strength > 0)
    texts = tiny_model("diffusion_gemma").vocabulary_strings(cells["final_id"].tolist())
    assert len(cells["final"]) == len(texts)
    assert cells["final_id"].tolist() == store.column("final_id", int(rows[0]), int(rows[-1]) + 1).tolist()
    assert (generation_cells(index, 1)["value"] == 0).all()
    with pytest.raises(OutOfRangeError):
        generation_cells(index, 9)


def test_a_direction_on_noise_alone_gives_a_feature_that_fades_with_the_steps(tmp_path: Path) -> None:
    store = captured(tmp_path)
    sae = make("standard", d_in=12, d_sae=12, seed=0, metadata=SAEMetadata(hook_name=HOOK))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(12))
        sae.W_dec.copy_(torch.eye(12))
        sae.b_enc.fill_(-0.05)
        sae.b_dec.zero_()
    index = build_index(store, sae, tmp_path / "i.index")
    assert rate_by_step(index, 5)["rate"].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert index.by_state(5).set_index("state")["rate"].to_dict() == {"masked": 1, "committing": 1, "committed": 0}
    first = features_by_step(index, n=1)
    assert first["feature"].iloc[0] == 5
    assert first["z"].iloc[0] < -4
    assert commit_table(index).set_index("step")["share"].to_dict() == {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25, -1: 0}


def test_the_command_line_goes_from_prompts_to_the_report(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "The cat", "suffix": " the moon", "gap": 2}))
    options = ("denoise", "--model", tiny_folder("diffusion_gemma"), "--data", tmp_path / "p.jsonl", "--hook", HOOK)
    options += ("--max-steps", 3, "--max-new-tokens", 8, "--out", tmp_path / "s.zarr", "--device", "cpu")
    made = scope(*options, "--seed", 4)
    assert made["rows"] == made["new_rows"] == 24
    assert scope(*options, "--seed", 4)["new_rows"] == 0
    assert "seed is 5, the store has 4" in scope(*options, "--seed", 5, code=2)
    save(make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK)), tmp_path / "sae")
    scope("index", tmp_path / "s.zarr", tmp_path / "sae", "--out", tmp_path / "i.index")
    of_store, of_index = scope("denoising", tmp_path / "s.zarr"), scope("denoising", tmp_path / "i.index", "--top", 2)
    assert of_store["commits"] == of_index["commits"]
    assert set(of_index["features"][0]) == {"feature", "when", "z", "mean_step", "n_firings", "top_token"}
    page = tmp_path / "f.html"
    one = scope("denoising", tmp_path / "i.index", "--feature", 3, "--figure", page)
    assert [row["step"] for row in one["steps"]] == [0, 1, 2]
    assert {row["state"] for row in one["states"]} <= set(STATES)
    assert "at each step" in page.read_text()
    assert "has no features" in scope("denoising", tmp_path / "s.zarr", "--feature", 3, code=2)


def test_an_sae_trains_on_steps_and_is_measured_without_a_cross_entropy(tmp_path: Path) -> None:
    held_out = next(f"title {n}" for n in range(99) if is_held_out(Document("a", f"title {n}")))
    prompts = [{"text": "The cat", "title": held_out}, {"text": "In 1905", "title": "x"}, {"text": "She", "title": "y"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    model = tiny_model("diffusion_gemma")
    capture_denoising(model, TextSource(tmp_path / "p.jsonl"), [HOOK], tmp_path / "s.zarr", dtype="float32")
    options = ("--d-sae", 48, "--k", 4, "--tokens", 2000, "--batch-size", 64, "--no-baselines", "--device", "cpu")
    made = scope("train", tmp_path / "s.zarr", "--hook", HOOK, "--out", tmp_path / "sae", *options)
    assert made["fvu_all"] < 1
    assert "delta_ce" not in made
    measured = scope("evaluate", tmp_path / "s.zarr", tmp_path / "sae", "--no-baselines")
    assert "delta_ce" not in measured
    assert scope("info", tmp_path / "s.zarr")["rows"] == 3 * 80


def test_what_was_not_denoised_is_refused(tmp_path: Path, case: Any) -> None:
    from activations.capture import capture

    (tmp_path / "a.txt").write_text("The cat sat on the mat.")
    model = tiny_model("gemma3")
    store = capture(model, TextSource(tmp_path / "a.txt"), [HOOK], tmp_path / "s.zarr", context_size=32).store
    index = build_index(store, case[1], tmp_path / "i.index", model=model, allow_mismatch=True)
    for ask in (lambda: rate_by_step(index, 0), lambda: index.by_state(0), lambda: generation_cells(index, 0)):
        with pytest.raises(InvalidInputError, match="scope denoise"):
            ask()
    for source in (store, index):
        with pytest.raises(InvalidInputError, match="scope denoise"):
            commit_table(source)
