"""What differs between two prompts, against plain loops; strengths in proportion to what is usual for a feature."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope.errors import MismatchError
from scope.features.prompt_compare import align_tokens, compare_prompts, corrected_strengths


def prompt(ids: list[int], seed: int, d_sae: int = 12):
    """Random firings on tokens."""
    rng = np.random.default_rng(seed)
    rows = [
        (place, int(feature), float(rng.gamma(2.0, 10.0)))
        for place in range(1, len(ids))
        for feature in rng.choice(d_sae, 3, replace=False)
    ]
    table = pd.DataFrame(rows, columns=["position", "feature", "value"]).astype({"value": np.float32})
    return SimpleNamespace(hook_name="h", d_sae=d_sae, token_ids=np.array(ids), table=table)


@given(a=st.lists(st.integers(0, 4), max_size=12), b=st.lists(st.integers(0, 4), max_size=12))
def test_every_token_is_paired_once_or_stands_alone_in_order(a: list[int], b: list[int]) -> None:
    pairs = align_tokens(np.array(a), np.array(b))
    for column, ids in (("position_a", a), ("position_b", b)):
        assert pairs[column][pairs[column] >= 0].tolist() == list(range(len(ids)))
    both = pairs[(pairs["position_a"] >= 0) & (pairs["position_b"] >= 0)]
    same = [a[i] == b[j] for i, j in zip(both["position_a"], both["position_b"], strict=True)]
    assert all(equal or not said for equal, said in zip(same, both["same"], strict=True))
    assert not pairs["same"][(pairs["position_a"] < 0) | (pairs["position_b"] < 0)].any()
    if a == b:
        assert pairs["same"].all()


def test_a_word_that_differs_is_paired_and_a_word_that_is_added_stands_alone() -> None:
    pairs = align_tokens(np.array([0, 1, 2, 3]), np.array([0, 1, 9, 3, 4]))
    assert pairs.to_numpy().tolist() == [
        [0, 0, True], [1, 1, True], [2, 2, False], [3, 3, True], [-1, 4, False]
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_comparison_is_what_loops_find(seed: int) -> None:
    a, b = prompt([0, 1, 2, 3, 4, 5, 6], seed), prompt([0, 1, 8, 3, 4, 9, 9, 6], seed + 100)
    found = compare_prompts(a, b)

    def value(side, place: int, feature: int) -> float:
        hit = side.table[(side.table["position"] == place) & (side.table["feature"] == feature)]["value"]
        return float(hit.sum())

    same = [(i, j) for i, j, equal in found.pairs.to_numpy().tolist() if equal]
    assert (1, 1) in same
    assert (2, 2) not in same
    firing = set(a.table["feature"]) | set(b.table["feature"])
    assert set(found.features["feature"]) == firing
    for row in found.features.itertuples():
        of_a = a.table[a.table["feature"] == row.feature]["value"]
        of_b = b.table[b.table["feature"] == row.feature]["value"]
        assert (row.n_a, row.n_b) == (len(of_a), len(of_b))
        assert (row.max_a, row.max_b) == (of_a.max() if len(of_a) else 0, of_b.max() if len(of_b) else 0)
        assert row.only == ("a" if not len(of_b) else "b" if not len(of_a) else "")
        changes = [value(b, j, row.feature) - value(a, i, row.feature) for i, j in same]
        assert row.change == pytest.approx(max(changes, key=abs), abs=1e-5)
        if row.change:
            there = value(b, row.position_b, row.feature) - value(a, row.position_a, row.feature)
            assert row.change == pytest.approx(there, abs=1e-5)
    larger = found.features[["max_a", "max_b"]].max(axis=1)
    assert larger.is_monotonic_decreasing


def test_a_prompt_does_not_differ_from_itself() -> None:
    a = prompt([0, 1, 2, 3], 0)
    found = compare_prompts(a, a)
    assert (found.features["change"] == 0).all()
    assert (found.features["only"] == "").all()
    empty = SimpleNamespace(hook_name="h", d_sae=12, token_ids=np.array([0]), table=a.table.iloc[:0])
    assert compare_prompts(empty, empty).features.empty
    assert (compare_prompts(a, empty).features["only"] == "a").all()
    with pytest.raises(MismatchError, match="different SAEs"):
        compare_prompts(a, prompt([0, 1], 0, d_sae=13))


def test_corrected_strength_is_the_formula() -> None:
    table = pd.DataFrame(
        {"feature": range(4), "density": [0.5, 0.001, 0.0, 1.0], "mean_value": [10.0, 10.0, np.nan, 5.0]}
    )
    index = SimpleNamespace(table=table, n_indexed_rows=4096)
    firings = pd.DataFrame({"feature": [0, 1, 1, 2, 3], "value": [20.0, 20.0, 10.0, 7.0, 50.0]})
    expected = [2 * 1.0, 2 * np.log2(1000), np.log2(1000), 12.0, 0.0]
    assert np.allclose(corrected_strengths(firings, index), expected, rtol=1e-5)
    assert len(corrected_strengths(firings.iloc[:0], index)) == 0
