"""Conditions, and what fires on them: parity with dense arrays in plain numpy and pandas, and properties."""

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers_features import TEXTS, FakeModel, FakeStore, WideSAE, dense_strengths, small_sae
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features import build_index, counting, selection
from scope.features.conditions import KINDS, Condition, Term
from scope.features.contrast import compare, likelihood_z, log_ratio

N_DOCUMENTS = 2 * len(TEXTS)


class Known:
    """An index and all that is in it, as dense arrays."""

    def __init__(self, folder, sae) -> None:
        model = FakeModel()
        self.store = FakeStore(model)
        self.index = build_index(
            self.store, sae, folder / "known.index", model=model, batch_size=50, segment_firings=300
        )
        self.fires = dense_strengths(self.store, sae) != 0
        self.strengths = dense_strengths(self.store, sae)
        assert self.fires.any(axis=0).sum() > 30, "parity over nothing would say nothing"
        columns = self.store.columns
        document = self.store.sequences().set_index("sequence")["document"].loc[columns["sequence"]].to_numpy()
        self.rows = pd.DataFrame(
            {
                "text": model.vocabulary_strings(columns["token_id"].tolist()),
                "document": document,
                "language": [TEXTS[number % len(TEXTS)][2] for number in document],
                "source": [TEXTS[number % len(TEXTS)][1] for number in document],
                "indexed": columns["flags"] == 0,
            }
        )

    def holds(self, condition: Condition) -> np.ndarray:
        """Row by row, whether a condition holds: what the index must find by its own ways."""
        holds = self.rows["indexed"].to_numpy().copy()
        for term in condition.terms:
            if term.kind == "token":
                holds &= (self.rows["text"] == term.value).to_numpy()
            elif term.kind == "regex":
                holds &= self.rows["text"].str.contains(str(term.value), regex=True).to_numpy()
            elif term.kind == "feature":
                holds &= self.fires[:, int(term.value)]
            else:
                holds &= (self.rows[term.kind] == term.value).to_numpy()
        return holds


@pytest.fixture(scope="module", params=["topk", "wide"])
def known(request, tmp_path_factory):
    """Rows with four firings each, and rows with very unlike numbers of them."""
    sae = small_sae() if request.param == "topk" else WideSAE(40, threshold=1.5)
    return Known(tmp_path_factory.mktemp("contrast"), sae)


CONDITIONS = [
    "language:en",
    "source:handbook",
    "document:3",
    "token: Every",
    "token:.",
    "regex:^ [a-z]+$",
    "feature:7",
    "language:ja & regex:^<0x",
    "source:handbook & language:ar",
    "feature:7 & feature:3",
    "feature:7 & language:en & regex:e",
    "document:3 & language:ja",
    "language:en & source:gutenberg & token: of",
]


@pytest.mark.parametrize("text", CONDITIONS)
def test_the_rows_of_a_condition(known, text):
    condition = Condition.parse(text)
    rows = selection.rows_of(known.index._reader, condition)
    wanted = np.flatnonzero(known.holds(condition))
    assert rows.rows.tolist() == wanted.tolist()
    assert rows.total == len(wanted)
    assert not rows.sampled
    others = selection.rows_without(known.index._reader, condition, rows.total)
    assert others.rows.tolist() == np.flatnonzero(known.rows["indexed"] & ~known.holds(condition)).tolist()


@pytest.mark.parametrize(("a", "b"), [(a, None) for a in CONDITIONS] + list(itertools.pairwise(CONDITIONS)))
def test_contrast_counts_as_pandas_does(known, a, b):
    on_a = known.holds(Condition.parse(a))
    on_b = known.rows["indexed"].to_numpy() & ~on_a if b is None else known.holds(Condition.parse(b))
    if not on_a.any() or not on_b.any():
        with pytest.raises(InvalidInputError, match="No row"):
            known.index.contrast(a, b)
        return
    found = known.index.contrast(a, b, n=40)
    frame = pd.DataFrame(known.fires)
    rates = pd.DataFrame({"rate_a": frame[on_a].mean(), "rate_b": frame[on_b].mean()})
    named = set(Condition.parse(a).features) | set(() if b is None else Condition.parse(b).features)
    wanted = rates[(rates["rate_a"] > rates["rate_b"]) & ~rates.index.isin(named)]
    assert set(found.table["feature"]) == set(wanted.index)
    own = found.table.set_index("feature").sort_index()
    pd.testing.assert_frame_equal(own[["rate_a", "rate_b"]], wanted.rename_axis("feature"), check_dtype=False)
    assert (found.n_rows_a, found.n_rows_b) == (on_a.sum(), on_b.sum())
    assert not found.sampled
    assert found.table["z"].is_monotonic_decreasing
    for side in "ab":
        assert (own[f"rate_{side}_low"] <= own[f"rate_{side}"]).all()
        assert (own[f"rate_{side}"] <= own[f"rate_{side}_high"]).all()
    assert (own["top_token"] == known.index.table["top_token"].loc[own.index]).all()


