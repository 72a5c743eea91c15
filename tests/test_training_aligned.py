"""Several stores of one text as one source: rows stay aligned, other text is refused, a crosscoder trains on it."""

from pathlib import Path

import numpy as np
import pytest
from helpers_activations import FakeModel, write_text
from helpers_training import one_thread  # noqa: F401  # a fixture

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.training import TrainConfig, train
from scope.training.aligned import AlignedStores
from scope.training.metrics import reconstruction_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "blocks.1.hook_resid_post"


def captured(folder: Path, name: str, n_documents: int = 40, **options: object) -> ActivationStore:
    text = TextSource([write_text(folder / f"{name}.jsonl", n_documents=n_documents)])
    model = FakeModel(name=name, hooks={HOOK: (12,)} if name == "small" else {HOOK: (20,), "other": (12,)})
    capture(model, text, list(model.hooks), folder / f"{name}.zarr", **{"context_size": 64, **options})  # type: ignore[arg-type]
    return ActivationStore.open(folder / f"{name}.zarr")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStore]:
    folder = tmp_path_factory.mktemp("aligned")
    return {"a": captured(folder, "small"), "b": captured(folder, "large")}


def test_rows_of_all_stores_stand_side_by_side(stores: dict[str, ActivationStore]) -> None:
    source = AlignedStores(stores)
    assert source.hooks == (f"a:{HOOK}", *(f"b:{hook}" for hook in stores["b"].hooks))
    assert source.hook_shape(f"b:{HOOK}") == (20,)
    rows = 0
    for batch in source.batches([f"a:{HOOK}", f"b:{HOOK}"], 100, 50):
        for name in stores:
            expected = stores[name].read_rows(HOOK, batch.rows)
            np.testing.assert_array_equal(batch.activations[f"{name}:{HOOK}"], expected)
        rows += len(batch.rows)
    assert rows == source.n_rows - 50
    with pytest.raises(UnknownNameError, match="b:"):
        source.resolve_hook(f"c:{HOOK}")


def test_a_crosscoder_over_two_models(stores: dict[str, ActivationStore], tmp_path: Path) -> None:
    source = AlignedStores(stores)
    config = TrainConfig(arch="crosscoder", d_sae=48, k=4, tokens=20 * 128, batch_size=128, lr=3e-3)
    report = train(source, [f"a:{HOOK}", f"b:{HOOK}"], config, tmp_path / "one")
    metadata = report.sae.cfg.metadata
    assert metadata.hook_names == (f"a:{HOOK}", f"b:{HOOK}")
    assert metadata.store_fingerprint == source.fingerprint != stores["a"].fingerprint
    assert report.fvu < report.log[0]["fvu"]
    quality = reconstruction_metrics(report.sae, source)
    assert quality.fvu_by_output is not None
    assert set(quality.fvu_by_output) == set(metadata.hook_names)
    assert quality.fvu_interval is not None


def test_stores_of_other_text_are_refused(stores: dict[str, ActivationStore], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="n_rows"):
        AlignedStores({**stores, "c": captured(tmp_path, "fewer", n_documents=30)})
    with pytest.raises(MismatchError, match="dtype"):
        AlignedStores({**stores, "c": captured(tmp_path, "wide", dtype="float32")})
    written = write_text(tmp_path / "small.jsonl", n_documents=40)
    content = written.read_text()
    at = content.index('"text": "') + 40
    (tmp_path / "changed.jsonl").write_text(content[:at] + ("x" if content[at] != "x" else "y") + content[at + 1 :])
    capture(FakeModel(), TextSource([tmp_path / "changed.jsonl"]), [HOOK], tmp_path / "c.zarr", context_size=64)
    with pytest.raises(MismatchError, match="another token"):
        AlignedStores({**stores, "c": ActivationStore.open(tmp_path / "c.zarr")})
    with pytest.raises(InvalidInputError, match="two or more"):
        AlignedStores({"a": stores["a"]})
