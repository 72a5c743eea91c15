"""The section of the feature page that an excerpt fills, in the browser."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_browser import query, serious
from helpers_features import FakeModel, GrowingStore, small_sae, tiny_index

from scope.features import build_index, make_excerpt
from scope.workspace import Workspace

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, serve: Callable[[Any], Any]) -> SimpleNamespace:
    """An index over a little of a text, with an excerpt of one over all of it."""
    folder = tmp_path_factory.mktemp("excerpt")
    whole, _, _ = tiny_index(folder)
    model = FakeModel()
    local = build_index(GrowingStore(model, 30), small_sae(), folder / "local.index", model=model)
    workspace = Workspace(folder / "w")
    for artefact in (local, make_excerpt(whole, folder / "whole.excerpt", text=True)):
        workspace.add(artefact.path)
    asleep = int((local.table["dead"] & ~whole.table["dead"]).to_numpy().argmax())
    awake = int((~local.table["dead"]).to_numpy().argmax())
    return SimpleNamespace(server=serve(workspace), whole=whole, asleep=asleep, awake=awake)


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_it_is_accessible_and_fits(visit: Callable, known: SimpleNamespace, width: int, theme: str) -> None:
    opened = visit(width=width, theme=theme, server=known.server)
    for feature in (known.awake, known.asleep, 5):
        page = opened.open(f"/feature/{feature}", ".excerpt")
        if page.locator(".excerpt summary").count():
            page.click(".excerpt > details > summary")
            page.wait_for_selector("#excerpt-histogram .bars")
        assert serious(page) == [], feature
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    opened.check()


def test_its_examples_are_chosen_in_the_address(visit: Callable, known: SimpleNamespace) -> None:
    opened = visit(server=known.server)
    page = opened.open(f"/feature/{known.asleep}", ".excerpt .example .tok")
    shown = ".excerpt .example .tok.centre"
    strongest = known.whole.top_examples(known.asleep, 10)
    assert page.locator(shown).count() == len(strongest)
    page.click(".excerpt label:has-text('Quantiles')")
    page.wait_for_selector(".excerpt h3:has-text('Weakest 25% of firings')")
    assert query(page)["whole"] == "quantiles"
    page.keyboard.press("ArrowLeft")  # of a choice that has the focus, the one before it
    opened.until("!new URL(location).searchParams.has('whole')")
    page.go_back()
    page.wait_for_selector(".excerpt h3:has-text('Weakest 25% of firings')")
    page.reload()
    page.wait_for_selector(".excerpt h3:has-text('Weakest 25% of firings')")
    # The next feature shows the same.
    page.click("a[aria-label='Next feature']")
    page.wait_for_selector(f"h1:has-text('Feature {known.asleep + 1}')")
    assert query(page)["whole"] == "quantiles"
    opened.check()


def test_a_token_tells_its_strength_and_no_more(visit: Callable, known: SimpleNamespace) -> None:
    opened = visit(server=known.server)
    page = opened.open(f"/feature/{known.asleep}", ".excerpt .example .tok")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.hover(".excerpt .tok.centre >> nth=0")
    page.wait_for_selector(".tip-value")
    page.wait_for_timeout(300)
    assert not [url for url in asked if "/api/token" in url]
    assert page.locator(".excerpt [data-unfold]").count() == 0
    opened.check()