def test_a_contrast_says_what_it_is_of(known):
    found = known.index.contrast("language:en", "language:ja & regex:x|<")
    assert str(found).startswith("language:en (")
    assert "and not language:ja & regex:x|< (" in str(found)
    assert "everything else" in str(known.index.contrast("language:en"))
    assert "&lt;" in found._repr_html_()
    assert "<0x" not in found._repr_html_()


@pytest.mark.parametrize(
    "text", ["regex:a", "feature:{busy}", "token: the", "regex:. & language:en", "feature:{busy} & regex:e"]
)
def test_many_rows_are_sampled(known, monkeypatch, text):
    condition = Condition.parse(text.format(busy=int(known.index.table["n_firings"].idxmax())))
    text = str(condition)
    wanted = np.flatnonzero(known.holds(condition))
    n = len(wanted)
    assert n > 5
    monkeypatch.setattr(selection, "MAX_ROWS", n - 1)
    monkeypatch.setattr(selection, "SAMPLE", n // 2)
    reader = known.index._reader
    rows = selection.rows_of(reader, condition)
    assert rows.sampled
    assert rows.total == len(wanted)
    assert np.isin(rows.rows, wanted).all()
    assert (np.diff(rows.rows) > 0).all()
    assert 0 < len(rows.rows) < n
    assert np.array_equal(selection.rows_of(reader, condition).rows, rows.rows)
    others = selection.rows_without(reader, condition, rows.total)
    assert not np.isin(others.rows, wanted).any()
    assert known.rows["indexed"][others.rows].all()
    assert others.total == known.rows["indexed"].sum() - len(wanted)
    known.index.forget()
    found = known.index.contrast(text)
    assert found.sampled
    assert f"of {len(wanted):,} rows" in str(found)
    known.index.forget()


def test_samples_are_fair():
    """Each of the places is drawn as often as any other, over the lengths that a text may have."""
    drawn = np.zeros(50)
    for n in range(1000, 1400):
        places = selection._places(n, 100)
        assert len(np.unique(places)) == 100
        assert places[0] >= 0
        assert places[-1] < n
        drawn += np.bincount(places * 50 // n, minlength=50)
    assert stats.chisquare(drawn).pvalue > 1e-6


@pytest.mark.parametrize("surplus", [1.0, 1.25, 1e9])
def test_scattered_rows_are_counted_right(known, monkeypatch, surplus):
    monkeypatch.setattr(counting, "SURPLUS", surplus)
    monkeypatch.setattr(counting, "PIECE", 50)
    monkeypatch.setattr(counting, "MANY_ROWS", 60)
    reader = known.index._reader
    rng = np.random.default_rng(3)
    n = known.index.n_rows
    for size in (0, 1, 7, 61, n):
        rows = np.sort(rng.choice(n, size, replace=False))
        assert np.array_equal(counting.count_features(reader, rows), known.fires[rows].sum(axis=0))
        sums = counting.sum_strengths(reader, rows)
        assert np.allclose(sums.strengths, known.strengths[rows].sum(axis=0, dtype=np.float64))
        largest = np.where(known.fires[rows], known.strengths[rows], -np.inf).max(axis=0, initial=-np.inf)
        assert np.array_equal(sums.largest, largest)
        for feature in (0, 7):
            assert np.array_equal(counting.fires_on(reader, feature, rows), known.fires[rows, feature])


def test_features_on_a_token(known):
    index = known.index
    for text in (" Every", ".", "Every", "<0x90>"):
        here = (known.rows["text"] == text).to_numpy() & known.rows["indexed"].to_numpy()
        assert here.any(), text
        found = index.features_on_token(text, n=40).set_index("feature")
        counts = known.fires[here].sum(axis=0)
        assert set(found.index) == set(np.flatnonzero(counts))
        assert (found["n_firings"] == counts[found.index]).all()
        assert np.allclose(found["rate"], counts[found.index] / here.sum())
        means = known.strengths[here].sum(axis=0)[found.index] / counts[found.index]
        assert np.allclose(found["mean_value"], means, rtol=1e-5)
        density = index.table["density"].loc[found.index]
        assert np.allclose(found["lift"], found["rate"] / density)
        assert found["z"].is_monotonic_decreasing
        token = int(known.store.columns["token_id"][np.flatnonzero(here)[0]])
        assert index.features_on_token(token, n=40).equals(found.reset_index())
        assert found.attrs == {"n_rows": here.sum(), "looked_at": here.sum(), "sampled": False}


def test_tokens_that_are_not_there(known):
    with pytest.raises(UnknownNameError, match="' Every'"):
        known.index.features_on_token("every")
    with pytest.raises(UnknownNameError, match="Spaces count"):
        known.index.features_on_token("nowhere")
    for token in (-1, 10**6):
        with pytest.raises(OutOfRangeError):
            known.index.features_on_token(token)
    with pytest.raises(InvalidInputError, match="text"):
        known.index.features_on_token(True)


def test_features_on_a_document(known):
    for document in range(N_DOCUMENTS):
        here = (known.rows["document"] == document).to_numpy() & known.rows["indexed"].to_numpy()
        found = known.index.features_on_document(document, n=40).set_index("feature")
        counts = known.fires[here].sum(axis=0)
        assert set(found.index) == set(np.flatnonzero(counts))
        assert (found["n_firings"] == counts[found.index]).all()
        assert np.allclose(
            found["max_value"], np.where(known.fires, known.strengths, -np.inf)[here].max(axis=0)[found.index]
        )
        assert np.allclose(found["rate"], counts[found.index] / here.sum())
    with pytest.raises(OutOfRangeError):
        known.index.features_on_document(N_DOCUMENTS)


@pytest.mark.parametrize(
    "text", ["", "language", "language:", "langage:en", "feature:x", "feature:-1", "token:", "feature:3 & "]
)
def test_conditions_that_cannot_be_read(known, text):
    with pytest.raises(InvalidInputError):
        known.index.contrast(text)


def test_conditions_name_what_there_is(known):
    for text, match in (
        ("language:enn", "Did you mean en"),
        ("source:book", "handbook"),
        ("langage:en", "language"),
        ("token: every", "' Every'"),
    ):
        with pytest.raises(UnknownNameError, match=match):
            known.index.contrast(text)
    for text in ("feature:40", "document:99"):
        with pytest.raises(OutOfRangeError):
            known.index.contrast(text)
    with pytest.raises(InvalidInputError, match="RE2"):
        known.index.contrast("regex:(?=x)")


def test_how_conditions_are_written():
    parse = Condition.parse
    assert parse("language: de ").terms == (Term("language", "de"),)
    assert parse("token: cat & language:de").terms == (Term("token", " cat"), Term("language", "de"))
    assert parse('token:" & " & feature:3').terms == (Term("token", " & "), Term("feature", 3))
    assert parse("regex:a & b").terms == (Term("regex", "a & b"),)
    assert parse('token:"').terms == (Term("token", '"'),)
    assert parse('token:"\\n"').terms == (Term("token", "\n"),)
    assert parse("source:a:b").terms == (Term("source", "a:b"),)
    assert str(parse("feature:7") & "language:en") == "feature:7 & language:en"
    assert parse(parse("feature:7")) == parse("feature:7")


TEXT_TERMS = st.builds(Term, st.sampled_from(["token", "regex"]), st.text(min_size=1, max_size=12))
NAMES = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() == text)
TERMS = st.one_of(
    TEXT_TERMS,
    st.builds(Term, st.sampled_from(["language", "source"]), NAMES),
    st.builds(Term, st.sampled_from(["document", "feature"]), st.integers(0, 10**9)),
    st.builds(
        Term, st.just("token"), st.sampled_from(['"', '" ', "a & token:b", " & ", "&", "\n", " ", *KINDS, "token:"])
    ),
)


@given(st.lists(TERMS, min_size=1, max_size=4))
def test_a_condition_is_written_as_it_is_read(terms):
    condition = Condition(tuple(terms))
    assert Condition.parse(str(condition)) == condition


COUNTS = st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)).flatmap(
    lambda n: st.tuples(st.just(n[0]), st.integers(0, n[0]), st.just(n[1]), st.integers(0, n[1]))
)


