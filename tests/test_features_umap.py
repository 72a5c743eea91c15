"""The map of the decoder: stored in the index, taken over when it grows, and refused where umap-learn is missing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_features import FakeModel, GrowingStore, small_sae, tiny_index
from test_cli import scope
from test_features_grow import contents

from activations.locks import WriterLock
from scope.errors import InvalidInputError, LockedError, MismatchError
from scope.features import FeatureIndex, build_index, decoder_map
from scope.features.decoder_map import add_umap, decoder_umap


class FakeUMAP:
    """Puts features where their first two coordinates are, and remembers how it was asked."""

    asked: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, **settings: object) -> None:
        FakeUMAP.asked = settings

    def fit_transform(self, rows: np.ndarray) -> np.ndarray:
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=0.5)
        return rows[:, :2].astype(np.float64)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FakeUMAP, __spec__=SimpleNamespace()))


def test_the_map_is_part_of_the_index(tmp_path, fake):
    index, _, sae = tiny_index(tmp_path)
    before = contents(index)
    mapped = add_umap(index.path, sae, seed=3)
    assert FakeUMAP.asked["metric"] == "cosine"
    assert FakeUMAP.asked["random_state"] == 3
    table = mapped._reader.table("umap")
    assert list(table) == ["feature", "umap_x", "umap_y"]
    assert table["feature"].tolist() == list(range(index.d_sae))
    rows = sae.W_dec.detach().numpy()
    assert np.allclose(table[["umap_x", "umap_y"]], (rows / np.linalg.norm(rows, axis=1, keepdims=True))[:, :2])
    assert mapped.verify() == []
    after = contents(mapped)
    assert set(after) - set(before) == {"tables/umap.parquet"}
    assert {name for name in before if before[name] != after[name]} == {"digests.json"}
    again = add_umap(index.path, sae, seed=4)
    assert contents(again) == after
    (index.path / "tables" / "umap.parquet").write_bytes(b"damaged")
    assert [fault.object for fault in mapped.verify()] == ["tables/umap.parquet"]


def test_a_map_is_taken_over_when_the_index_grows(tmp_path, fake):
    store, sae = GrowingStore(FakeModel(), 300, repeats=3), small_sae()
    index = add_umap(build_index(store, sae, tmp_path / "a.index", model=store.model).path, sae)
    table = index._reader.table("umap")
    store.rows_so_far = store.whole
    grown = build_index(store, sae, tmp_path / "a.index", model=store.model)
    assert grown.n_rows == store.whole
    assert grown.verify() == []
    assert grown._reader.table("umap").equals(table)
    assert contents(add_umap(grown.path, sae)) == contents(grown)


def test_a_crash_before_the_map_is_recorded(tmp_path, fake, monkeypatch):
    index, _, sae = tiny_index(tmp_path)

    def dies(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(decoder_map, "write_digests", dies)
        with pytest.raises(RuntimeError, match="killed"):
            add_umap(index.path, sae)
    assert FeatureIndex.open(index.path).verify() == []
    assert add_umap(index.path, sae).verify() == []


def test_what_is_refused(tmp_path, fake, monkeypatch):
    index, _, sae = tiny_index(tmp_path)
    with pytest.raises(MismatchError, match="the one given is"):
        add_umap(index.path, small_sae(seed=1))
    with pytest.raises(InvalidInputError, match="4 or more"):
        decoder_umap(np.eye(3))
    (index.path / "build").mkdir()
    with WriterLock(index.path / "build"), pytest.raises(LockedError):
        add_umap(index.path, sae)
    (index.path / "build").rmdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"scope-workbench\[umap\]"):
        add_umap(index.path, sae)
    assert "umap-learn" in scope("index", "s", "a", "--out", "o", "--umap", "--json", code=2)["error"]["message"]
    assert FeatureIndex.open(index.path).verify() == []


def test_rows_of_zeros_have_a_place(fake):
    rows = np.eye(8)
    rows[3] = 0
    assert np.isfinite(decoder_umap(rows)).all()


def test_umap_itself_puts_like_features_together():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 24))
    group = np.repeat(np.arange(4), 15)
    rows = (centres[group] + 0.1 * rng.normal(size=(60, 24))) * rng.uniform(0.1, 10, (60, 1))
    places = decoder_umap(rows)
    assert np.array_equal(places, decoder_umap(rows)), "the same seed gives the same map"
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    assert (group[apart.argmin(axis=1)] == group).all()
