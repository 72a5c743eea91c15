"""Exports: opened by the libraries whose formats they are, they hold what the store holds; halves look like halves."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xxhash
from helpers_activations import FakeModel, write_text

from activations.capture import capture
from activations.errors import IntegrityError, InvalidInputError, NonFiniteError, OccupiedError, UnknownNameError
from activations.export import export_store
from activations.source import RowFlag, bf16_to_float32
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
FORMATS = ("safetensors", "npy", "hf-dataset")
FILE_BYTES = 8000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("activations.export_files.PIECE_BYTES", 900)  # several pieces a file


def made(folder: Path, dtype: Any = "bfloat16") -> ActivationStore:
    text = TextSource(write_text(folder / "text.jsonl", n_documents=10))
    settings: dict[str, Any] = {"context_size": 16, "rows_per_group": 64, "batch_size": 64, "dtype": dtype}
    return capture(FakeModel(), text, [RESID, Z], folder / "s.zarr", **settings).store


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return made(tmp_path)


def check_provenance(store: ActivationStore, out: Path) -> list[dict[str, Any]]:
    """`export.json` names the store and every file, with digests that are right."""
    facts = json.loads((out / "export.json").read_text())
    assert facts["store"]["fingerprint"] == store.fingerprint
    assert facts["store"]["spec"]["model"] == "fake"
    assert facts["rows"] == store.n_rows
    assert facts["complete"]
    assert facts["flags"]["BOS"] == RowFlag.BOS
    for file in facts["files"]:
        content = (out / file["name"]).read_bytes()
        assert len(content) == file["bytes"] < 3 * FILE_BYTES
        assert xxhash.xxh3_128_hexdigest(content) == file["xxh3_128"]
    written = {path.relative_to(out).as_posix() for path in (out / "data").rglob("*") if path.is_file()}
    assert written == {file["name"] for file in facts["files"]}
    for table in ("sequences", "documents"):
        pd.testing.assert_frame_equal(pd.read_parquet(out / f"{table}.parquet"), getattr(store, table)())
    assert not out.with_name(out.name + ".partial").exists()
    return facts["files"]


def test_safetensors(store: ActivationStore, tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    report = export_store(store, tmp_path / "out", "safetensors", file_bytes=FILE_BYTES)
    files = check_provenance(store, tmp_path / "out")
    assert report.files == len(files) > 2
    for file in files:
        start, stop = file["rows"]
        with safe_open(tmp_path / "out" / file["name"], "pt") as opened:
            names = set(opened.keys())
            assert names == {"token_id", "sequence", "position", "flags", RESID, Z, f"norm/{RESID}", f"norm/{Z}"}
            for hook in (RESID, Z):
                tensor = opened.get_tensor(hook)
                assert tensor.dtype == torch.bfloat16
                np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), store.read(hook, start, stop))
                np.testing.assert_array_equal(opened.get_tensor(f"norm/{hook}"), store.norms(hook, start, stop))
            for column, values in store.rows(start, stop)._asdict().items():
                np.testing.assert_array_equal(opened.get_tensor(column), values)
    assert [file["rows"] for file in files][-1][1] == store.n_rows


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_npy(store: ActivationStore, tmp_path: Path, dtype: Any) -> None:
    export_store(store, tmp_path / "out", "npy", [Z], dtype=dtype, file_bytes=FILE_BYTES)
    files = check_provenance(store, tmp_path / "out")
    assert {Path(file["name"]).parent.as_posix() for file in files} == {
        f"data/{name}" for name in ("token_id", "sequence", "position", "flags", Z, f"norm/{Z}")
    }
    pieces = [np.load(path) for path in sorted((tmp_path / "out" / "data" / Z).glob("*.npy"))]
    values, stored = np.concatenate(pieces), store.read(Z, 0, store.n_rows)
    if dtype == "bfloat16":
        np.testing.assert_array_equal(values, stored)
        return
    assert values.dtype == (dtype or "float32")
    np.testing.assert_array_equal(values, bf16_to_float32(stored).astype(dtype or "float32"))
    tokens = np.concatenate([np.load(p) for p in sorted((tmp_path / "out" / "data" / "token_id").glob("*.npy"))])
    np.testing.assert_array_equal(tokens, store.rows(0, store.n_rows).token_id)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_hf_dataset(store: ActivationStore, tmp_path: Path, dtype: Any) -> None:
    from datasets import load_dataset

    out = tmp_path / "out"
    export_store(store, out, "hf-dataset", dtype=dtype, file_bytes=FILE_BYTES)
    check_provenance(store, out)
    rows = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    same = load_dataset(
        "parquet", data_files=str(out / "data" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.num_rows == same.num_rows == store.n_rows
    for hook in (RESID, Z):
        values = rows[hook][:]
        assert values.shape == (store.n_rows, *store.hook_shape(hook))
        expected = store.read_float32(hook, 0, store.n_rows).astype(dtype or "float32")
        np.testing.assert_array_equal(values, expected)  # whose dtype datasets makes float32
        np.testing.assert_array_equal(rows[f"norm/{hook}"][:], store.norms(hook, 0, store.n_rows))
    assert rows.features[RESID].feature.dtype == (dtype or "float32")
    for column, expected in store.rows(0, store.n_rows)._asdict().items():
        np.testing.assert_array_equal(rows[column][:], expected)


def test_float32_stores_round_to_bfloat16_as_torch_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    store = made(tmp_path, "float32")
    export_store(store, tmp_path / "out", "safetensors", [RESID], dtype="bfloat16")
    (path,) = (tmp_path / "out" / "data").iterdir()
    expected = torch.from_numpy(store.read(RESID, 0, store.n_rows)).bfloat16()
    assert torch.equal(load_file(path)[RESID], expected)


def test_too_large_for_float16_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    class Large(FakeModel):
        def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
            rows = super().rows_at(hook, window)
            rows[window == ord("~") + 3] = 70_000
            return rows

    text = TextSource(write_text(tmp_path / "text.jsonl", n_documents=10))
    store = capture(Large(), text, [RESID], tmp_path / "s.zarr", context_size=16, batch_size=64).store
    first = int(np.argmax(store.rows(0, store.n_rows).token_id == ord("~") + 3))
    with pytest.raises(NonFiniteError, match=rf"{RESID} has a value too large for float16 at row {first}\."):
        export_store(store, tmp_path / "out", "npy", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_export_does_not_look_whole(store: ActivationStore, tmp_path: Path, format: Any) -> None:
    out, calls = tmp_path / "out", [0]

    def stop(done: int, total: int | None) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_store(store, out, format, file_bytes=FILE_BYTES, progress=stop)
    assert not out.exists()
    assert not list(tmp_path.rglob("export.json"))
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "out.partial" / "data").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "out.partial" / "export.partial").touch()
    (tmp_path / "out.partial" / "data" / "half").touch()
    out.mkdir()
    export_store(store, out, format, file_bytes=FILE_BYTES)
    check_provenance(store, out)


def test_damage_stops_an_export(store: ActivationStore, tmp_path: Path) -> None:
    shard = store.path / "hooks" / RESID / "c.1.0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 4
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"hooks/{RESID}, rows"):
        export_store(store, tmp_path / "out", "npy")
    assert not (tmp_path / "out").exists()


def test_what_is_refused_writes_nothing(store: ActivationStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UnknownNameError, "Did you mean safetensors", {"format": "safetensor"}),
        (UnknownNameError, f"Did you mean {RESID}", {"hooks": [RESID + "s"]}),
        (InvalidInputError, "dtype is 'int8'", {"dtype": "int8"}),
        (InvalidInputError, "Arrow has no bfloat16", {"format": "hf-dataset", "dtype": "bfloat16"}),
        (InvalidInputError, "file_bytes is 0", {"file_bytes": 0}),
    ]
    for error, match, changes in cases:
        with pytest.raises(error, match=match):
            export_store(store, out, **{"format": "npy", **changes})
    assert not out.exists()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(OccupiedError, match="no export that was interrupted"):
        export_store(store, out, "npy")
    with pytest.raises(OccupiedError, match="is there already"):
        export_store(store, tmp_path / "out.partial", "npy")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["mine"]
