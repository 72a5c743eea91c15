"""Generations step by step, over a real index of a tiny model that denoises."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers_browser import query, serious
from helpers_models import tiny_model
from helpers_saes import make

from activations.denoising_capture import capture_denoising
from activations.text import TextSource
from dashboards.components.generation_view import generation_view
from dashboards.generations import generation
from scope.features.build import build_index
from scope.features.denoising import generation_cells
from scope.features.index import FeatureIndex
from scope.figures.text import visible_token
from scope.saes.base import SAEMetadata
from scope.workspace import Workspace

pytestmark = pytest.mark.browser

HOOK = "blocks.1.hook_resid_post"
GRID = ".generation-grid tbody tr"
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def denoised(serve: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FeatureIndex]:
    """A dashboard over an index of three generations, one of them between a prefix and a suffix."""
    folder, model = tmp_path_factory.mktemp("generations"), tiny_model("diffusion_gemma")
    prompts = [{"text": EVIL}, {"text": "The cat", "suffix": " the moon", "gap": 2}, {"text": "In 1905"}]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    store = capture_denoising(model, TextSource(folder / "p.jsonl"), [HOOK], folder / "s.zarr").store
    sae = make("topk", d_in=32, d_sae=40, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK))
    index = build_index(store, sae, folder / "indexes" / "i.index", model=model, batch_size=64)
    return serve(Workspace(folder)), index


def cells(page: Any, line: int) -> list[str]:
    """The tokens of a line of the grid."""
    return page.locator(f"{GRID} >> nth={line} >> td").all_text_contents()


def test_the_grid_shows_the_tokens_as_they_stood_and_colours_them(visit: Callable, denoised: Any) -> None:
    server, index = denoised
    opened = visit(server=server)
    page = opened.open("/generation", GRID)
    assert EVIL in page.text_content(".generation-prompt")
    own = generation_cells(index, 0)
    for step in range(5):
        here = own[(own["block"] == 0) & (own["step"] == step)]
        assert cells(page, step) == [visible_token(token) for token in here["token"]]
        shown = page.locator(f"{GRID} >> nth={step} >> td")
        assert [shown.nth(n).get_attribute("data-state") for n in range(8)] == here["state"].tolist()
    assert cells(page, 5) == [visible_token(token) for token in own[own["block"] == 0]["final"][:8]]
    assert page.locator(".generation-grid td[data-on]").count() == 0
    page.click(".generation-page p a[aria-label^='Colour by'] >> nth=0")
    opened.until("document.querySelectorAll('.generation-grid td[data-on]').length > 0")
    feature = int(query(page)["feature"])
    values = generation_cells(index, 0, feature)
    values = values[values["block"] == 0]["value"]
    assert page.locator(".generation-grid td[data-on]").count() == (values > 0).sum()
    page.click("nav[aria-label=Canvases] a >> nth=1")
    opened.until("new URL(location).searchParams.get('block') === '1'")
    page.wait_for_selector("nav[aria-label=Canvases] a[aria-current]:has-text('canvas 1')")
    assert cells(page, 0) == [visible_token(token) for token in own[(own["block"] == 1)]["token"][:8]]
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:has-text('Generation 1')")
    assert int(query(page)["feature"]) == feature
    assert "the moon" in page.text_content(".generation-prompt")
    assert page.locator(".generation-grid td[data-state=prompt]").count() % 5 == 0
    assert page.locator(".generation-grid td[data-state=prompt]").count() > 0
    page.go_back()
    page.wait_for_selector("h1:has-text('Generation 0')")
    opened.check()


def test_the_page_of_a_feature_has_its_steps_and_the_way_to_a_generation(visit: Callable, denoised: Any) -> None:
    server, index = denoised
    opened = visit(server=server)
    feature = int(index.table["n_firings"].idxmax())
    page = opened.open(f"/feature/{feature}", "#feature-steps .main-svg")
    panel = page.locator(".panel:has(h2:has-text('By state of the token'))")
    assert set(panel.locator(".bars .name").all_text_contents()) <= {"prompt", "masked", "committing", "committed"}
    page.click("text=One generation, step by step")
    page.wait_for_selector(GRID)
    assert query(page)["feature"] == str(feature)
    opened.check()


def test_another_colour_leaves_the_same_positions_in_view(denoised: Any) -> None:
    shown = replace(generation(denoised[1], None), first=32, length=40)
    view = generation_view("i", shown, {})
    links = [one.href for one in view._traverse() if getattr(one, "href", None) and "feature=" in one.href]
    colours = [link for link in links if "document=0" in link]
    assert len(colours) >= len(shown.strongest)
    assert all("from=32" in link for link in colours)


def test_what_is_not_there_is_said(visit: Callable, denoised: Any) -> None:
    opened = visit(server=denoised[0])
    page = opened.open("/generation?document=99", ".state.error")
    assert "no document 99" in page.text_content(".state.error")
    opened.open("/generation?block=7", ".state.error:has-text('none 7')")
    opened.open("/generation?document=x", ".state.error:has-text('expected a whole number')")
    fake = visit()
    page = fake.open("/generation", ".state")
    assert "scope denoise" in page.text_content(".state")
    fake.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_not_wider_than_a_phone(visit: Callable, denoised: Any, theme: str) -> None:
    server, index = denoised
    feature = int(index.table["n_firings"].idxmax())
    opened = visit(width=390, theme=theme, server=server)
    page = opened.open(f"/generation?document=1&feature={feature}", "#generation-commits .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(page) == []
    opened.check()
