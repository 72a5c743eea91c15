"""Building: checks before compute, resuming, segments, digests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_features import BOS, FakeModel, FakeStore, WideSAE, small_sae, tiny_index

from scope.errors import (
    IntegrityError,
    InterruptedRunError,
    InvalidInputError,
    LockedError,
    MismatchError,
    NonFiniteError,
    OccupiedError,
    UnknownNameError,
)
from scope.features import FeatureIndex, build_index, segments


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quick(store, sae, out, **options):
    return build_index(store, sae, out, model=store.model, **{"batch_size": 50, "segment_firings": 300, **options})


def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path):
    whole, store, sae = tiny_index(tmp_path, metrics=None)
    out = tmp_path / "again.index"
    for stop in (60, 260, 330):
        store.fail_at = stop
        with pytest.raises(InterruptedRunError, match=r"rows are committed; run the same again"):
            quick(store, sae, out)
        with pytest.raises(InvalidInputError, match="half built"):
            FeatureIndex.open(out)
    store.fail_at = None
    again = quick(store, sae, out)
    assert again.fingerprint == whole.fingerprint
    assert files(out) == files(whole.path)


@pytest.mark.parametrize("where", ["_append", "write_atomically"])
def test_a_crash_while_a_segment_is_written(tmp_path, monkeypatch, where):
    whole, store, sae = tiny_index(tmp_path, metrics=None)
    original, calls = getattr(segments, where), []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == (12 if where == "_append" else 2):
            original(*arguments) if where == "_append" else None
            raise RuntimeError("killed")
        return original(*arguments)

    monkeypatch.setattr(segments, where, dies)
    with pytest.raises(RuntimeError, match="killed"):
        quick(store, sae, tmp_path / "again.index")
    monkeypatch.undo()
    quick(store, sae, tmp_path / "again.index")
    assert files(tmp_path / "again.index") == files(whole.path)


@pytest.mark.parametrize("where", ["finish._write_digests", "finish.write_manifest", "finish.cofiring_features"])
def test_a_crash_while_finishing(tmp_path, monkeypatch, where):
    whole, store, sae = tiny_index(tmp_path, metrics=None)

    def dies(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(f"scope.features.{where}", dies)
    with pytest.raises(RuntimeError, match="killed"):
        quick(store, sae, tmp_path / "again.index")
    monkeypatch.undo()
    store.fail_at = 0  # nothing is encoded again
    quick(store, sae, tmp_path / "again.index")
    assert files(tmp_path / "again.index") == files(whole.path)


def test_segments_do_not_change_the_result(tmp_path):
    one, store, sae = tiny_index(tmp_path, metrics=None, segment_firings=10**6)
    many = quick(store, sae, tmp_path / "many.index", segment_firings=1, batch_size=50)
    assert files(many.path) == files(one.path)
    assert not (many.path / "build").exists()


def test_a_complete_index_is_taken_as_it_is(tmp_path):
    index, store, sae = tiny_index(tmp_path)
    before = files(index.path)
    store.fail_at = 0
    again = quick(store, sae, index.path)
    assert again.id == index.id
    assert files(index.path) == before


def test_progress_reaches_its_end(tmp_path):
    calls = []
    tiny_index(tmp_path, progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert len({call[1] for call in calls}) == 1
    assert done[0] == 0
    assert calls[-1][0] == calls[-1][1]


def test_refuses_a_folder_with_something_else(tmp_path):
    store, sae = FakeStore(FakeModel()), small_sae()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OccupiedError, match="no index"):
        quick(store, sae, tmp_path / "mine")
    (tmp_path / "project" / "build").mkdir(parents=True)
    (tmp_path / "project" / "build" / "precious.o").write_text("mine")
    with pytest.raises(OccupiedError):
        quick(store, sae, tmp_path / "project")
    assert (tmp_path / "project" / "build" / "precious.o").exists()


def test_refuses_another_index(tmp_path):
    index, store, _ = tiny_index(tmp_path)
    with pytest.raises(OccupiedError, match="another index"):
        quick(store, small_sae(seed=1), index.path)
    store.fail_at = 60
    with pytest.raises(InterruptedRunError):
        quick(store, small_sae(), tmp_path / "half.index")
    with pytest.raises(OccupiedError, match="half built: another sae"):
        quick(store, small_sae(seed=1), tmp_path / "half.index")


def test_one_writer(tmp_path):
    from activations.ledger import WriterLock

    store, sae = FakeStore(FakeModel()), small_sae()
    store.fail_at = 60
    with pytest.raises(InterruptedRunError):
        quick(store, sae, tmp_path / "a.index")
    with WriterLock(tmp_path / "a.index" / "build"), pytest.raises(LockedError):
        quick(store, sae, tmp_path / "a.index")


def test_checks_come_before_anything_is_written(tmp_path):
    store, out = FakeStore(FakeModel()), tmp_path / "out.index"
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.hook_resid_post"):
        quick(store, small_sae(hook_name="blocks.1.hook_resid_pos"), out)
    with pytest.raises(UnknownNameError):
        quick(store, small_sae(hook_name=None), out)
    store.hook_shape = lambda name: (3, 5)
    with pytest.raises(MismatchError, match="width 12"):
        quick(store, small_sae(), out)
    del store.hook_shape
    with pytest.raises(MismatchError, match="model weights of the SAE"):
        quick(store, small_sae(weight_hash="others"), out)
    with pytest.raises(MismatchError, match="tokenizer of the SAE"):
        quick(store, small_sae(tokenizer_hash="others"), out)
    with pytest.raises(MismatchError, match="of the model"):
        build_index(store, small_sae(), out, model=FakeModel(weight_hash="others"))
    with pytest.raises(InvalidInputError, match="batch_size"):
        quick(store, small_sae(), out, batch_size=0)
    assert not out.exists()


def test_an_allowed_mismatch_is_recorded(tmp_path):
    store = FakeStore(FakeModel())
    index = quick(store, small_sae(weight_hash="others"), tmp_path / "a.index", allow_mismatch=True)
    assert index.info()["allowed_mismatches"] == ["model weights of the SAE"]


def test_an_sae_without_hashes_only_warns(tmp_path):
    store = FakeStore(FakeModel())
    with pytest.warns(UserWarning, match="does not record which model"):
        quick(store, small_sae(weight_hash=None, tokenizer_hash=None), tmp_path / "a.index")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stops_the_build(tmp_path, value):
    store = FakeStore(FakeModel())
    row = int(np.flatnonzero(store.columns["flags"] != BOS)[200])
    store.x[row, 3] = value
    with pytest.raises(NonFiniteError, match=rf"blocks\.1\.hook_resid_post, row {row:,}, in document \d+ \('") as error:
        quick(store, WideSAE(30), tmp_path / "a.index")
    document = int(store.sequences()["document"][store.columns["sequence"][row]])
    assert f"document {document} " in str(error.value)


def test_an_index_without_model_shows_ids(tmp_path):
    store = FakeStore(FakeModel())
    index = build_index(store, small_sae(), tmp_path / "a.index")
    assert index.tokens(0, 1)["token"].tolist() == ["<1>"]
    assert index.top_logits(3).empty
    assert index.manifest["has_strings"] is False


def test_an_sae_that_never_fires(tmp_path):
    sae = small_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    index = quick(FakeStore(FakeModel()), sae, tmp_path / "a.index")
    assert index.n_firings == 0
    assert index.table["dead"].all()
    assert index.features_in(0, 50).empty
    assert index.verify() == []


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("by_token/value.bfloat16", lambda index: index.features_at(70)),
        ("by_token/feature.uint16", lambda index: index.features_in(0, 400)),
        ("rows/token_id.int32", lambda index: index.tokens(0, 10)),
        ("statistics/histogram.uint32", lambda index: index.histogram(3)),
        ("by_feature/firings.zarr/row/c.0", lambda index: index.firings(0)),
        ("by_feature/firings.zarr/value/c.0", lambda index: index.firings(39)),
        ("tables/features.parquet", lambda index: index.table),
        ("tables/documents.parquet", lambda index: index.documents),
    ],
)
def test_a_flipped_bit_is_found(tmp_path, name, read):
    index, _, _ = tiny_index(tmp_path)
    assert index.verify() == []
    damage(index.path / name, 40)
    with pytest.raises(IntegrityError):
        read(FeatureIndex.open(index.path))
    assert [fault.object for fault in index.verify()] == [name]


def test_missing_and_shortened_files_are_found_on_opening(tmp_path):
    index, _, _ = tiny_index(tmp_path)
    path = index.path / "by_token" / "value.bfloat16"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(IntegrityError, match="bytes"):
        FeatureIndex.open(index.path)
    assert index.verify()[0].problem.startswith("it has")
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        FeatureIndex.open(index.path)
    assert index.verify()[0].problem == "the file is missing"
    path.write_bytes(content)
    damage(index.path / "digests.json", 30)
    with pytest.raises(IntegrityError):
        FeatureIndex.open(index.path)


def test_a_damaged_segment_is_found_when_the_build_ends(tmp_path):
    store, sae, out = FakeStore(FakeModel()), small_sae(), tmp_path / "a.index"
    store.fail_at = 330
    with pytest.raises(InterruptedRunError):
        quick(store, sae, out)
    damage(out / "build" / "000000.run.uint64", 9)
    store.fail_at = None
    with pytest.raises(IntegrityError, match="build the index again"):
        quick(store, sae, out)


def test_opening_what_is_no_index(tmp_path):
    with pytest.raises(UnknownNameError):
        FeatureIndex.open(tmp_path / "nothing.index")
    index, _, _ = tiny_index(tmp_path)
    manifest = json.loads((index.path / "manifest.json").read_text())
    (index.path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(InvalidInputError, match="version 99"):
        FeatureIndex.open(index.path)
