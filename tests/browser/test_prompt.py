"""The prompt page and the logit lens over the index in memory."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import helpers_dashboards as fakes
import pytest
from helpers_browser import query, serious

pytestmark = pytest.mark.browser

TEXT = "The opposite of hot is"
PROMPT = "/prompt?text=" + quote(TEXT)
LENS = "/lens?text=" + quote(TEXT)
GRID = "#prompt-heatmap table"


def row_ids(page) -> list[str]:
    return page.locator("#prompt-heatmap tbody tr").evaluate_all("rows => rows.map(row => row.dataset.id)")


def test_a_cell_of_the_heatmap_selects_and_pins_stay_in_the_address(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PROMPT, GRID)
    assert page.locator("#prompt-heatmap thead th").count() == 1 + 6
    cell = page.locator("#prompt-heatmap tbody tr:nth-child(2) td[data-on]").first
    place = cell.get_attribute("data-place")
    feature = row_ids(page)[1]
    cell.click()
    page.wait_for_selector("#prompt-heatmap td[aria-selected=true]")
    assert (query(page)["token"], query(page)["feature"]) == (place, feature)
    assert page.get_attribute("#prompt-strip [aria-selected=true]", "data-n") == place
    last = row_ids(page)[-1]
    page.click(f"#prompt-heatmap tr[data-id='{last}'] .pin")
    opened.until(f"document.querySelector('#prompt-heatmap tbody tr').dataset.id === '{last}'")
    page.click(".firings-part button:has-text('Pin this token')")
    page.click("button:has-text('1 pinned token')")
    opened.until("document.querySelectorAll('#prompt-heatmap thead th').length === 2")
    assert {"pins": last, "at": place, "columns": "pinned"}.items() <= query(page).items()
    page.reload()
    page.wait_for_selector(GRID)
    assert row_ids(page)[0] == last
    assert page.locator("#prompt-heatmap thead th").count() == 2
    page.click("button:has-text('Unpin all')")
    opened.until("document.querySelectorAll('#prompt-heatmap thead th').length > 2")
    assert not {"at", "columns"} & set(query(page))
    opened.check()


def test_the_heatmap_is_a_table_that_arrow_keys_walk_over(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PROMPT + "&token=2", GRID)
    assert page.locator("#prompt-heatmap [tabindex='0']").count() == 1
    page.locator("#prompt-heatmap td[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("[document.activeElement.dataset.place, document.activeElement.parentElement.rowIndex]") == [
        "3",
        2,
    ]
    page.wait_for_selector("#tip:has-text('token 3')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#prompt-heatmap td[aria-selected=true]")
    assert query(page)["token"] == "3"
    opened.until("document.activeElement.dataset.place === '3'")
    opened.check()


def test_order_by_corrected_strength(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PROMPT + "&token=4", ".firing-bar")
    before = page.locator(".firings .firing-id a").all_text_contents()
    page.click("button:has-text('By corrected strength')")
    page.wait_for_selector(".firing-head:has-text('Corrected')")
    shown = page.locator(".firing-bar.strength .number").all_text_contents()
    assert [float(one) for one in shown] == sorted((float(one) for one in shown), reverse=True)
    after = page.locator(".firings .firing-id a").all_text_contents()
    assert sorted(after) == sorted(before)
    assert after != before
    page.click(".firing-head .define")
    assert "log₂" in page.text_content("#tip")
    opened.check()


def test_features_are_ordered_by_what_they_did_for_a_chosen_token(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PROMPT + "&token=3", GRID)
    page.click("#prompt-result aside .chips .chip >> nth=0")
    page.wait_for_selector(".firing-head:has-text('Pushes')")
    assert {"target"} <= query(page).keys()
    page.click(".attribution button:text-is('Attribution patching')")
    page.wait_for_selector(".attribution p:has-text('3.25')")
    assert query(page)["method"] == "attribution_patching"
    assert "attribution patching" in page.text_content(".prompt-strip-part .legend")
    page.click(".attribution [aria-label='Against another next token'] .chip >> nth=1")
    page.wait_for_selector(".attribution p:has-text('The difference of the logits is')")
    assert "rather than" in page.text_content(".firing-head")
    page.click(".attribution [aria-label='After which token'] .chip:has-text('3')")
    opened.until("new URL(location).searchParams.get('after') === '3'")
    page.wait_for_selector(".attribution [aria-label='After which token'] [aria-pressed=true]:has-text('3')")
    page.reload()
    page.wait_for_selector(".attribution p:has-text('3.25')")
    opened.check()


def test_a_next_token_that_is_being_typed_stays_when_an_answer_comes(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PROMPT + "&token=4&target=2", ".firing-bar.effect")
    page.focus("#prompt-target-text")
    page.keyboard.type("co")
    page.evaluate("document.querySelector('#prompt-target-text').dataset.old = 'yes'")
    page.evaluate("window.scope.select({ sort: 'strength' })")
    page.wait_for_selector("#prompt-target-text:not([data-old])")
    page.keyboard.type("ld")
    assert page.input_value("#prompt-target-text") == "cold"
    page.keyboard.press("Enter")
    page.wait_for_selector(".chip:has-text('chosen'):has-text('cold')")
    opened.check()


def test_two_prompts_beside_each_other(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PROMPT, GRID)
    page.click("[data-compare]")
    page.wait_for_selector("#prompt-text2:visible")
    opened.until(f"document.querySelector('#prompt-text2').value === '{TEXT}'")
    page.fill("#prompt-text2", "The opposite of cold is so")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".next-rows .next-row")
    assert query(page)["text2"] == "The opposite of cold is so"
    assert page.locator("#prompt-strip-a .differs").all_text_contents() == [" hot"]
    assert page.locator("#prompt-strip-b .differs").all_text_contents() == [" cold", " so"]
    page.click("#prompt-strip-b .tok:has-text('cold')")
    page.wait_for_selector("h2:has-text('hot | ')")
    assert page.get_attribute("#prompt-strip-a [aria-selected=true]", "data-n") == "4"
    assert query(page)["token2"] == "4"
    page.click("button:has-text('Only in A')")
    page.wait_for_selector("button[aria-pressed=true]:has-text('Only in A')")
    only = page.locator(".panel:last-child .pair-row:not(.firing-head)")
    assert only.count() > 0
    of_b = only.locator(".firing-bar.strength .number").all_text_contents()[1::2]
    assert set(of_b) == {"0"}
    page.reload()
    page.wait_for_selector(".next-rows .next-row")
    assert page.get_attribute("#prompt-strip-b [aria-selected=true]", "data-n") == "4"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    page.click("[data-compare]")
    page.wait_for_selector(GRID)
    assert "text2" not in query(page)
    opened.check()


def test_a_chat_where_the_tokenizer_has_no_template_says_so(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/prompt", "[data-sample]")
    page.click("[data-mode=chat]")
    page.fill(".turn-text", "What is <b>hot</b>?")
    page.click("[data-add-turn]")
    page.fill(".turn-text >> nth=1", "Not cold.")
    assert page.input_value(".turn-role >> nth=1") == "assistant"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".state.error:has-text('no chat template')")
    assert query(page)["chat"] == '[["user","What is <b>hot</b>?"],["assistant","Not cold."]]'
    page.reload()
    page.wait_for_selector(".state.error")
    assert page.input_value(".turn-text >> nth=1") == "Not cold."
    page.click("[data-mode=text]")
    page.fill("#prompt-text", TEXT)
    page.click("[data-run]")
    page.wait_for_selector(GRID)
    assert "chat" not in query(page)
    opened.check()


def test_the_lens(visit: Callable) -> None:
    opened = visit()
    page = opened.open(LENS, "#lens-chart .main-svg")
    rows = page.locator("#lens-grid tbody tr").evaluate_all("rows => rows.map(row => row.dataset.id)")
    assert rows == ["5", "4", "3", "2", "1", "0"]
    cell = page.locator("#lens-grid tr[data-id='2'] td >> nth=3")
    likeliest = cell.text_content()
    cell.click()
    page.wait_for_selector("aside .unit:has-text('layer 2')")
    assert (query(page)["layer"], query(page)["token"]) == ("2", "3")
    chips = page.locator("aside .chips .chip .token-text")
    assert chips.first.text_content() == likeliest
    page.locator("aside .chips .chip[aria-pressed=false]").first.click()
    page.wait_for_selector(".chip-pair >> nth=3")
    opened.until("document.querySelectorAll('#lens-chart .legend .traces').length === 4")
    page.click("button:has-text('Rank') >> nth=0")
    opened.until("/^[\\d,]+$/.test(document.querySelector('#lens-grid td').textContent)")
    page.click("button:has-text('SAE spliced in')")
    page.wait_for_selector("#lens-grid tr[data-id='3'] .row-mark:has-text('SAE')")
    page.wait_for_selector("p:has-text('without the SAE')")
    asked = query(page)
    assert (asked["sae"], asked["show"], len(asked["follow"].split(","))) == ("splice", "rank", 4)
    page.reload()
    page.wait_for_selector("#lens-chart .main-svg")
    assert page.locator(".chip-pair").count() == 4
    page.fill("#lens-target-text", "cold")
    page.press("#lens-target-text", "Enter")
    page.wait_for_selector(".chip-pair >> nth=4")
    opened.check()


def test_a_slow_lens_shows_progress_and_can_be_cancelled(visit: Callable) -> None:
    opened = visit()
    fakes.GATE.clear()
    page = opened.open("/lens?text=wait", "#lens-cancel:visible")
    page.wait_for_selector("#lens-step:has-text('Reading the layers')")
    page.click("#lens-cancel:visible")
    page.wait_for_selector("#lens-status:has-text('Cancelled')")
    fakes.GATE.set()
    page = opened.open("/lens?text=" + quote("word " * 600), ".state.error")
    assert "takes up to 512" in page.text_content(".state.error")
    opened.check()


def test_grids_are_saved_as_svg_and_png(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/prompt?text=" + quote("a <b>bold</b> word"), GRID)
    with page.expect_download() as saved:
        page.click("#prompt-result [data-save-grid=svg]")
    svg = Path(saved.value.path()).read_text()
    assert svg.startswith("<svg")
    assert "&lt;" in svg
    assert "<b>" not in svg
    with page.expect_download() as saved:
        page.click("#prompt-result [data-save-grid=png]")
    assert Path(saved.value.path()).read_bytes()[:4] == b"\x89PNG"
    opened.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_not_wider_than_a_phone(visit: Callable, theme: str) -> None:
    opened = visit(width=390, theme=theme)
    texts = "مرحبا بالعالم 東京は👩‍👩‍👧 日本\nfor line in server:\n    del line " + "x" * 90
    for path, ready in (
        ("/prompt?text=" + quote(texts) + "&token=3&target=2&pins=5&at=2", GRID),
        (PROMPT + "&token=3&target=2&method=integrated_gradients&against=4", ".attribution p"),
        (PROMPT + "&text2=" + quote("The opposite of cold is"), ".next-rows .next-row"),
        ("/lens?text=" + quote(texts) + "&sae=read&show=kl", "#lens-chart .main-svg"),
    ):
        page = opened.open(path, ready)
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        assert serious(page) == [], path
    opened.check()
