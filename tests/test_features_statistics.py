"""Statistics of the feature table against plain numpy, and what is called specific to a language or neutral."""

import numpy as np
import pytest
import torch
from helpers_features import FakeModel, FakeStore, WideSAE, small_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from scope.features import FeatureIndex, build_index
from scope.features.languages import DOCUMENTS, ROWS, language_facts
from scope.features.statistics import OFTEN, divergence_bits, position_bins


def all_strengths(store: FakeStore, sae) -> np.ndarray:
    """Firing strengths of every row and feature, BOS rows too."""
    with torch.no_grad():
        return (sae.encode(torch.from_numpy(store.x)) * sae.decoder_norms).to(torch.bfloat16).float().numpy()


def kullback_leibler(own: np.ndarray, rows: np.ndarray, bins: int) -> float:
    """Bits between two samples of integers, less (bins - 1) / (2 n ln 2)."""
    total = 0.0
    for value in np.unique(own):
        p, q = (own == value).mean(), (rows == value).mean()
        total += p * np.log2(p / q)
    return max(0.0, total - (bins - 1) / (2 * len(own) * np.log(2)))


@pytest.mark.parametrize(("budget", "kind"), [(10**6, "topk"), (7, "topk"), (100, "wide"), (20, "signed")])
def test_the_table_against_plain_numpy(tmp_path, monkeypatch, budget, kind):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    store = FakeStore(FakeModel(), repeats=3)
    sae = small_sae() if kind == "topk" else WideSAE(40, signed=kind == "signed")
    index = build_index(store, sae, tmp_path / "a.index", batch_size=64, segment_firings=budget)
    strengths = all_strengths(store, sae)
    ordinary = store.columns["flags"] == 0
    tokens, position, sequence = (store.columns[name][ordinary] for name in ("token_id", "position", "sequence"))
    bins = np.array([0, 1, 2, 3, 4, 4, 4, 4, *[5] * 8, *[6] * 16])[position]
    document_of = store.sequences()["document"].to_numpy()
    language_of = store.documents()["language"].to_numpy()
    windows, documents = index._reader.array("statistics/language_windows").all(), index._reader
    documents = documents.array("statistics/language_documents").all()
    for feature, row in enumerate(index.table.itertuples()):
        values = strengths[ordinary, feature]
        fires = values != 0
        left_out = np.abs(strengths[~ordinary, feature]).sum()
        if not fires.any():
            assert np.isnan([row.position_bits, row.token_bits]).all()
            assert row.special_share == 1 if left_out else np.isnan(row.special_share)
            assert row.mean_top_tokens.size == 0
            continue
        assert row.special_share == pytest.approx(left_out / (left_out + np.abs(values).sum()), rel=1e-5)
        expected = kullback_leibler(bins[fires], bins, len(np.unique(bins)))
        assert row.position_bits == pytest.approx(expected, abs=1e-5)
        expected = kullback_leibler(tokens[fires], tokens, len(np.unique(tokens[fires])))
        assert row.token_bits == pytest.approx(expected, abs=1e-5)
        own = {token: values[fires & (tokens == token)] for token in np.unique(tokens[fires])}
        often = {token: found for token, found in own.items() if len(found) >= OFTEN} or own
        ranked = sorted(often, key=lambda token: (-abs(often[token].mean()), token))[:20]
        assert row.mean_top_values == pytest.approx([often[token].mean() for token in ranked], rel=1e-5)
        assert list(row.mean_top_tokens) == [f"<{token}>" for token in ranked]
        for number, language in enumerate(index.languages):
            here = fires & (language_of[document_of[sequence]] == language)
            assert windows[feature, number] == len(np.unique(sequence[here]))
            assert documents[feature, number] == len(np.unique(document_of[sequence[here]]))


