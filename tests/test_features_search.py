"""Search by token text and label, the grid with labels, whole documents, the bench of all of them."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers_features import dense_strengths, tiny_index
from typer.testing import CliRunner

from activations.source import RowFlag
from scope.cli import app
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features import FeatureIndex
from scope.features.labels import FeatureLabels, ImportedLabel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    index, store, sae = tiny_index(tmp_path_factory.mktemp("search"))
    return index, store, dense_strengths(store, sae)


@pytest.fixture
def labelled(built, tmp_path):
    """The index with labels of its own."""
    index = built[0]
    labels = FeatureLabels(index.sae_info["fingerprint"], tmp_path / "workspace.db", d_sae=index.d_sae)
    return FeatureIndex.open(index.path, labels)


@pytest.mark.parametrize("text", ["ever", " of", "<", "a"])
def test_features_by_token_text(built, text):
    index, store, dense = built
    texts = pd.Series(store.model.vocabulary_strings(store.columns["token_id"].tolist()))
    here = texts.str.casefold().str.contains(text, regex=False).to_numpy() & (store.columns["flags"] == 0)
    strength = dense[here].sum(axis=0, dtype=np.float64)
    found = index.search_tokens(text, n=40).set_index("feature")
    assert set(found.index) == set(np.flatnonzero(strength))
    assert np.allclose(
        found["share"], strength[found.index] / dense.sum(axis=0, dtype=np.float64)[found.index], rtol=1e-4
    )
    assert (found["n_firings"] == (dense[here] != 0).sum(axis=0)[found.index]).all()
    assert all(text in token.casefold() for tokens in found["tokens"] for token in tokens)


def test_a_token_searched_for_exactly(built):
    index, _store, _dense = built
    assert all(tokens == [" Every"] for tokens in index.search_tokens(" Every", exact=True)["tokens"])
    assert index.search_tokens("nowhere to be found").empty
    with pytest.raises(UnknownNameError, match="Every"):
        index.search_tokens(" every", exact=True)
    with pytest.raises(InvalidInputError, match="empty"):
        index.search_tokens("")


def test_features_by_label(labelled):
    labels = labelled.labels
    assert labelled.search_labels("name").empty
    labels.set(3, text="Names of cities")
    labels.set(7, text="a surname, as in letters", starred=True)
    labels.set(9, text="name")
    labels.take_in([ImportedLabel(11, "Städtenamen", "elsewhere", ""), ImportedLabel(3, "towns", "elsewhere", "")])
    assert labelled.search_labels("NAME")["feature"].tolist() == [9, 3, 11, 7]
    assert labelled.search_labels("cities names")["feature"].tolist() == [3]
    assert labelled.search_labels("towns").empty  # one's own label is the one that shows
    assert labelled.search_labels("städte")["label_source"].tolist() == ["elsewhere"]
    assert labelled.search_labels("name", n=1)["feature"].tolist() == [9]
    with pytest.raises(InvalidInputError, match="empty"):
        labelled.search_labels(" ")


def test_the_grid_has_labels(labelled):
    before = labelled.query()
    assert before.total == 40
    assert not before.rows["starred"].any()
    assert (before.rows["label"] == "").all()
    labels = labelled.labels
    labels.set(3, text="Zebra", starred=True)
    labels.set(8, text="apple", notes="look at this again")
    labels.add_to_list(8, "fruit")
    labels.add_to_list(12, "fruit")
    labels.add_to_list(12, "seen")
    query = labelled.query
    assert query(text="zebra").rows["feature"].tolist() == [3]
    assert query(filters={"starred": True}).rows["feature"].tolist() == [3]
    assert query(filters={"lists": "fruit"}).rows["feature"].tolist() == [8, 12]
    assert query(filters={"lists": ["seen", "other"]}).rows["feature"].tolist() == [12]
    assert query(filters={"lists": {"filterType": "set", "values": ["fruit"]}}).total == 2
    assert query(filters={"lists": {"filterType": "text", "type": "blank"}}).total == 38
    assert query(filters={"label": {"filterType": "text", "type": "notBlank"}}).total == 2
    assert query(filters={"notes": {"filterType": "text", "type": "contains", "filter": "AGAIN"}}).total == 1
    assert query(sort=[("label", False)]).rows["feature"].tolist()[:2] == [8, 3]
    assert query(sort=[("starred", False), ("feature", False)]).rows["feature"].tolist()[:2] == [3, 39]
    assert query(sort=[("label_source", False), ("feature", True)]).rows["feature"].tolist()[:3] == [3, 8, 0]
    labels.set(3, text="")
    assert query(text="zebra").total == 0
    with pytest.raises(InvalidInputError, match="lists"):
        query(sort=[("lists", True)])
    assert "label" not in labelled.table


def test_a_whole_document(built):
    index, store, dense = built
    feature = int(index.table["n_firings"].idxmax())
    for document in range(10):
        found = index.document_values(feature, document)
        rows = index.document_rows(document)
        assert found["row"].tolist() == rows.tolist()
        assert np.array_equal(found["value"], dense[rows, feature])
        assert not (store.columns["flags"][rows] & RowFlag.BOS).any()
        within = index.examples_in(feature, 1000, document=document, distinct=False, per_sequence=1000)
        assert sorted(example.row for example in within) == rows[dense[rows, feature] != 0].tolist()
        assert index.examples_in(feature, document=document, language="xx" if document < 0 else "ar") == () or (
            index.documents["language"][document] == "ar"
        )
    with pytest.raises(OutOfRangeError):
        index.examples_in(feature, document=10)
    with pytest.raises(OutOfRangeError):
        index.document_values(feature, 10)


def test_an_index_without_a_map_has_none(built):
    assert built[0].umap() is None


def test_files_can_be_released(built):
    index = built[0]
    before = index.features_at(5)
    index.release()
    assert index.features_at(5).equals(before)


def test_bench_index(tmp_path):
    arguments = ["bench", "index", "--tokens", "12000", "--d-sae", "64", "--l0", "4", "--queries", "2"]
    arguments += ["--cold-queries", "1", "--folder", str(tmp_path)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "bytes per firing" in told.stdout
    assert "cold p95" in told.stdout
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert "Using" in again.stderr
    figures = json.loads(again.stdout.splitlines()[-1])
    names = "top_examples quantile histogram token document a_not_b cofiring neighbours search_token search_label"
    assert list(figures) == [f"{name}_p95_ms" for name in names.split()]
    assert all(value > 0 for value in figures.values())
    index = FeatureIndex.open(tmp_path / "synthetic-12000-64-4.index")
    assert index.n_rows == 12_000
    assert index.verify() == []
    assert 3.9 < index.n_firings / index.n_indexed_rows <= 4
    assert index.query().rows["n_firings"].max() > 5 * index.query().rows["n_firings"].median()


def test_bench_index_refuses_sizes():
    for flags in (["--tokens", "5"], ["--l0", "60", "--d-sae", "64"], ["--queries", "0"]):
        assert CliRunner().invoke(app, ["bench", "index", *flags]).exit_code == 2
