"""The index equals a brute-force computation over dense feature activations."""

import numpy as np
import pandas as pd
import pytest
from helpers_features import D_IN, TEXTS, FakeModel, FakeStore, WideSAE, dense_strengths, small_sae, tiny_index

from activations.source import RowFlag
from scope.features import FeatureIndex, build_index, layout
from scope.features.statistics import entropy_bits, wilson


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    index, store, sae = tiny_index(tmp_path_factory.mktemp("index"))
    return index, store, dense_strengths(store, sae)


def assert_holds(index: FeatureIndex, dense: np.ndarray) -> None:
    """Every firing, both ways, and nothing else."""
    assert index.n_firings == np.count_nonzero(dense)
    for feature in range(index.d_sae):
        firings = index.firings(feature)
        rows = np.flatnonzero(dense[:, feature])
        order = np.lexsort((rows, -dense[rows, feature]))
        assert firings["row"].tolist() == rows[order].tolist()
        assert firings["value"].tolist() == dense[rows[order], feature].tolist()
    everything = index.features_in(0, index.n_rows)
    rebuilt = np.zeros_like(dense)
    rebuilt[everything["row"], everything["feature"]] = everything["value"]
    assert np.array_equal(rebuilt, dense)
    by_row = everything.groupby("row")["value"]
    assert (by_row.diff().dropna() <= 0).all()


def test_every_firing_both_ways(built):
    index, _, dense = built
    assert_holds(index, dense)
    assert index.array_dtypes["by_token/feature"] == "uint16"


@pytest.mark.parametrize("budget", [7, 300, 10**6])
@pytest.mark.parametrize("signed", [False, True])
def test_rows_with_unlike_numbers_of_firings(tmp_path, signed, budget):
    store = FakeStore(FakeModel(), repeats=1)
    sae = WideSAE(30, threshold=2.0, signed=signed)
    index = build_index(store, sae, tmp_path / "wide.index", segment_firings=budget, batch_size=64)
    dense = dense_strengths(store, sae)
    assert_holds(index, dense)
    assert (dense < 0).any() == signed
    for feature in range(30):
        assert index.histogram(feature)[1].sum() == np.count_nonzero(dense[:, feature])


def test_feature_ids_as_uint32(tmp_path, monkeypatch):
    assert layout.feature_dtype(2**16) == "uint16"
    assert layout.feature_dtype(2**16 + 1) == "uint32"
    monkeypatch.setattr("scope.features.segments.feature_dtype", lambda d_sae: "uint32")
    index, store, sae = tiny_index(tmp_path)
    assert index.array_dtypes["by_token/feature"] == "uint32"
    assert_holds(index, dense_strengths(store, sae))


def test_statistics(built):
    index, store, dense = built
    indexed = store.columns["flags"] == 0
    assert index.n_indexed_rows == indexed.sum()
    languages = np.array([TEXTS[d % len(TEXTS)][2] for d in store.sequences()["document"]])[store.columns["sequence"]]
    for feature, row in index.table.iterrows():
        values = dense[dense[:, feature] > 0, feature].astype(np.float64)
        assert row["n_firings"] == len(values)
        assert row["dead"] == (len(values) == 0)
        assert row["density"] == pytest.approx(len(values) / indexed.sum())
        assert row["over_dense"] == (len(values) / indexed.sum() > 0.1)
        low, high = wilson(np.array(len(values)), indexed.sum())
        assert (row["density_low"], row["density_high"]) == (low, high)
        assert low <= row["density"] <= high
        edges, counts = index.histogram(feature)
        assert counts.sum() == len(values)
        if not len(values):
            continue
        assert row["max_value"] == values.max()
        assert row["mean_value"] == pytest.approx(values.mean(), rel=1e-6)
        assert row["std_value"] == pytest.approx(values.std(), rel=1e-4, abs=1e-5)
        ordered = np.sort(values)
        assert row["q50"] == ordered[::-1][round(0.5 * (len(values) - 1))]
        assert edges[0] == 0
        assert edges[-1] == values.max()
        expected = np.minimum((values * 40 / values.max()).astype(int), 39)
        assert counts.tolist() == np.bincount(expected, minlength=40).tolist()
        rows = np.flatnonzero(dense[:, feature])
        assert row["mean_position"] == pytest.approx(store.columns["position"][rows].mean())
        by_language = index.by_language(feature).set_index("language")
        for language, group in pd.Series(dense[rows, feature]).groupby(languages[rows]):
            assert by_language.loc[language, "n_firings"] == len(group)
            assert by_language.loc[language, "rate"] == pytest.approx(
                len(group) / (indexed & (languages == language)).sum()
            )
            assert by_language.loc[language, "mean_value"] == pytest.approx(group.mean(), rel=1e-6)
        rates = by_language["rate"].to_numpy()[None]
        assert row["language_entropy"] == pytest.approx(entropy_bits(rates)[0], rel=1e-5, abs=1e-6)
        assert index.by_source(feature)["share"].sum() == pytest.approx(1)


