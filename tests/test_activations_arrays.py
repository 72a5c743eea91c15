"""Shards: zarr reads what we write, and damage is an error."""

import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from activations import arrays
from activations.arrays import ArrayLayout, ObjectRecord, ShardBuffer, pack_shard, read_packed, read_raw, write_object
from activations.errors import IntegrityError
from activations.source import bf16_to_float32, float32_to_bf16


def write_array(folder: Path, layout: ArrayLayout, values: np.ndarray) -> list[ObjectRecord]:
    """A whole array in shards, raw ones filled in a random order."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    buffer = ShardBuffer(layout)
    size = layout.rows_per_group
    for group in range(-(-len(values) // size)):
        rows = values[group * size : (group + 1) * size]
        path = folder / layout.shard_name(group)
        if layout.packed:
            records.append(write_object(path, pack_shard(layout, rows)))
            continue
        order = np.random.default_rng(group).permutation(len(rows))
        for part in np.array_split(order, 3):
            buffer.put(part, rows[part])
        content, crcs = buffer.finish(len(rows))
        records.append(write_object(path, content, crcs))
    (folder / "zarr.json").write_bytes(layout.metadata(len(values)))
    return records


def random_values(layout: ArrayLayout, n_rows: int, seed: int = 0) -> np.ndarray:
    shape = (n_rows, *layout.feature_shape)
    return np.random.default_rng(seed).integers(0, 100, shape).astype(layout.storage_dtype)


LAYOUTS = [
    ArrayLayout((6,), "bfloat16", 16),
    ArrayLayout((2, 3), "float16", 16),
    ArrayLayout((), "float32", 16),
    ArrayLayout((), "int64", 16, packed=True),
    ArrayLayout((), "uint8", 16, packed=True),
    ArrayLayout((), "int32", 1, packed=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dtype}-{layout.packed}")
@pytest.mark.parametrize("n_rows", [1, 16, 35])
def test_zarr_reads_what_was_written(
    layout: ArrayLayout, n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 4 * layout.row_bytes)
    assert layout.rows_per_chunk == min(4, layout.rows_per_group)
    values = random_values(layout, n_rows)
    write_array(tmp_path / "a", layout, values)
    array = zarr.open_array(tmp_path / "a", mode="r")
    assert array.shape == values.shape
    assert array.dtype == layout.storage_dtype
    assert array.attrs["dtype"] == layout.dtype
    assert array.shards == (layout.rows_per_group, *layout.feature_shape)
    assert array.chunks == (layout.rows_per_chunk, *layout.feature_shape)
    np.testing.assert_array_equal(array[:], values)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_zarr_itself_would_write_the_same_rows(layout: ArrayLayout, tmp_path: Path) -> None:
    """What zarr writes with our metadata is read by us, so both agree on the format."""
    values = random_values(layout, 16)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "zarr.json").write_bytes(layout.metadata(16))
    zarr.open_array(tmp_path / "a", mode="r+")[:] = values
    path = tmp_path / "a" / layout.shard_name(0)
    crcs = tuple(
        google_crc32c.value(values[i : i + layout.rows_per_chunk].tobytes())
        for i in range(0, 16, layout.rows_per_chunk)
    )
    out = np.empty_like(values)
    read_raw(path, layout, ObjectRecord(path.stat().st_size, "", crcs), 0, out)
    np.testing.assert_array_equal(out, values)


def test_lost_shards_read_as_nan_in_zarr(tmp_path: Path) -> None:
    layout = ArrayLayout((3,), "bfloat16", 4)
    write_array(tmp_path / "a", layout, random_values(layout, 8))
    (tmp_path / "a" / layout.shard_name(1)).unlink()
    bits = zarr.open_array(tmp_path / "a", mode="r")[4:]
    assert np.isnan(bf16_to_float32(bits)).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n_rows=st.integers(1, 32), chunk=st.sampled_from([1, 2, 8]), packed=st.booleans())
def test_any_rows_come_back(
    data: st.DataObject, n_rows: int, chunk: int, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout = ArrayLayout((3,), "float32", 32, packed=packed)
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", chunk * layout.row_bytes)
        values = random_values(layout, n_rows)
        (record,) = write_array(folder, layout, values)
        path = folder / layout.shard_name(0)
        if packed:
            np.testing.assert_array_equal(read_packed(path, layout, record, n_rows), values)
            return
        start = data.draw(st.integers(0, n_rows))
        stop = data.draw(st.integers(start, n_rows))
        out = np.empty((stop - start, 3), np.float32)
        read_raw(path, layout, record, start, out)
        np.testing.assert_array_equal(out, values[start:stop])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), chunk=st.sampled_from([4, 16, 32]))
def test_rows_go_where_they_are_told(data: st.DataObject, chunk: int) -> None:
    """Pieces that lie side by side, in any order and with gaps, from values of which some are left out."""
    layout = ArrayLayout((3,), "float32", 32)
    cuts = data.draw(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 20)), max_size=4))
    pieces = [np.arange(start, min(32, start + length)) for start, length in cuts]
    rows = np.concatenate([np.empty(0, np.int64), *pieces])
    rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    left_out = data.draw(st.integers(0, 5))
    places = np.sort(np.random.default_rng(0).choice(len(rows) + left_out, len(rows), replace=False))
    values = random_values(layout, len(rows) + left_out)
    expected = np.zeros((32, 3), np.float32)
    expected[rows] = values[places]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", chunk * layout.row_bytes)
        buffer = ShardBuffer(layout)
        buffer.put(rows, values, places)
        np.testing.assert_array_equal(buffer._rows.reshape(32, 3), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_any_flipped_bit_is_found(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ArrayLayout((5,), "float32", 16, packed=packed)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 4 * layout.row_bytes)
    (record,) = write_array(tmp_path, layout, random_values(layout, 16))
    path = tmp_path / layout.shard_name(0)
    good = path.read_bytes()
    stride = layout.chunk_bytes + 4
    for place in np.random.default_rng(0).choice(len(good), 40, replace=False).tolist():
        rotten = bytearray(good)
        rotten[place] ^= 1 << (place % 8)
        path.write_bytes(rotten)
        if packed:
            with pytest.raises(IntegrityError, match="not what was written"):
                read_packed(path, layout, record, 16)
            continue
        out = np.empty((16, 5), np.float32)
        chunk, inside = divmod(place, stride)
        if chunk < 4 and inside < layout.chunk_bytes:
            with pytest.raises(IntegrityError, match=f"inner chunk {chunk} "):
                read_raw(path, layout, record, 0, out)
            assert arrays.damaged_rows(path, layout, record, 16) == [(4 * chunk, 4 * chunk + 4)]
        else:  # a checksum's own bytes, or the index: we compare with the ledger and need neither
            read_raw(path, layout, record, 0, out)
            assert arrays.damaged_rows(path, layout, record, 16) == [(0, 16)]


def test_missing_and_truncated_shards_are_errors(tmp_path: Path) -> None:
    layout = ArrayLayout((5,), "float32", 16)
    (record,) = write_array(tmp_path, layout, random_values(layout, 16))
    path = tmp_path / layout.shard_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="bytes instead of"):
        read_raw(path, layout, record, 0, np.empty((1, 5), np.float32))
    path.unlink()
    with pytest.raises(IntegrityError, match=r"hooks/x, rows 0 to 1.*missing"):
        read_raw(path, layout, record, 0, np.empty((1, 5), np.float32), "hooks/x, rows 0 to 1")


def test_a_failed_write_leaves_the_old_object_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "object"
    write_object(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_object(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_chunks_are_about_a_mebibyte() -> None:
    for width in (1, 640, 2304, 5120, 16384, 10**6):
        layout = ArrayLayout((width,), "bfloat16", 65_536)
        assert layout.rows_per_group % layout.rows_per_chunk == 0
        assert 0.7 * 2**20 <= layout.chunk_bytes <= 1.5 * 2**20 or layout.rows_per_chunk in (1, 65_536)


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.array(
        [0, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x80000000, 1, 0x3F808000, 0x3F818000], np.uint32
    )
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[~np.isnan(values)]
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    ours = float32_to_bf16(values)
    np.testing.assert_array_equal(ours, theirs.view(torch.uint16).numpy())
    np.testing.assert_array_equal(bf16_to_float32(ours), theirs.float().numpy())
    assert np.isnan(bf16_to_float32(float32_to_bf16(np.array([np.nan, -np.nan], np.float32)))).all()
