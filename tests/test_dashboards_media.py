"""Prompts with images and sounds for the prompt page: stored windows, and files that were handed over."""

import base64
from typing import Any

import numpy as np
import pytest
from helpers_media import media_model, png, wav
from helpers_models import one_thread  # noqa: F401  one_thread is a fixture
from helpers_saes import make
from test_activations_media import HOOK, made

from activations.media import BOX
from dashboards import uploads
from dashboards.prompts import Asked
from dashboards.stored import stored_window, with_files
from dashboards.uploads import Uploads
from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.build import build_index
from scope.features.index import FeatureIndex
from scope.features.prompt import features_on_prompt
from scope.saes.base import SAEMetadata


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FeatureIndex]:
    """An SAE and its index over text, images and sounds, in windows of 128."""
    folder = tmp_path_factory.mktemp("media")
    store = made(folder, "gemma4", context_size=128)
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    return sae, build_index(store, sae, folder / "i.index", model=media_model("gemma4"))


def encoded(content: bytes) -> str:
    return "data:whatever;base64," + base64.b64encode(content).decode()


def test_a_stored_window_fires_as_the_index_says(case: tuple[Any, FeatureIndex]) -> None:
    sae, index = case
    model = media_model("gemma4")
    for row in index.sequences.to_dict("records"):
        shown = stored_window(model, index, row["sequence"])
        found = features_on_prompt(model, sae, shown.prompt, index=index, logits=False)
        start, stop = row["start_row"], row["start_row"] + row["n_rows"]
        assert found.tokens == tuple(index.tokens(start, stop)["token"])
        for feature in range(0, index.d_sae, 3):
            ours, theirs = found.values_of(feature), index.values_on(feature, start, stop)
            np.testing.assert_allclose(ours, theirs, rtol=0.01, atol=0.01 * max(1.0, float(theirs.max())))
        for one in shown.media:
            own = index.medium_values(0, one.document, one.medium)
            assert (one.rows + start).tolist() == own.rows.tolist()
            np.testing.assert_array_equal(one.places, own.places)
    with pytest.raises(OutOfRangeError, match="no window 99"):
        stored_window(model, index, 99)


def test_files_stand_where_the_prompt_says() -> None:
    model, held = media_model("gemma4"), Uploads()
    files = [held.add("a.png", encoded(png())), held.add("C:\\sounds\\a.wav", encoded(wav()))]
    assert files[1].name == "a.wav"
    text = with_files(model, "look <image> and <audio>", False, files, None)
    assert [one.kind for one in text.media] == ["image", "audio"]
    assert text.media[0].rows[-1] < text.media[1].rows[0]
    assert text.media[0].places.shape == (len(text.media[0].rows), len(BOX))
    assert text.media[1].seconds == pytest.approx(0.5)
    chat = with_files(model, '[["system", "be brief"], ["user", "who is it"]]', True, files[:1], None)
    (image,) = chat.media
    assert {chat.said[row].role for row in image.rows} == {"user"}
    assert chat.said[int(image.rows[-1]) + 3].role == "user"
    assert chat.n_tokens == len(chat.said)
    with pytest.raises(InvalidInputError, match="has the marks <audio>"):
        with_files(model, "<audio>", False, files[:1], None)


def test_what_is_handed_over_is_checked_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Uploads()
    for name, content, match in (
        ("a.txt", b"x", "no image and no WAV"),
        ("a.png", b"x", r"The image a\.png cannot be read"),
        ("a.wav", b"RIFF", r"The sound a\.wav cannot be read"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            held.add(name, encoded(content))
    with pytest.raises(InvalidInputError, match="did not arrive whole"):
        held.add("a.png", "data:image/png;base64,%%%")
    monkeypatch.setattr(uploads, "MAX_BYTES", int(2.5 * len(png())))
    digests = [held.add(f"{seed}.png", encoded(png(seed=seed))).digest for seed in range(3)]
    assert [name for _, name in held.named(tuple(digests))] == ["1.png", "2.png"]
    with pytest.raises(InvalidInputError, match="no longer here"):
        held.get(digests[0])
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 10)
    with pytest.raises(InvalidInputError, match="up to 10 are taken"):
        held.add("a.png", encoded(png()))


def test_what_an_address_asks_for() -> None:
    assert Asked.of({"window": "17", "text": "x"}) == Asked("17", window=True)
    assert Asked.of({"window": "17", "text2": "x"}, "2") == Asked("x")
    assert Asked.of({"window": "-1", "text": "x"}) == Asked("x")
    assert Asked.of({"text": "x", "media": "ab,../c,cd"}) == Asked("x", media=("ab", "cd"))
    assert not Asked.of({"media": "ab"}).empty