def test_a_feature_of_sinks(tmp_path, monkeypatch):
    """One that fires on BOS alone has all its strength there, and is dead elsewhere."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    store, sae = FakeStore(FakeModel()), small_sae(k=40)
    bos = torch.from_numpy(store.x[store.columns["flags"] > 0].mean(axis=0))
    with torch.no_grad():
        sae.W_enc[:, 7] = bos / bos.norm()
        sae.b_enc[7] = -0.5 * bos.norm()
    index = build_index(store, sae, tmp_path / "a.index", batch_size=64)
    assert index.table["special_share"][7] == 1
    assert bool(index.table["dead"][7])
    assert np.isnan(index.table["special_share"][5])
    assert FeatureIndex.open(index.path).table["special_share"].drop(5).between(0, 1).all()


@given(st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
def test_position_bins_double(position):
    expected = position if position < 4 else int(np.floor(np.log2(position))) + 2
    assert position_bins(np.array([position]))[0] == expected


def test_divergence_of_chance_is_nothing():
    rng = np.random.default_rng(0)
    rows = np.array([1000, 500, 250, 125, 0])
    counts = rng.multinomial(60, rows / rows.sum(), size=2000)
    bits = divergence_bits(counts, rows)
    assert bits.mean() < 0.02, "without the correction 0.036 bits"
    assert (bits >= 0).all()
    assert divergence_bits(np.array([[0, 0, 0, 50, 0]]), rows)[0] == pytest.approx(np.log2(15), abs=0.05)
    assert np.isnan(divergence_bits(np.zeros((1, 5)), rows)[0])


ROWS_OF = np.array([50_000, 5_000, 5_000, 500])


def facts(firings: list[int], windows: list[int] | None = None, documents: list[int] | None = None):
    counts = np.array([firings])
    found = language_facts(
        counts,
        counts if windows is None else np.array([windows]),
        counts if documents is None else np.array([documents]),
        ROWS_OF,
    )
    return bool(found.neutral[0]), int(found.specific[0])


def test_rates_count_not_counts():
    assert facts([5000, 500, 500, 50]) == (True, -1), "ten times the firings in ten times the rows"
    assert facts([50, 500, 5, 0]) == (False, 1), "as many as in the large language, at a hundred times the rate"
    assert facts([400, 0, 0, 0]) == (False, 0), "where it never fires elsewhere in as many rows"
    assert facts([40, 0, 0, 0]) == (False, -1), "which few rows elsewhere cannot show"


def test_few_firings_show_nothing():
    assert facts([0, 1, 0, 0]) == (False, -1)
    assert facts([0, 0, 0, 2]) == (False, -1)
    assert facts([10, 1, 1, 0]) == (False, -1), "the same rate, as far as anybody can tell"
    assert facts([0, 0, 0, 0]) == (False, -1)


def test_firings_of_one_text_are_one_observation():
    assert facts([0, 200, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]) == (False, -1)
    assert facts([0, 200, 0, 0], [0, 60, 0, 0], [0, DOCUMENTS - 1, 0, 0]) == (False, -1)
    assert facts([0, 200, 0, 0], [0, 60, 0, 0], [0, DOCUMENTS, 0, 0]) == (False, 1)
    assert facts([5000, 500, 500, 50], [200, 4, 4, 1]) == (False, -1)


def test_small_languages_do_not_decide_what_is_neutral():
    assert ROWS_OF[-1] < ROWS
    assert facts([5000, 500, 500, 0]) == (True, -1)
    assert facts([5000, 500, 0, 50]) == (False, -1)


def test_one_language_tells_nothing():
    found = language_facts(np.array([[10]]), np.array([[10]]), np.array([[10]]), np.array([10_000]))
    assert not found.neutral.any()
    assert (found.specific == -1).all()


def test_features_that_do_not_care_are_rarely_called_specific():
    rng = np.random.default_rng(0)
    rows = np.array([30_000, *[4_000] * 20])
    rates = 10 ** rng.uniform(-4.5, -0.5, 5000)
    counts = rng.binomial(rows, rates[:, None])
    found = language_facts(counts, counts, counts, rows)
    assert (found.specific >= 0).mean() < 0.001
    assert found.neutral[rates > 0.02].mean() > 0.95
    assert found.neutral[rates < 1e-3].mean() < 0.05
    counts[:, 3] = rng.binomial(4_000, np.minimum(20 * rates, 1))
    found = language_facts(counts, counts, counts, rows)
    assert (found.specific[(rates > 2e-3) & (rates < 0.04)] == 3).mean() > 0.95
    assert (found.specific[rates > 2e-3] != 3).sum() == (found.specific[rates > 2e-3] == -1).sum()
