"""A walk through the dashboard on the demo's workspace: browser, feature, prompt, feature, and back."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers_browser import query

pytestmark = [pytest.mark.browser, pytest.mark.real]

MODEL_TIMEOUT = 600_000
"""Milliseconds that the first prompt may take: the model is loaded for it."""


@pytest.fixture(scope="module")
def walked(demo_workspace: Path, serve: Callable[[Any], Any]) -> Any:
    """A dashboard over the workspace that the demo makes."""
    from scope.workspace import Workspace

    return serve(Workspace(demo_workspace))


def test_walk(visit: Callable, walked: Any) -> None:
    opened = visit(server=walked)
    page = opened.open("/", ".card .stats")
    assert "fvu" in page.text_content(".card .stats")
    page.click(".card >> text=Look at features")

    page.wait_for_selector(".features-grid .cell-spark")
    assert "Gemma 3 270M" in page.text_content("#header")
    assert "blocks.8.hook_resid_post" in page.text_content("#header")
    page.click(".ag-header-cell[col-id=max_value]")
    opened.until("new URL(location).searchParams.get('sort') === 'max_value:desc'")
    page.wait_for_selector(".features-grid .ag-row[row-index='2'] a")
    page.click(".features-grid .ag-row[row-index='2'] [col-id=label]")

    page.wait_for_selector(".example .tok.centre[data-on]")
    first = urlsplit(page.url).path
    page.wait_for_selector("#feature-histogram .bars")
    strengths = page.locator(".example .value").all_text_contents()
    assert [float(text.replace(",", "")) for text in strengths] == sorted(
        (float(text.replace(",", "")) for text in strengths), reverse=True
    )
    page.keyboard.press("ArrowRight")
    opened.until(f"location.pathname !== '{first}'")
    page.go_back()
    opened.until(f"location.pathname === '{first}'")

    page.click(".rail a[data-page=prompt]")
    page.wait_for_selector("[data-sample]")
    page.fill("#prompt-text", "The opposite of hot is")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#prompt-strip .tok", timeout=MODEL_TIMEOUT)
    assert page.text_content("#prompt-strip").endswith("The opposite of hot is")
    page.click("#prompt-strip .tok:has-text(' hot')")
    page.wait_for_selector("h2:has-text('hot')")
    page.click("#prompt-strip .tok:has-text(' is')")
    page.wait_for_selector(".firing")
    page.click("aside .chips .chip >> nth=0")
    page.wait_for_selector(".firing-bar.effect", timeout=MODEL_TIMEOUT)
    asked = query(page)
    assert asked["text"] == "The opposite of hot is"
    page.click(".firing-label >> nth=0")
    page.wait_for_selector(".firing-label[aria-pressed=true]")
    strength = page.locator(".firing-bar.strength .number").first.text_content()
    feature = page.locator(".firing-id a").first.text_content()
    page.click(".firing-id a >> nth=0")

    page.wait_for_selector(f"h1:has-text('Feature {feature}')")
    page.go_back()
    page.wait_for_selector(".firing-bar.effect", timeout=MODEL_TIMEOUT)
    assert page.locator(".firing-bar.strength .number").first.text_content() == strength
    page.reload()
    page.wait_for_selector(".firing-bar.effect", timeout=MODEL_TIMEOUT)
    page.click(".rail a[data-page=features]")
    page.wait_for_selector(".features-grid .cell-spark")
    opened.check()


def test_two_prompts_and_the_lens_on_the_real_model(visit: Callable, walked: Any) -> None:
    opened = visit(server=walked)
    page = opened.open("/prompt?text=The+capital+of+France+is&text2=The+capital+of+Japan+is", "[data-run]")
    page.wait_for_selector(".next-rows .next-row", timeout=MODEL_TIMEOUT)
    assert page.locator("#prompt-strip-a .differs").all_text_contents() == [" France"]
    words = page.locator(".next-rows .token-text").all_text_contents()
    assert {"␣Paris", "␣Tokyo"} <= set(words)
    page = opened.open("/lens?text=The+opposite+of+hot+is", "[data-run]")
    page.wait_for_selector("#lens-grid tbody tr", timeout=MODEL_TIMEOUT)
    assert page.locator("#lens-grid tbody tr").count() == 18
    assert page.text_content("#lens-grid tbody tr:first-child td:last-child") == "␣cold"
    page.wait_for_selector("#lens-chart .main-svg", timeout=MODEL_TIMEOUT)
    page.click("button:has-text('SAE read in place')")
    page.wait_for_selector("#lens-grid tr[data-id='8'] .row-mark:has-text('SAE')", timeout=MODEL_TIMEOUT)
    opened.check()


def test_random_examples_of_the_real_index_fit_a_phone(visit: Callable, walked: Any) -> None:
    opened = visit(width=390, server=walked)
    page = opened.open("/features", ".features-grid .cell-spark")
    numbers = page.locator(".features-grid .ag-row a").all_text_contents()[:3]
    for number in numbers:
        page = opened.open(f"/feature/{number}?show=random", ".example .tok, .state")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    opened.check()


def test_the_real_training_and_two_real_saes_compared(
    visit: Callable, serve: Callable, demo_workspace: Path, tmp_path: Path
) -> None:
    from scope.training import TrainConfig, train
    from scope.workspace import Workspace

    workspace = Workspace(shutil.copytree(demo_workspace, tmp_path / "workspace"))
    (first,) = workspace.saes()
    opened = visit(server=serve(workspace))
    page = opened.open("/compare", ".state")
    assert "not two SAEs" in page.text_content("#content")
    (store,) = workspace.stores()
    small = TrainConfig(d_sae=256, k=16, tokens=40_000, batch_size=1024)
    train(workspace.store(store.id), "blocks.8.hook_resid_post", small, workspace.path_for("sae", "second"))
    second = workspace.find("second", "sae")

    page = opened.open("/training", ".training-page .main-svg")
    assert "blocks.8.hook_resid_post" in page.text_content(".training-page table")
    page.click(f".training-page td a:has-text('{first.name}') >> nth=0")
    opened.until("location.pathname.startsWith('/training/')")
    page.wait_for_selector(".training-page .main-svg")
    page = opened.open(f"/compare?a={first.id}&b={second.id}", "#compare-histogram .main-svg")
    assert "1,024" in page.text_content("#content")
    assert "256" in page.text_content("#content")
    opened.check()