def test_top_tokens(built):
    index, store, dense = built
    tokens = store.columns["token_id"]
    for feature in np.flatnonzero(index.table["n_firings"]):
        fired = dense[:, feature] > 0
        sums = pd.Series(dense[fired, feature].astype(np.float64)).groupby(tokens[fired]).agg(["sum", "count", "mean"])
        found = index.top_tokens(feature, 64).set_index("token_id")
        assert found["mean_value"].to_dict() == pytest.approx(sums["mean"].to_dict(), rel=1e-6)
        assert found["count"].to_dict() == sums["count"].to_dict()
        assert found["share"].sum() == pytest.approx(1, rel=1e-5)
        assert found.index[0] == sums["sum"].idxmax()
        row = index.table.iloc[feature]
        assert row["top_token"] == found["token"].iloc[0]
        share = (sums["count"] / sums["count"].sum()).to_numpy()
        assert row["token_entropy"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-5, abs=1e-6)
        assert found["rate"].max() <= 1


def test_cofiring(built):
    index, _, dense = built
    fires = dense > 0
    together = fires.T.astype(int) @ fires.astype(int)
    n = fires.sum(axis=0)
    for feature in np.flatnonzero(n):
        union = n[feature] + n - together[feature]
        jaccard = np.where(together[feature] > 0, together[feature] / union, -1)
        jaccard[feature] = -1
        found = index.cofiring(feature, 64)
        assert len(found) == (jaccard > 0).sum()
        assert found["jaccard"].tolist() == pytest.approx(sorted(jaccard[jaccard > 0], reverse=True))
        best = found.iloc[0]
        other = int(best["feature"])
        assert best["n_both"] == together[feature, other]
        assert best["pmi"] == pytest.approx(
            np.log2(together[feature, other] * index.n_indexed_rows / n[feature] / n[other])
        )
        assert best["p_other_given_this"] == pytest.approx(together[feature, other] / n[feature])


def test_cofiring_of_dense_features_is_sampled(built, monkeypatch, tmp_path):
    exact, _, dense = built
    monkeypatch.setattr("scope.features.cofiring.SAMPLE", 20)
    sampled, _, _ = tiny_index(tmp_path)
    dense_one = int(exact.table["n_firings"].idxmax())
    n = exact.table["n_firings"][dense_one]
    step = -(-n // 20)
    rows = exact.firings(dense_one)["row"].to_numpy()[::step]
    counts = (dense[rows] > 0).sum(axis=0) * (n / len(rows))
    for other, both in sampled.cofiring(dense_one)[["feature", "n_both"]].itertuples(index=False):
        assert both == pytest.approx(counts[int(other)])


def test_decoder(built):
    index, store, _ = built
    sae = small_sae()
    rows = sae.W_dec.detach().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    for feature in (0, 5, 39):
        found = index.neighbours(feature, 20)
        assert found["feature"].tolist() == np.argsort(-cosine[feature], kind="stable")[:20].tolist()
        assert found["cosine"].tolist() == pytest.approx(np.sort(cosine[feature])[::-1][:20].tolist(), abs=1e-6)
    assert index.table["encoder_decoder_cosine"].tolist() == pytest.approx([1.0] * 40, abs=1e-5)
    effects = store.model.logit_effects(sae.W_dec.detach() / sae.decoder_norms[:, None])
    top = index.top_logits(3, 5)
    assert top["effect"].tolist() == pytest.approx(effects[3].topk(5).values.tolist(), rel=1e-5)
    assert top["token"].tolist() == store.model.vocabulary_strings(effects[3].topk(5).indices.tolist())
    assert index.bottom_logits(3, 20)["effect"].iloc[0] == pytest.approx(effects[3].min().item(), rel=1e-5)


def test_bos_rows_have_no_firings(built):
    index, store, _ = built
    bos = np.flatnonzero(store.columns["flags"] == RowFlag.BOS)
    assert all(len(index.features_at(int(row))) == 0 for row in bos)
    assert np.linalg.norm(store.x[bos], axis=1).min() > 10 * np.sqrt(D_IN)


def test_a_dead_feature(built):
    index, _, _ = built
    assert index.table["dead"][5]
    assert index.firings(5).empty
    assert index.top_examples(5) == ()
    assert index.random_examples(5) == ()
    assert index.histogram(5)[1].sum() == 0
    assert index.top_tokens(5).empty
    assert index.cofiring(5).empty
    assert len(index.neighbours(5)) == 20
    assert len(index.top_logits(5)) == 20
    assert index.by_language(5)["n_firings"].sum() == 0
    assert "never fires" in index.feature(5)._repr_html_()


def test_works_without_store_model_and_torch(built):
    import subprocess
    import sys

    index, _, _ = built
    code = (
        "import sys\n"
        "from scope.features import FeatureIndex\n"
        f"index = FeatureIndex.open({str(index.path)!r})\n"
        "index.top_examples(int(index.table['n_firings'].idxmax()))\n"
        "assert not {'torch', 'transformers', 'zarr', 'plotly'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_and_manifest(built):
    index, store, _ = built
    info = index.info()
    assert info["n_documents"] == len(TEXTS) * 2
    assert info["languages"] == {"ar": 57, "code-python": 87, "en": 110, "ja": 192}
    assert info["metrics"] == {"fvu": 0.1, "l0": 4.0}
    assert index.manifest["parents"] == [store.fingerprint, small_sae().fingerprint]
    assert index.id == index.fingerprint[:12]
    assert index.model_info["name"] == "fake model"
    assert index.sae_info["k"] == 4
