"""An index grows with its store to what a fresh build gives; many SAEs are built in one pass as each is alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_features import FakeModel, FakeStore, GrowingStore, WideSAE, dense_strengths, small_sae

from scope.errors import IntegrityError, InterruptedRunError, InvalidInputError, MismatchError, OccupiedError
from scope.features import FeatureIndex, build_index, build_indexes

OPTIONS = {"batch_size": 50, "segment_firings": 300}
DERIVED = ("by_feature", "statistics", "tables", "digests.json")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def build(store, sae, out, **options):
    return build_index(store, sae, out, model=store.model, **{**OPTIONS, **options})


def contents(index: FeatureIndex) -> dict[str, object]:
    """Every file of an index by its name, wherever it lies, and the manifest without saying where."""
    derived = index.manifest.get("derived", "")
    found: dict[str, object] = {}
    for path in index.path.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            name = path.relative_to(index.path).as_posix()
            found[name.removeprefix(f"{derived}/") if derived else name] = path.read_bytes()
    manifest = json.loads((index.path / "manifest.json").read_text())
    return found | {"manifest": {k: v for k, v in manifest.items() if k not in ("derived", "xxh3_128")}}


def same(a: FeatureIndex, b: FeatureIndex) -> None:
    one, other = contents(a), contents(b)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("topk", (300,)), ("topk", (51, 130, 131)), ("topk", (1, 2)), ("wide", (250,)), ("signed", (51, 400))],
)
def test_growing_gives_what_a_fresh_build_gives(tmp_path, kind, steps):
    store = GrowingStore(FakeModel(), steps[0], repeats=3)
    sae = small_sae() if kind == "topk" else WideSAE(60, signed=kind == "signed")
    for rows in (*steps, store.whole):
        store.rows_so_far = rows
        # A budget that a single feature passes, so that old lists are cut by strength too.
        grown = build(store, sae, tmp_path / "grown.index", segment_firings=30)
        assert grown.n_rows == rows
        assert grown.verify() == []
    same(grown, build(store, sae, tmp_path / "fresh.index"))
    pd.testing.assert_frame_equal(grown.table, FeatureIndex.open(tmp_path / "fresh.index").table)
    expected = dense_strengths(store, sae)
    rows, features = np.nonzero(expected)
    found = grown.features_in(0, grown.n_rows).sort_values(["row", "feature"])
    assert np.array_equal(found["row"], rows)
    assert np.array_equal(found["feature"], features)
    assert np.array_equal(found["value"], expected[rows, features])
    for feature in range(0, grown.d_sae, 7):
        assert np.array_equal(np.sort(grown.firings(feature)["row"]), np.flatnonzero(expected[:, feature]))


def test_only_new_rows_are_encoded(tmp_path):
    store, sae = GrowingStore(FakeModel(), 260, repeats=3), small_sae()
    build(store, sae, tmp_path / "a.index")
    asked = []
    batches = store.batches
    store.batches = lambda hooks, size, start=0: asked.append(start) or batches(hooks, size, start)
    store.rows_so_far = store.whole
    build(store, sae, tmp_path / "a.index")
    assert asked == [250], "from the block that holds the first new row"


def test_a_crash_while_it_grows_leaves_the_old_index(tmp_path, monkeypatch):
    store, sae, out = GrowingStore(FakeModel(), 330, repeats=3), small_sae(), tmp_path / "a.index"
    old = build(store, sae, out)
    table, firings = old.table.copy(), old.firings(3)
    store.rows_so_far = store.whole

    def still_there():
        opened = FeatureIndex.open(out)
        assert opened.fingerprint == old.fingerprint
        assert opened.verify() == []
        pd.testing.assert_frame_equal(opened.table, table)
        pd.testing.assert_frame_equal(opened.firings(3), firings)
        assert len(opened.tokens(0, opened.n_rows)) == 330
        assert opened.features_in(329, 330).equals(old.features_in(329, 330))

    store.fail_at = 450
    with pytest.raises(InterruptedRunError, match="450 rows are committed"):
        build(store, sae, out)
    assert (out / "rows" / "flags.uint8").stat().st_size == 450
    still_there()
    store.fail_at = None
    for where in ("cofiring_features", "_write_digests", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(f"scope.features.finish.{where}", _dies)
            with pytest.raises(RuntimeError, match="killed"):
                build(store, sae, out)
        still_there()
    with monkeypatch.context() as patch:
        patch.setattr("scope.features.build.clear_leftovers", _dies)
        with pytest.raises(RuntimeError, match="killed"):
            build(store, sae, out)
    assert FeatureIndex.open(out).n_rows == store.whole
    assert (out / "build").exists()
    same(build(store, sae, out), build(store, sae, tmp_path / "fresh.index"))


def _dies(*_, **__):
    raise RuntimeError("killed")


def test_a_crash_after_the_switch_and_then_growth(tmp_path, monkeypatch):
    store, sae, out = GrowingStore(FakeModel(), 130, repeats=3), small_sae(), tmp_path / "a.index"
    build(store, sae, out)
    store.rows_so_far = 330
    with monkeypatch.context() as patch:
        patch.setattr("scope.features.build.clear_leftovers", _dies)
        with pytest.raises(RuntimeError, match="killed"):
            build(store, sae, out)
    store.rows_so_far = store.whole
    grown = build(store, sae, out)
    same(grown, build(store, sae, tmp_path / "fresh.index"))
    assert not (out / "build").exists()
    assert len(list(out.glob("grown-*"))) == 1
    assert not any((out / part).exists() for part in DERIVED)


def test_the_store_grows_while_a_build_is_interrupted(tmp_path):
    store, sae = GrowingStore(FakeModel(), 330, repeats=3), small_sae()
    store.fail_at = 200
    with pytest.raises(InterruptedRunError):
        build(store, sae, tmp_path / "a.index")
    store.fail_at, store.rows_so_far = None, store.whole
    same(build(store, sae, tmp_path / "a.index"), build(store, sae, tmp_path / "fresh.index"))
    store.rows_so_far = 330
    with pytest.raises(OccupiedError, match=r"rows; the store has 330"):
        build(store, sae, tmp_path / "a.index")


def test_who_opened_it_before_it_grew_is_told(tmp_path):
    store, sae = GrowingStore(FakeModel(), 330, repeats=3), small_sae()
    build(store, sae, tmp_path / "a.index")
    old = [FeatureIndex.open(tmp_path / "a.index") for _ in range(3)]
    store.rows_so_far = store.whole
    build(store, sae, tmp_path / "a.index")
    reads = (lambda index: index.table, lambda index: index.top_examples(3), lambda index: index.documents)
    for index, read in zip(old, reads, strict=True):
        with pytest.raises(IntegrityError, match="has grown since it was opened"):
            read(index)
    assert len(old[0].features_in(0, 330)) > 0, "what is appended to is still there"


def test_damage_is_found_before_it_grows(tmp_path):
    store, sae, out = GrowingStore(FakeModel(), 330, repeats=3), small_sae(), tmp_path / "a.index"
    build(store, sae, out)
    path = out / "by_token" / "value.bfloat16"
    content = bytearray(path.read_bytes())
    content[11] ^= 1
    path.write_bytes(content)
    store.rows_so_far = store.whole
    with pytest.raises(IntegrityError, match=r"by_token/value.bfloat16 is damaged"):
        build(store, sae, out)
    assert FeatureIndex.open(out).n_rows == 330


def test_an_index_of_an_earlier_release_does_not_grow(tmp_path):
    store, sae, out = GrowingStore(FakeModel(), 330), small_sae(), tmp_path / "a.index"
    build(store, sae, out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["arrays"]["statistics/special_strength"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    store.rows_so_far = store.whole
    with pytest.raises(OccupiedError, match="earlier release"):
        build(store, sae, out)


def test_a_full_disk_leaves_it_resumable(tmp_path, monkeypatch):
    store, sae, whole = FakeStore(FakeModel()), small_sae(), tmp_path / "whole.index"
    build(store, sae, whole)
    from scope.features import lists, segments

    for number, (module, name, nth) in enumerate(
        [(segments, "_append", 13), (segments, "write_atomically", 2), (lists.ListWriter, "_close_shard", 1)]
    ):
        out, calls, original = tmp_path / f"{number}.index", [], getattr(module, name)

        def full(*arguments, original=original, calls=calls, nth=nth):
            calls.append(1)
            if len(calls) == nth:
                raise OSError(28, os.strerror(28))
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(InterruptedRunError, match="No space left"):
                build(store, sae, out)
        same(build(store, sae, out), FeatureIndex.open(whole))


def test_many_saes_in_one_pass(tmp_path):
    model = FakeModel()
    store = FakeStore(model, repeats=3)
    saes = [small_sae(), small_sae(d_sae=70, k=6, seed=3), WideSAE(50)]
    passes = []
    batches = store.batches
    store.batches = lambda hooks, size, start=0: passes.append(start) or batches(hooks, size, start)
    outs = [tmp_path / f"{number}.index" for number in range(3)]
    calls = []
    together = build_indexes(
        store, saes, outs, model=model, **OPTIONS, progress=lambda done, total: calls.append((done, total))
    )
    assert passes == [0]
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, calls[0][1])
    assert len({total for _, total in calls}) == 1
    for number, (index, sae) in enumerate(zip(together, saes, strict=True)):
        same(index, build(store, sae, tmp_path / f"alone-{number}.index"))


def test_many_saes_are_resumed_where_each_is(tmp_path):
    store = GrowingStore(FakeModel(), 260, repeats=3)
    saes = [small_sae(seed=seed) for seed in range(3)]
    outs = [tmp_path / f"{number}.index" for number in range(3)]
    build(store, saes[0], outs[0])  # is to grow
    store.rows_so_far = store.whole
    store.fail_at = 400
    with pytest.raises(InterruptedRunError):
        build(store, saes[1], outs[1])  # is half built
    store.fail_at = 150
    with pytest.raises(InterruptedRunError, match=r"0\.index, .*2\.index stopped"):
        build_indexes(store, saes, outs, model=store.model, **OPTIONS)
    store.fail_at = None
    for index, sae in zip(build_indexes(store, saes, outs, model=store.model, **OPTIONS), saes, strict=True):
        fresh = build(store, sae, tmp_path / "fresh.index")
        same(index, fresh)
        shutil.rmtree(fresh.path)


def test_many_saes_are_checked_before_any_is_built(tmp_path):
    store = FakeStore(FakeModel())
    outs = [tmp_path / "0.index", tmp_path / "1.index"]
    with pytest.raises(MismatchError, match="model weights"):
        build_indexes(store, [small_sae(), small_sae(weight_hash="others")], outs)
    (tmp_path / "1.index").mkdir()
    (tmp_path / "1.index" / "mine.txt").write_text("mine")
    with pytest.raises(OccupiedError):
        build_indexes(store, [small_sae(), small_sae(seed=1)], outs)
    with pytest.raises(InvalidInputError, match="2 SAEs and 1 folders"):
        build_indexes(store, [small_sae(), small_sae(seed=1)], outs[:1])
    with pytest.raises(InvalidInputError, match="one folder for each"):
        build_indexes(store, [small_sae(), small_sae(seed=1)], [outs[0], outs[0]])
    assert not (Path(outs[0]) / "by_token").exists()
