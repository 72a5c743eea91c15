"""Images and sounds on the feature and the prompt page, over an index of a tiny model with towers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import query, serious
from helpers_media import media_model, png, wav
from helpers_saes import make
from test_activations_media import HOOK, written

from activations.capture import capture
from activations.text import TextSource
from scope.features.build import build_index
from scope.features.examples import Example
from scope.features.index import FeatureIndex
from scope.features.media import MediumValues
from scope.saes.base import SAEMetadata
from scope.saes.formats import save
from scope.workspace import Workspace

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def seen(serve: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FeatureIndex]:
    """A dashboard over a text with images and sounds."""
    folder = tmp_path_factory.mktemp("media")
    model = media_model("gemma4")
    text = TextSource(written(folder / "text", sounds=True), media_column="media")
    store = capture(model, text, [HOOK], folder / "w/stores/s.zarr", context_size=128, dtype="float32").store
    metadata = SAEMetadata(hook_name=HOOK, model_name=model.name)
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=metadata)
    save(sae, folder / "w/saes/s")
    index = build_index(store, sae, folder / "w/indexes/i.index", model=model)
    return serve(Workspace(folder / "w")), index


def strongest(index: FeatureIndex, modality: str) -> int:
    return int(index.table[f"{modality}_rate"].to_numpy().argmax())


def first_in(index: FeatureIndex, feature: int, kind: str) -> tuple[Example, MediumValues]:
    """The first example in an image, or in a sound, as the page lists them."""
    for one in index.top_examples(feature):
        if one.medium is not None:
            found = index.medium_values(feature, one.document, one.medium)
            if found.kind == kind:
                return one, found
    raise AssertionError(f"feature {feature} has no example in an {kind}")


def shown(page: Any, feature: int) -> Any:
    """The first image of a feature's page, loaded."""
    page.wait_for_selector(".medium.image img")
    page.locator(".medium.image img").first.scroll_into_view_if_needed()
    return page.locator(".medium.image").first


def test_patches_lie_over_the_image(visit: Callable, seen: tuple[Any, FeatureIndex]) -> None:
    server, index = seen
    feature = strongest(index, "image")
    opened = visit(server=server)
    page = opened.open(f"/feature/{feature}?index={index.id}", ".medium.image .patch")
    figure = shown(page, feature)
    opened.until("document.querySelector('.medium.image img').naturalWidth > 0")
    example, found = first_in(index, feature, "image")
    assert figure.locator(".patch").count() == int((found.values > 0).sum())
    # Boxes are where the store's columns say, to a pixel.
    frame, centre = (figure.locator(where).first.bounding_box() for where in (".medium-frame", ".patch.centre"))
    x0, y0, x1, y1 = found.places[found.rows == example.row][0]
    assert abs(centre["x"] - frame["x"] - x0 * frame["width"]) < 1
    assert abs(centre["y"] - frame["y"] - y0 * frame["height"]) < 1
    assert abs(centre["width"] - (x1 - x0) * frame["width"]) < 1
    assert abs(centre["height"] - (y1 - y0) * frame["height"]) < 1
    assert found.width is not None
    assert found.height is not None
    assert abs(frame["width"] / frame["height"] - found.width / found.height) < 0.02
    assert "strength" in figure.locator(".patch.centre").first.get_attribute("title")
    figure.locator("button").click()
    assert not figure.locator(".patch").first.is_visible()
    panel = page.locator(".panel:has(h2:has-text('By modality'))")
    assert sorted(panel.locator(".bars .name").all_text_contents()) == ["audio", "image", "text"]
    opened.check()


def test_strength_along_a_sound(visit: Callable, seen: tuple[Any, FeatureIndex]) -> None:
    server, index = seen
    feature = strongest(index, "audio")
    opened = visit(server=server)
    page = opened.open(f"/feature/{feature}?index={index.id}", ".medium.audio .span-bar")
    figure = page.locator(".medium.audio").first
    example, found = first_in(index, feature, "audio")
    frame, centre = (figure.locator(where).first.bounding_box() for where in (".medium-frame", ".span-bar.centre"))
    assert found.seconds is not None
    start, end = found.places[found.rows == example.row][0]
    assert abs(centre["x"] - frame["x"] - start / found.seconds * frame["width"]) < 1
    assert abs(centre["width"] - (end - start) / found.seconds * frame["width"]) < 1
    source = figure.locator("audio").get_attribute("src")
    response = page.request.get(server.url + source)
    assert response.headers["content-type"] == "audio/wav"
    assert page.request.get(f"{server.url}/media/{index.id}/nothing").status == 404
    assert "arrays" not in page.request.get(f"{server.url}/media/{index.id}/..%2Fmanifest.json").text()
    opened.check()


