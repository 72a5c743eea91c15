"""The parts that an index stands on: packed firings, merged runs, compressed lists, checked arrays."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from activations.source import bf16_to_float32, float32_to_bf16
from scope.errors import IntegrityError, InvalidInputError
from scope.features import lists
from scope.features.digests import BLOCK, CheckedArray, digest_file
from scope.features.firings import from_order_key, order_key, pack, sort_rows, unpack
from scope.features.lists import CHUNK, ListReader, ListWriter
from scope.features.merge import merge_runs, open_runs
from scope.features.segments import SegmentLog
from scope.features.statistics import entropy_bits, wilson


@given(hnp.arrays(np.float32, st.integers(2, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=50, deadline=None)
def test_order_keys_sort_as_numbers_do_backwards(values):
    bits = float32_to_bf16(values)
    rounded = bf16_to_float32(bits)
    assert np.array_equal(from_order_key(order_key(bits)), bits)
    order = np.argsort(order_key(bits), kind="stable")
    assert (np.diff(rounded[order]) <= 0).all()


def test_packing_is_reversible():
    rng = np.random.default_rng(0)
    features, rows = rng.integers(0, 2**20, 1000), rng.integers(0, 2**28, 1000)
    bits = float32_to_bf16(rng.normal(size=1000).astype(np.float32))
    back = unpack(pack(features, bits, rows, 28), 28)
    assert np.array_equal(back.features, features)
    assert np.array_equal(back.values, bits)
    assert np.array_equal(back.rows, rows)


def test_an_id_that_is_no_feature():
    ids, values = np.array([[1, 50]]), float32_to_bf16(np.array([[1.0, 2.0]], np.float32))
    with pytest.raises(InvalidInputError, match="0 to 49"):
        sort_rows(ids, values, 50)
    assert sort_rows(np.array([[1, 50]]), float32_to_bf16(np.array([[1.0, 0.0]], np.float32)), 50).features == [1]


@pytest.mark.parametrize(("budget", "d_sae"), [(1, 20), (5, 20), (64, 20), (10**6, 20), (64, 200_000)])
def test_merging_sorts_by_feature_strength_and_row(tmp_path, budget, d_sae):
    rng = np.random.default_rng(budget)
    log, expected = SegmentLog(tmp_path, d_sae), []
    for _ in range(5):
        n, start = int(rng.integers(1, 60)), log.n_rows
        ids = np.stack([rng.choice(d_sae, 6, replace=False) for _ in range(n)])
        ids[:, 0] = np.where((ids == 3).any(axis=1), ids[:, 0], 3)  # feature 3 fires nearly everywhere
        values = rng.integers(-2, 4, (n, 6)).astype(np.float32)  # many equal ones, and zeros
        columns = {name: np.zeros(n) for name in ("token_id", "sequence", "position", "flags")}
        log.commit(sort_rows(ids, float32_to_bf16(values), d_sae), columns, n)
        expected += [
            (int(ids[i, j]), -float(values[i, j]), start + i) for i, j in zip(*np.nonzero(values), strict=True)
        ]
    again = SegmentLog(tmp_path, d_sae)
    assert again.segments == log.segments
    runs = open_runs(again.segments, [again.run_path(segment.number) for segment in again.segments], d_sae)
    found, complete = [], {}
    for piece in merge_runs(runs, d_sae, again.n_rows, budget):
        assert piece.start == len(found)
        assert 0 < len(piece.rows) <= budget
        values = bf16_to_float32(piece.values)
        found += [(int(f), -float(v), int(r)) for f, v, r in zip(piece.features, values, piece.rows, strict=True)]
        complete[int(piece.features[-1])] = piece.complete
    assert found == sorted(expected)
    assert all(complete.values())


@pytest.mark.parametrize("n", [0, 1, CHUNK, 3 * CHUNK + 17])
def test_lists_are_zarr_arrays(tmp_path, monkeypatch, n):
    monkeypatch.setattr(lists, "SHARD", 2 * CHUNK)
    monkeypatch.setattr(lists, "_INDEX_BYTES", 2 * 16)
    values = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    writer = ListWriter(tmp_path / "list", "uint32")
    for start in range(0, n, 50_001):
        writer.append(values[start : start + 50_001])
    writer.close()
    reader = ListReader(tmp_path / "list", "uint32")
    assert len(reader) == n
    assert np.array_equal(reader.read(0, n), values)
    assert np.array_equal(zarr.open_array(tmp_path / "list", mode="r")[:], values)
    assert not list((tmp_path / "list").glob("*.part"))
    if n > CHUNK:
        assert np.array_equal(reader.read(CHUNK - 5, 2 * CHUNK + 5), values[CHUNK - 5 : 2 * CHUNK + 5])
        places = np.array([n - 1, 0, CHUNK, 0, 5])
        assert np.array_equal(reader.take(places), values[places])
    with pytest.raises(IntegrityError):
        ListReader(tmp_path / "list", "uint16")


def test_a_damaged_list(tmp_path):
    writer = ListWriter(tmp_path / "list", "uint16")
    writer.append(np.arange(100))
    writer.close()
    shard = tmp_path / "list" / "c.0"
    for at in (3, len(shard.read_bytes()) - 1, len(shard.read_bytes()) - 100):
        content = bytearray(shard.read_bytes())
        content[at] ^= 4
        shard.write_bytes(content)
        with pytest.raises(IntegrityError, match="damaged"):
            ListReader(tmp_path / "list", "uint16").read(0, 10)
        content[at] ^= 4
        shard.write_bytes(content)
    shard.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        ListReader(tmp_path / "list", "uint16").read(0, 10)


def test_checked_arrays_check_only_what_they_touch(tmp_path):
    values = np.arange(3 * BLOCK // 8 + 5).reshape(-1, 1)
    path = tmp_path / "values.int64"
    values.tofile(path)
    entry = digest_file(path)
    assert len(entry["blocks"]) == 4
    with open(path, "r+b") as file:
        file.seek(BLOCK + 8)
        file.write(b"\xff")
    array = CheckedArray(path, np.dtype("int64"), values.shape, entry)
    assert np.array_equal(array.slice(0, BLOCK // 8), values[: BLOCK // 8])
    assert np.array_equal(array.take(np.array([5, 2 * BLOCK // 8 + 3])), values[[5, 2 * BLOCK // 8 + 3]])
    with pytest.raises(IntegrityError, match="1,048,576"):
        array.slice(BLOCK // 8, BLOCK // 8 + 1)
    with pytest.raises(IntegrityError):
        array.take(np.array([BLOCK // 8 + 2]))


def test_wilson():
    # Agresti & Coull 1998, table 1: 0 of 10 and 5 of 10 at 95%.
    low, high = wilson(np.array([0, 5, 10]), 10)
    assert low.tolist() == pytest.approx([0, 0.2366, 0.7225], abs=1e-4)
    assert high.tolist() == pytest.approx([0.2775, 0.7634, 1], abs=1e-4)
    assert [float(bound) for bound in wilson(np.array(0), 0)] == [0, 1]


def test_entropy():
    assert entropy_bits(np.array([[1, 1, 1, 1], [5, 0, 0, 0]])).tolist() == [2, 0]
    assert np.isnan(entropy_bits(np.zeros((1, 3)))).all()
