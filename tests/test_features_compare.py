"""Matching two dictionaries: against plain numpy, on permuted, split and unrelated features; firings against numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from scope.errors import InvalidInputError, MismatchError
from scope.features import compare
from scope.features.compare import firing_correlations, match


def directions(n: int, width: int = 48, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def test_best_partners_equal_plain_numpy_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = directions(53, seed=1) * 3, directions(31, seed=2) * 0.2
    monkeypatch.setattr(compare, "MEMORY_BYTES", 4 * 7**2)
    found = match(a, b)
    unit_a, unit_b = a.numpy() / np.linalg.norm(a, axis=1)[:, None], b.numpy() / np.linalg.norm(b, axis=1)[:, None]
    cosines = unit_a @ unit_b.T
    assert found.best_a["partner"].tolist() == cosines.argmax(axis=1).tolist()
    assert found.best_b["partner"].tolist() == cosines.argmax(axis=0).tolist()
    np.testing.assert_allclose(found.best_a["cosine"], cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(found.best_b["cosine"], cosines.max(axis=0), atol=1e-6)


def test_a_permuted_and_scaled_copy_matches_one_to_one() -> None:
    a = directions(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    found = match(a, a[order] * 7)
    matched = found.matched.sort_values("a")
    assert matched["a"].tolist() == list(range(64))
    assert order[matched["b"].to_numpy()].tolist() == list(range(64))
    assert matched["cosine"].min() > 0.999
    assert len(found.unique_a) == len(found.unique_b) == len(found.splits) == len(found.merges) == 0


def test_births_deaths_splits_and_merges_are_found() -> None:
    base = torch.eye(10)
    parent, left, right = base[0], base[0] + 0.5 * base[1], base[0] - 0.5 * base[1]
    early = torch.stack([parent, base[2], base[3], base[4] + 0.4 * base[5], base[4] - 0.4 * base[5]])
    late = torch.stack([left, right, base[2], base[6], base[4]])
    found = match(early, late)
    assert found.unique_a["feature"].tolist() == [2]  # base[3] died
    assert found.unique_b["feature"].tolist() == [3]  # base[6] was born
    assert [(row.feature, sorted(row.parts)) for row in found.splits.itertuples()] == [(0, [0, 1])]
    assert [(row.feature, sorted(row.parts)) for row in found.merges.itertuples()] == [(4, [3, 4])]
    swapped = match(late, early)
    assert swapped.merges["feature"].tolist() == found.splits["feature"].tolist()
    assert swapped.unique_a["feature"].tolist() == found.unique_b["feature"].tolist()


def test_dead_rows_match_nothing() -> None:
    a = directions(4)
    a[2] = 0
    found = match(a, directions(4))
    assert 2 in found.unique_a["feature"].tolist()
    assert np.isfinite(found.best_a["cosine"]).all()


def test_wrong_input_is_named() -> None:
    with pytest.raises(MismatchError, match="48 values and that of the other 12"):
        match(directions(3), directions(3, width=12))
    with pytest.raises(InvalidInputError, match="above 0 and at most 1"):
        match(directions(3), directions(3), threshold=0)


def test_what_progress_raises_stops_the_work() -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("called off")

    with pytest.raises(RuntimeError, match="called off"):
        match(directions(3), directions(3), progress=stop)


class Fired:
    """As much of an index as correlations ask for."""

    name = "fired"

    def __init__(self, values: np.ndarray, n_special: int = 10) -> None:
        self.values, self.n_rows, self.d_sae = values, len(values) + n_special, values.shape[1]
        self.n_indexed_rows = len(values)
        self.sequences = pd.DataFrame({"start_row": [0], "n_rows": [self.n_rows]})
        self.documents = pd.DataFrame({"title": ["t"], "n_tokens": [self.n_rows]})

    def firings(self, feature: int) -> pd.DataFrame:
        rows = np.flatnonzero(self.values[:, feature])
        rows = rows[np.argsort(-self.values[rows, feature])]
        return pd.DataFrame({"row": rows, "value": self.values[rows, feature].astype(np.float32)})


def test_firing_correlations_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    x = rng.gamma(2.0, 1.0, (400, 6)) * (rng.random((400, 6)) < 0.1)
    y = np.where(rng.random((400, 6)) < 0.7, x, 0) + rng.gamma(2.0, 0.5, (400, 6)) * (rng.random((400, 6)) < 0.05)
    y[:, 5] = 0
    found: Any = firing_correlations((Fired(x), Fired(y)), [(i, i) for i in range(6)])  # type: ignore[arg-type]
    for i in range(5):
        assert found[i, i] == pytest.approx(np.corrcoef(x[:, i], y[:, i])[0, 1], abs=1e-6)
    assert np.isnan(found[5, 5])
    a = directions(6)
    matched = match(a, a, indexes=(Fired(x), Fired(y))).matched.sort_values("a")  # type: ignore[arg-type]
    assert matched["correlation"].iloc[0] == pytest.approx(found[0, 0])
    assert match(a, a, indexes=(Fired(x), Fired(y))).to_dict()["mean_correlation"] > 0.5  # type: ignore[arg-type]


def test_indexes_of_other_rows_are_refused() -> None:
    a, values = directions(6), np.ones((30, 6))
    with pytest.raises(MismatchError, match="not of the same rows"):
        match(a, a, indexes=(Fired(values), Fired(np.ones((31, 6)))))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="has 5 features"):
        match(a, a, indexes=(Fired(values[:, :5]), Fired(values)))  # type: ignore[arg-type]


def test_the_command_compares_an_sae_with_a_checkpoint(tmp_path: Path) -> None:
    from helpers_training import HOOK, MemorySource, synthetic

    from scope.cli import app
    from scope.training import TrainConfig, train

    source = MemorySource(synthetic(600).rows)
    config = TrainConfig(d_sae=32, k=4, tokens=1280, batch_size=128, checkpoint_steps=5, log_steps=1)

    def stop(done: int, total: int | None) -> None:
        if done >= 7 * 128:
            raise RuntimeError("crash")

    train(source, HOOK, config, tmp_path / "one")
    with pytest.raises(RuntimeError, match="crash"):
        train(source, HOOK, config, tmp_path / "two", progress=stop)
    answer = CliRunner().invoke(app, ["compare", str(tmp_path / ".two.training"), str(tmp_path / "one"), "--json"])
    assert answer.exit_code == 0, answer.output
    figures = json.loads(answer.stdout.splitlines()[-1])
    assert figures["matched"] == 32 - len({*figures["only_a"]}) == len(figures["pairs"])
    assert figures["mean_best_cosine_a"] > 0.9  # the same run, some steps apart
