"""Features over images and sounds: rates by modality, patches and spans, and files that the index holds itself."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_media import media_model, png
from helpers_models import one_thread, tiny_model  # noqa: F401  one_thread is a fixture
from helpers_saes import make
from test_activations_media import HOOK, made

from activations.capture import capture
from activations.media import BOX, MODALITIES, SPAN
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import IntegrityError, InvalidInputError, OutOfRangeError
from scope.features.build import build_index
from scope.features.index import FeatureIndex
from scope.saes.base import SAEMetadata

Case = tuple[ActivationStore, Any, FeatureIndex]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An index of text, images and sounds; its store is gone."""
    folder = tmp_path_factory.mktemp("media")
    store = made(folder, "gemma4")
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    index = build_index(store, sae, folder / "i.index", model=media_model("gemma4"), batch_size=64, segment_firings=999)
    return store, sae, index


def test_rates_by_modality_are_those_of_the_rows(case: Case) -> None:
    store, sae, index = case
    fires = sae.encode(torch.from_numpy(store.read(HOOK, 0, store.n_rows))).detach().numpy() > 0
    indexed = store.flags(0, store.n_rows) & (RowFlag.BOS | RowFlag.SPECIAL) == 0
    code = store.column("modality", 0, store.n_rows)
    assert index.modalities == ("text", "image", "audio")
    for feature in range(0, index.d_sae, 5):
        table = index.by_modality(feature).set_index("modality")
        for name in MODALITIES:
            own = indexed & (code == MODALITIES.index(name))
            assert table.loc[name, "n_rows"] == own.sum()
            assert table.loc[name, "n_firings"] == fires[own, feature].sum()
            assert index.table[f"{name}_rate"][feature] == pytest.approx(fires[own, feature].mean(), rel=1e-5)
    found = index.contrast("modality:image", "modality:text", n=index.d_sae)
    assert (found.n_rows_a, found.n_rows_b) == ((indexed & (code == 1)).sum(), (indexed & (code == 0)).sum())
    for row in found.table.to_dict("records"):
        assert row["rate_a"] == pytest.approx(fires[indexed & (code == 1), row["feature"]].mean())
    assert index.info()["modalities"]["audio"] == int((indexed & (code == 2)).sum())


def test_a_feature_over_a_medium_is_its_rows_with_their_places(case: Case) -> None:
    store, sae, index = case
    strengths = sae.encode(torch.from_numpy(store.read(HOOK, 0, store.n_rows))).detach()
    strengths = (strengths * sae.W_dec.detach().norm(dim=-1)).numpy()
    feature = int(index.table["image_rate"].to_numpy().argmax())
    for one in index.media.to_dict("records"):
        found = index.medium_values(feature, one["document"], one["medium"])
        assert len(found.rows) == one["n_tokens"]
        np.testing.assert_allclose(found.values, strengths[found.rows, feature], rtol=0.01)
        names = BOX if found.kind == "image" else SPAN
        for place, name in enumerate(names):
            np.testing.assert_array_equal(found.places[:, place], store.column(name, 0, store.n_rows)[found.rows])
        assert index.medium_file(found.digest) == (Path(store.path).parent / "text" / one["name"]).read_bytes()
    with pytest.raises(OutOfRangeError, match="no image or sound 7"):
        index.medium_values(feature, 1, 7)
    with pytest.raises(OutOfRangeError, match="no image or sound"):
        index.medium_file("../manifest.json")


def test_examples_say_which_medium_they_are_in(case: Case) -> None:
    _, _, index = case
    feature = int(index.table["image_rate"].to_numpy().argmax())
    examples = index.top_examples(feature, 40, distinct=False, per_sequence=40)
    tokens = index.tokens(0, index.n_rows)
    for example in examples:
        row = tokens.iloc[example.row]
        assert example.medium == (None if row["modality"] == "text" else row["medium"])
    shown = next(example for example in examples if example.medium is not None)
    assert shown.token in "▦♪"
    assert index.documents["document"].is_unique


def test_an_index_stands_alone_and_notices_damage(case: Case, tmp_path: Path) -> None:
    store, _, index = case
    copy = tmp_path / "i.index"
    shutil.copytree(index.path, copy)
    moved = FeatureIndex.open(copy)
    assert moved.verify() == []
    digest = str(moved.media["digest"].iloc[0])
    path = copy / "media" / digest
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="damaged"):
        moved.medium_file(digest)
    assert [fault.object for fault in moved.verify()] == [f"media/{digest}"]
    assert store.has_media


def test_an_index_with_media_grows(tmp_path: Path) -> None:
    store = made(tmp_path)
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    model = media_model("gemma3")
    small = build_index(store, sae, tmp_path / "i.index", model=model)
    before = len(small.media)
    (tmp_path / "text/new.png").write_bytes(png(seed=12))
    lines = tmp_path / "text/more.jsonl"
    lines.write_text('{"text": "<image> then the moon", "media": ["new.png"], "title": "new"}\n')
    grown = capture(model, TextSource(lines, media_column="media"), [], tmp_path / "s.zarr", append=True).store
    grew = build_index(grown, sae, tmp_path / "i.index", model=model)
    whole = build_index(grown, sae, tmp_path / "w.index", model=model)
    assert len(grew.media) == before + 1
    assert grew.media.equals(whole.media)
    assert grew.verify() == []
    assert {path.name for path in (grew.path / "media").iterdir()} == set(whole.media["digest"])
    assert grew.by_modality(3).equals(whole.by_modality(3))


def test_an_index_of_text_has_none(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat " * 4)
    store = capture(tiny_model("gemma3"), TextSource(tmp_path / "t.txt"), [HOOK], tmp_path / "s.zarr", context_size=16)
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    index = build_index(store.store, sae, tmp_path / "i.index")
    assert index.modalities == ()
    assert "image_rate" not in index.table
    assert not (index.path / "media").exists()
    with pytest.raises(InvalidInputError, match="no images or sounds"):
        index.by_modality(1)
    with pytest.raises(InvalidInputError, match="no images or sounds"):
        _ = index.media
