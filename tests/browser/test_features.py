"""The feature browser and the feature page: filters, the scatter plot, contrast, labels, documents, the live test."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import helpers_dashboards as fakes
import pandas as pd
import pytest
from helpers_browser import query, serious

from dashboards.listing import FeatureQuery, listing

pytestmark = pytest.mark.browser

ROWS = ".features-grid .ag-row[row-id] a"
POINTS = ".scatter-note:has-text('features')"
MODEL_TIMEOUT = 600_000
"""Milliseconds that the first text may take: the model is loaded for it."""


def listed(page: Any) -> list[int]:
    """The features that the grid shows, from the top."""
    rows = page.locator(".features-grid .ag-row[row-id]").evaluate_all(
        "all => all.map(one => [Number(one.getAttribute('row-index')), Number(one.getAttribute('row-id'))])"
    )
    return [feature for _, feature in sorted(rows)]


@pytest.fixture
def own(serve: Callable, fake_model: None) -> tuple[Any, fakes.FakeIndex]:
    """A dashboard over an index that the test may write on."""
    index = fakes.FakeIndex(repeats=4)
    return serve(fakes.FakeWorkspace(index)), index


def test_an_area_of_the_plot_is_a_filter_and_a_row_is_marked_in_the_plot(visit: Callable, own: Any) -> None:
    server, index = own
    opened = visit(server=server)
    page = opened.open("/features?y=token_entropy&x=max_value", ROWS)
    page.wait_for_selector(POINTS)
    box = page.locator(".scatter canvas").bounding_box()
    left, right = box["x"] + 60, box["x"] + box["width"] * 0.6
    page.mouse.move(left, box["y"] + 12)
    page.mouse.down()
    page.mouse.move((left + right) / 2, box["y"] + box["height"] / 2)
    page.mouse.move(right, box["y"] + box["height"] - 46)
    page.mouse.up()
    opened.until("new URL(location).searchParams.get('area')?.startsWith('box:')")
    wanted = listing(index, FeatureQuery.of(query(page))).ids.tolist()
    assert 0 < len(wanted) < fakes.FEATURES
    opened.until(f"document.querySelector('#features-count').textContent.startsWith('{len(wanted)} of')")
    opened.until(
        f"document.querySelector('.features-grid .ag-row[row-index=\"0\"]').getAttribute('row-id') === '{wanted[0]}'"
    )
    assert listed(page) == wanted[: len(listed(page))]
    page.reload()
    page.wait_for_selector(ROWS)
    assert listed(page)[:3] == wanted[:3]
    page.click("[data-clear-area]")
    opened.until("document.querySelector('#features-count').textContent === '96 features'")
    page.go_back()
    opened.until(f"document.querySelector('#features-count')?.textContent.startsWith('{len(wanted)} of')")
    page.wait_for_selector(POINTS)
    before = page.evaluate("document.querySelector('.scatter canvas').toDataURL()")
    page.hover(f".features-grid .ag-row[row-id='{wanted[1]}'] .cell-spark")
    opened.until(f"document.querySelector('.scatter canvas').toDataURL() !== {before!r}")
    opened.check()


def test_a_point_is_named_and_opened(visit: Callable, own: Any) -> None:
    opened = visit(server=own[0])
    page = opened.open("/features?colour=top_language", ROWS)
    page.wait_for_selector(".scatter-legend .key")
    box = page.locator(".scatter canvas").bounding_box()
    for across in range(60, int(box["width"]), 9):
        page.mouse.move(box["x"] + across, box["y"] + box["height"] / 2)
        if page.is_visible(".scatter-tip"):
            break
    name = page.text_content(".scatter-tip .tip-token")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector(f"h1:has-text('{name}')")
    opened.check()


def test_no_umap_says_how_to_make_one(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features?plot=umap", ROWS)
    page.wait_for_selector(".no-umap .code")
    assert page.text_content(".no-umap .code").startswith("scope index STORE SAE --out /nowhere/fake.index --umap")
    page.click(".plot-part .mantine-SegmentedControl-label:has-text('No plot')")
    opened.until("new URL(location).searchParams.get('plot') === 'none'")
    assert not page.is_visible(".scatter")
    opened.check()


def test_fires_on_a_and_not_on_b(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features", ROWS)
    page.click(".filters summary")
    page.fill("#features-a", "language:ja")
    opened.until("new URL(location).searchParams.get('a') === 'language:ja'")
    page.wait_for_selector(".features-grid .cell-rate")
    assert "A: 3,560 tokens" in page.text_content("#features-count")
    found = listed(page)
    assert page.evaluate(
        "ids => ids.every(id => document.querySelector(`.ag-row[row-id='${id}'] [col-id=rate_a] .number`))", found[:5]
    )
    page.fill("#features-a", "nonsense")
    page.wait_for_selector("#features-problem .state.error:has-text('language:de')")
    page.click(".contrast .define")
    assert "log₂" in page.text_content("#tip .formula")
    page.keyboard.press("Escape")
    page.fill("#features-a", "")
    opened.until("document.querySelector('#features-count').textContent === '96 features'")
    opened.check()


def test_stars_and_labels_are_written_in_the_row(visit: Callable, own: Any) -> None:
    server, index = own
    opened = visit(server=server)
    page = opened.open("/features", ROWS)
    page.click(".ag-row[row-id='2'] .star")
    page.wait_for_selector(".ag-row[row-id='2'] .star[aria-pressed=true]")
    page.hover(".ag-row[row-id='4'] .cell-tokens")
    page.click(".ag-row[row-id='4'] .edit")
    page.fill(".ag-cell-inline-editing input", "<i>weather</i>")
    page.press(".ag-cell-inline-editing input", "Enter")
    page.wait_for_selector(".ag-row[row-id='4'] .label:has-text('<i>weather</i>')")
    deadline = time.monotonic() + 60
    while not (index.labels.get(2).starred and index.labels.get(4).text) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert (index.labels.get(2).starred, index.labels.get(4).text) == (True, "<i>weather</i>")
    assert page.url.split("?")[0].endswith("/features")
    page = opened.open("/features?starred=1", ROWS)
    assert listed(page) == [2]
    page = opened.open("/feature/4", ".feature-title:has-text('<i>weather</i>')")
    opened.check()


def test_columns_sort_and_export_follow_the_address(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features?cols=density,token_entropy&sort=token_entropy:asc&show=alive", ROWS)
    assert page.get_attribute(".ag-header-cell[col-id=token_entropy]", "aria-sort") == "ascending"
    assert page.locator(".ag-header-cell[col-id=max_value]").count() == 0
    page.focus("a[data-export=csv]")
    address = urlsplit(page.get_attribute("a[data-export=csv]", "href"))
    assert address.path == f"/export/{'fa4e' * 3}/features.csv"
    assert parse_qs(address.query) == {
        "cols": ["density,token_entropy"],
        "sort": ["token_entropy:asc"],
        "show": ["alive"],
    }
    opened.check()


def test_a_snippet_unfolds_into_its_document_and_is_copied(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2", ".example .tok.centre")
    page.click(".example [data-unfold] >> nth=1")
    page.wait_for_selector(".example .document .tok.centre[data-on]")
    page.wait_for_selector(".document-status:has-text('the whole document')")
    text = "".join(page.locator(".document .tok").all_text_contents()).replace("⏎", "")
    assert any(text.replace("\n", "") == whole[3].replace("\n", "") for whole in fakes.TEXTS)
    page.hover(".document .tok.centre")
    page.wait_for_selector("#tip:has-text('rank')")
    page.click(".example [data-copy-example] >> nth=0")
    page.wait_for_selector("#toast:has-text('Example copied')")
    assert re.search(
        r"\(feature 2, strength [\d.]+, .* position \d+\)$", page.evaluate("navigator.clipboard.readText()")
    )
    page.click(".examples-part .mantine-SegmentedControl-label:has-text('Document')")
    page.wait_for_selector(".example.whole .document .tok.centre")
    assert query(page)["context"] == "document"
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:has-text('Feature 3')")
    page.wait_for_selector(".example.whole .document .tok.centre")
    opened.check()


def test_the_live_test_colours_a_text_and_can_be_called_off(visit: Callable) -> None:
    opened = visit()
    fakes.GATE.clear()
    page = opened.open("/feature/2", ".example .tok.centre")
    page.fill("#live-text", "wait for me")
    page.click("#live-run")
    page.wait_for_selector("#live-cancel:visible")
    page.click("#live-cancel:visible")
    page.wait_for_selector("#live-result:has-text('Cancelled')")
    fakes.GATE.set()
    page.fill("#live-text", "The <b>hot</b> day")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#live-result .strip .tok")
    assert page.text_content("#live-result .strip").endswith("The <b>hot</b> day")
    assert query(page)["try"] == "The <b>hot</b> day"
    page.reload()
    page.wait_for_selector("#live-result .strip .tok")
    opened.check()


def test_all_logits_are_asked_for_once_and_come_with_the_next_feature(visit: Callable) -> None:
    opened = visit()
    fakes.GATE.set()
    page = opened.open("/feature/2", ".example .tok.centre")
    page.click("#logits-ask")
    page.wait_for_selector("#logits-histogram .bars")
    assert query(page)["logits"] == "all"
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:has-text('Feature 3')")
    page.wait_for_selector("#logits-histogram .bars")
    page.hover("#logits-histogram")
    with page.expect_download() as saved:
        page.click(".all-logits [data-save-figure=svg]")
    assert saved.value.suggested_filename == "feature-3-logits-histogram.svg"
    page.click(".cofiring button[data-sort=pmi]")
    assert page.get_attribute(".cofiring th:has([data-sort=pmi])", "aria-sort") == "descending"
    opened.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_pages_have_no_serious_finding_with_everything_open(visit: Callable, theme: str) -> None:
    opened = visit(theme=theme)
    page = opened.open("/features?a=language:ja&colour=top_language&low=0.001", ".features-grid .cell-rate")
    page.wait_for_selector(POINTS)
    assert serious(page) == []
    page = opened.open("/feature/15?language=ar&context=document&try=hot", ".document .tok.centre")
    page.wait_for_selector("#live-result .strip .tok")
    assert serious(page) == []
    opened.check()


def test_neither_page_scrolls_sideways_on_a_phone(visit: Callable) -> None:
    opened = visit(width=390)
    for path, ready in (
        ("/features?a=language:ja", ".features-grid .cell-rate, .features-grid .cell-name"),
        (f"/feature/{fakes.LONG_LABEL}?context=document", ".document .tok.centre"),
        ("/feature/20?language=ja", ".example .tok.centre"),
        (f"/feature/{fakes.DEAD}", ".state"),
    ):
        page = opened.open(path, ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    opened.check()


# --- on the real index ----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_two_pages_of_the_real_index(visit: Callable, demo_workspace: Path, serve: Callable) -> None:
    from scope.workspace import Workspace

    workspace = Workspace(demo_workspace)
    index = workspace.index(workspace.indexes()[0].id)
    opened = visit(server=serve(workspace))
    tokens = index.documents.groupby("language")["n_tokens"].sum().sort_values(ascending=False)
    language = tokens.index[1]  # the text is small: which languages are in it is the sample's order
    page = opened.open(f"/features?a=language:{language}&show=alive&colour=top_language", ".features-grid .cell-rate")
    page.wait_for_selector(POINTS)
    wanted = listing(index, FeatureQuery.of(query(page))).ids.tolist()
    assert listed(page)[:5] == wanted[:5]
    with page.expect_download() as saved:
        page.click("a[data-export=csv]")
    assert pd.read_csv(saved.value.path(), encoding="utf-8-sig").iloc[:, 0].tolist()[:3] == wanted[:3]

    page = opened.open(
        f"/feature/{wanted[0]}?context=document&try=%E6%9D%B1%E4%BA%AC%E3%81%AF", ".document .tok.centre"
    )
    page.wait_for_selector("#live-result .strip .tok", timeout=MODEL_TIMEOUT)
    page.click("#logits-ask")
    page.wait_for_selector("#logits-histogram .bars", timeout=MODEL_TIMEOUT)
    snippet = page.get_attribute(".code [data-copy]", "data-copy")
    made: dict[str, Any] = {}
    exec(snippet, made)  # the lines are ours: what is tested is that they run as they stand
    assert made["firings"]["feature"].unique().tolist() == [wanted[0]]
    assert made["direction"].shape == (made["sae"].d_in,)
    assert made["feature"].id == wanted[0]
    for one in made["examples"]:
        assert one.feature == wanted[0]
    opened.check()
