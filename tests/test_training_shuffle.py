"""A buffer far smaller than a store trains as well as a full shuffle, on text whose subject changes on the way."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_activations import FakeModel
from helpers_training import HOOK, one_thread, synthetic  # noqa: F401  # a fixture

from activations import arrays
from activations.capture import capture
from activations.source import ActivationBatch
from activations.store import ActivationStore
from activations.text import TextSource
from scope.training import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")
SUBJECTS, D_IN = 6, 32
CONFIG = TrainConfig(d_sae=96, k=4, tokens=300 * 128, batch_size=128, lr=3e-3, max_norm_ratio=0)
BYTES = 4 * D_IN
"""Of a row."""


class Subjects(FakeModel):
    """Its rows are sparse sums of directions, others for each subject; a document's first letter says which it has."""

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        rows = synthetic(len(window), D_IN, n_features=16, seed=int(window[1])).rows
        order = np.random.default_rng(window).permutation(len(window))
        return rows.numpy()[order]


class InOrder:
    """A store's rows as a source that can only be read in order."""

    n_rows = None

    def __init__(self, store: ActivationStore) -> None:
        self.store, self.hooks, self.dtype, self.hook_shape = store, store.hooks, store.dtype, store.hook_shape

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        return self.store.batches(hooks, batch_size, start)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActivationStore:
    """Documents of one subject after the other, read in blocks of a quarter of a document."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 16 * BYTES)
    rng = np.random.default_rng(0)
    texts = [chr(97 + n * SUBJECTS // 120) + "".join(rng.choice(list("xyz"), 62)) for n in range(120)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = Subjects(hooks={HOOK: (D_IN,)})
    settings = {"context_size": 64, "rows_per_group": 1024, "dtype": "float32"}
    return capture(model, TextSource(path), [HOOK], tmp_path / "s.zarr", **settings).store  # type: ignore[arg-type]


def unexplained(store: ActivationStore, source: object, config: TrainConfig) -> float:
    """`fvu` over all rows of the store, of an SAE that is trained on the source."""
    sae = train(source, HOOK, config).sae  # type: ignore[arg-type]
    rows = torch.from_numpy(store.read_float32(HOOK, 0, store.n_rows))
    with torch.inference_mode():
        left = (rows - sae(rows)).square().sum()
    return float(left / (rows - rows.mean(0)).square().sum())


def test_a_small_buffer_trains_as_well_as_a_full_shuffle(store: ActivationStore) -> None:
    whole = unexplained(store, store, CONFIG)
    buffered = unexplained(store, store, replace(CONFIG, shuffle_bytes=store.n_rows * BYTES // 8))
    in_order = unexplained(store, InOrder(store), replace(CONFIG, shuffle_bytes=256 * BYTES))
    assert buffered < 1.1 * whole
    assert in_order > 1.3 * whole  # the text is one whose order matters
