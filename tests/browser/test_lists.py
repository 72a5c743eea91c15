"""From the list of features to one of them and on through the list; one document; what clumsy hands do."""

from collections.abc import Callable
from typing import Any

import helpers_dashboards as fakes
import pytest
from helpers_browser import query

from dashboards.listing import FeatureQuery, listing

pytestmark = pytest.mark.browser

ROWS = ".features-grid .ag-row[row-id] a"


def test_the_next_feature_is_the_next_of_the_list(visit: Callable, fake_dashboard: Any) -> None:
    opened = visit()
    page = opened.open("/features?show=alive", ROWS)
    page.click(".ag-header-cell[col-id=max_value] .head-name")
    opened.until("new URL(location).searchParams.get('sort') === 'max_value:desc'")
    ids = listing(fakes.FakeIndex(), FeatureQuery.of({"show": "alive", "sort": "max_value:desc"})).ids.tolist()
    page.wait_for_selector(f".ag-row[row-index='1'][row-id='{ids[1]}'] a")
    page.click(f".ag-row[row-id='{ids[1]}'] [col-id=density]")
    page.wait_for_selector(f"h1:has-text('Feature {ids[1]}')")
    assert page.text_content(".feature-head .small").endswith(f"2 of {len(ids)}")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"h1:has-text('Feature {ids[2]}')")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f"h1:has-text('Feature {ids[1]}')")
    page.click("text=Back to the list")
    page.wait_for_selector(ROWS)
    assert {name: query(page)[name] for name in ("show", "sort")} == {"show": "alive", "sort": "max_value:desc"}
    page.go_back()
    page.wait_for_selector(f"h1:has-text('Feature {ids[1]}')")
    opened.check()


def test_each_head_explains_its_column_and_does_not_sort_by_that(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features", ROWS)
    for column in ("density", "spark", "max_value", "top_language", "logits"):
        page.click(f".ag-header-cell[col-id={column}] .define")
        page.wait_for_selector("#tip.pinned")
        assert len(page.text_content("#tip")) > 30, column
        page.keyboard.press("Escape")
    page.wait_for_timeout(150)
    assert "sort" not in query(page)
    opened.check()


def test_examples_of_one_document(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2?show=random", ".example .from a")
    title = page.text_content(".example .from a")
    page.click(".example .from a")
    page.wait_for_selector(".only-one")
    assert title in page.text_content(".only-one")
    assert set(page.locator(".example .from a").all_text_contents()) == {title}
    assert query(page)["document"].isdigit()
    page.click(".examples-part .mantine-SegmentedControl-label:has-text('Quantiles')")
    page.wait_for_selector(".examples h3")
    assert "document" not in query(page)
    page.go_back()
    page.wait_for_selector(".only-one")
    page.click("text=Show all documents")
    opened.until("!document.querySelector('.only-one')")
    opened.check()


def test_clumsy_hands(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features", ROWS)
    page.dblclick(".ag-row[row-index='3'] [col-id=density]")
    page.wait_for_selector(".example .tok, .state")
    for key in ("ArrowRight", "ArrowRight", "r", "r", "ArrowLeft"):
        page.keyboard.press(key)
    opened.until("!document.body.classList.contains('navigating')")
    page.wait_for_selector("h1:has-text('Feature')")
    for _ in range(2):
        page.go_back()
    page.go_forward()
    opened.until("!document.body.classList.contains('navigating')")
    opened.until("document.querySelector('h1').textContent === 'Feature ' + location.pathname.split('/')[2]")
    for name in ("Quantiles", "Random", "Top", "Quantiles"):
        page.click(f".examples-part .mantine-SegmentedControl-label:has-text('{name}')")
    page.wait_for_selector(".examples h3")
    page.dblclick(".theme-toggle")
    for path in ("/prompt", "/compare", "/features"):
        page.evaluate("path => document.querySelector(`.rail a[href^='${path}']`)?.click()", path)
    page.wait_for_selector(ROWS)
    page.fill("#features-text", "((((<b>%00\\")
    opened.until("document.querySelector('#features-count').textContent.startsWith('No feature matches')")
    opened.check()