@given(COUNTS)
def test_log_ratio_and_z_have_the_sign_of_the_difference(numbers):
    n_a, k_a, n_b, k_b = numbers
    ratio = log_ratio(np.array([k_a]), n_a, np.array([k_b]), n_b)[0]
    z = likelihood_z(np.array([k_a]), n_a, np.array([k_b]), n_b)[0]
    assert np.isfinite(ratio)
    assert np.isfinite(z)
    difference = k_a * n_b - k_b * n_a
    assert np.sign(z) in (0, np.sign(difference))
    assert abs(ratio) < 1e-6 or np.sign(ratio) == np.sign(difference)
    assert z == pytest.approx(-likelihood_z(np.array([k_b]), n_b, np.array([k_a]), n_a)[0], abs=1e-6)


@given(COUNTS)
def test_z_is_the_likelihood_ratio_of_scipy(numbers):
    n_a, k_a, n_b, k_b = numbers
    if k_a + k_b in (0, n_a + n_b):
        return
    table = [[k_a, n_a - k_a], [k_b, n_b - k_b]]
    wanted = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood").statistic
    found = likelihood_z(np.array([k_a]), n_a, np.array([k_b]), n_b)[0] ** 2
    assert found == pytest.approx(max(wanted, 0), rel=1e-6, abs=1e-4)


def test_smoothing_hardly_changes_what_is_known_well():
    table = compare(np.array([30_000, 0, 5, 0]), 100_000, np.array([10_000, 0, 0, 10]), 8_000_000)
    assert table["log_ratio"][0] == pytest.approx(np.log2(0.3 / 0.00125), rel=1e-3)
    assert table["log_ratio"][1] == 0
    assert 3 < table["log_ratio"][2] < 20
    assert -2 < table["log_ratio"][3] < 0  # few rows without a firing say little
    assert abs(table["z"][3]) < 1
