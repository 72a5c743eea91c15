"""A build holds no more of a long text than of a short one."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from helpers_features import FakeModel, FakeStore, small_sae

from scope.features import build_index


def long_store(n_rows: int) -> FakeStore:
    """A store whose text is one of the fake ones over and over, in windows of 512 rows, 2,048 rows a document."""
    store = FakeStore(FakeModel(), repeats=1)
    places = np.arange(n_rows) % store.n_rows
    columns = {name: column[places] for name, column in store.columns.items()}
    row = np.arange(n_rows)
    columns |= {"sequence": row // 512, "position": row % 512, "flags": (row % 512 == 0).astype(int)}
    store.x, store.columns = store.x[places], columns
    windows = np.arange(-(-n_rows // 512))
    store._sequences = pd.DataFrame(
        {
            "sequence": windows,
            "document": windows // 4,
            "start_row": windows * 512,
            "n_rows": np.minimum(512, n_rows - windows * 512),
            "document_offset": windows % 4 * 511,
        }
    )
    documents = store._documents.iloc[np.arange(windows[-1] // 4 + 1) % len(store._documents)].reset_index(drop=True)
    store._documents = documents.assign(document=np.arange(len(documents)))
    return store


def peak_bytes(folder, n_rows: int) -> int:
    store = long_store(n_rows)
    tracemalloc.start()
    try:
        index = build_index(store, small_sae(), folder / f"{n_rows}.index", batch_size=512, segment_firings=2**12)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert index.n_firings > 3 * n_rows
    return peak


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("scope.features.texts.CHUNK_ROWS", 2**11)
    monkeypatch.setattr("scope.features.cofiring.READ_AHEAD", 2**14)
    peak_bytes(tmp_path, 3_000)  # what is imported late
    short, long = peak_bytes(tmp_path, 30_000), peak_bytes(tmp_path, 80_000)  # both have features cut by strength
    firings = 50_000 * 4
    assert long - short < 3 * firings, "the whole lists have 8 bytes a firing, and sorting them takes 24"