def test_a_stored_window_is_run_as_a_prompt(visit: Callable, seen: tuple[Any, FeatureIndex]) -> None:
    server, index = seen
    feature = strongest(index, "image")
    opened = visit(server=server)
    page = opened.open(f"/feature/{feature}?index={index.id}", ".medium.image figcaption a")
    page.locator(".medium.image figcaption a").first.click()
    page.wait_for_selector("#prompt-strip")
    page.wait_for_selector(".media-row .patch")
    assert query(page)["feature"] == str(feature)
    _, found = first_in(index, feature, "image")
    own = page.locator(".media-row .medium.image:has(.patch.centre)")
    # The page's model may compute in another dtype than the index's did.
    assert abs(own.locator(".patch").count() - int((found.values > 0).sum())) <= 3
    page.fill("#prompt-text", "the cat sat")
    page.click("[data-run]")
    opened.until("!new URL(location).searchParams.has('window')")
    opened.until("document.querySelectorAll('#prompt-strip .tok').length < 10")
    assert page.locator(".media-row").count() == 0
    opened.check()


def test_files_are_handed_over_for_a_prompt(visit: Callable, seen: tuple[Any, FeatureIndex], tmp_path: Path) -> None:
    server, index = seen
    opened = visit(server=server)
    page = opened.open(f"/prompt?index={index.id}", "#prompt-upload")
    for name, content in (("cat.png", png()), ("no.png", b"none"), ("cat.wav", wav())):
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#prompt-upload input", str(tmp_path / name))
        opened.until(f"document.querySelector('.prompt-files').textContent.includes('{name}')")
    opened.until("document.querySelectorAll('[data-remove-file]').length === 2")
    page.fill("#prompt-text", "look <image> and <audio> the cat")
    page.click("[data-run]")
    page.wait_for_selector(".media-row .medium.image .patch")
    page.wait_for_selector(".media-row .medium.audio")
    assert len(query(page)["media"].split(",")) == 2
    assert {"▦", "♪"} <= set(page.text_content("#prompt-strip"))
    opened.until("document.querySelector('.media-row img').naturalWidth > 0")
    page.reload()
    page.wait_for_selector(".media-row .medium.image .patch")
    assert page.locator("[data-remove-file]").count() == 2
    page.locator("[data-remove-file]").last.click()
    opened.until("document.querySelectorAll('[data-remove-file]').length === 1")
    page.fill("#prompt-text", "<image> the cat")
    page.click("[data-run]")
    opened.until("new URL(location).searchParams.get('media').length === 32")
    opened.until("document.querySelectorAll('.media-row .medium').length === 1")
    page.click("[data-mode=chat]")
    page.fill(".turn-text >> nth=0", "who is it")
    page.click("[data-run]")
    page.wait_for_selector("#prompt-strip .turn")
    assert page.locator(".media-row .medium").count() == 1
    opened.check()
    page = opened.open(f"/prompt?index={index.id}&text=a&media={'0' * 32}", "#prompt-status .state")
    assert "no longer here" in page.text_content("#prompt-status")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_not_wider_than_a_phone(visit: Callable, seen: tuple[Any, FeatureIndex], theme: str) -> None:
    server, index = seen
    opened = visit(width=390, theme=theme, server=server)
    page = opened.open(f"/feature/{strongest(index, 'image')}?index={index.id}", ".medium.image .patch")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(page) == []
    page = opened.open(f"/feature/{strongest(index, 'audio')}?index={index.id}", ".medium.audio .span-bar")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(page) == []
    if theme == "dark":
        sequence = int(index.media["sequence"].iloc[0])
        page = opened.open(f"/prompt?index={index.id}&window={sequence}", ".media-row .medium")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert serious(page) == []
    opened.check()


def test_a_window_that_is_not_there(visit: Callable, seen: tuple[Any, FeatureIndex]) -> None:
    server, index = seen
    opened = visit(server=server)
    page = opened.open(f"/prompt?index={index.id}&window=999", "#prompt-status [role=alert], #prompt-status .state")
    assert "no window 999" in page.text_content("#prompt-status")
    assert Path(index.path).is_dir()
    opened.check()
