"""The steering page over the index in memory: sliders, texts that arrive as they are written, named interventions."""

from collections.abc import Callable
from urllib.parse import quote

import helpers_dashboards as fakes
import pytest
from helpers_browser import query, serious

pytestmark = pytest.mark.browser

STEER = "/steer?text=" + quote("The opposite of hot is") + "&push=" + quote("5:2,9:-1.5")
DONE = ".steer-changes"
MARKUP = "<script>alert(1)</script>"


def test_features_are_pushed_by_sliders_and_the_address_says_how_far(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/steer", "#steer-add")
    page.fill("#steer-add", "5")
    page.press("#steer-add", "Enter")
    page.wait_for_selector(".pushed [role=slider]")
    assert query(page)["push"] == "5:1"
    page.fill("#steer-add", str(fakes.DEAD))
    page.press("#steer-add", "Enter")
    page.wait_for_selector("#steer-answer [role=alert]:has-text('never fires')")
    page.focus(".pushed [role=slider]")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    opened.until("new URL(location).searchParams.get('push') === '5:2'")
    page.wait_for_selector(".pushed-times:has-text('+2.00 ×')")
    page.click(".steer-setting button:text-is('New text')")
    page.wait_for_selector(".steer-setting [aria-pressed=true]:text-is('New text')")
    assert query(page)["during"] == "generated"
    assert page.get_attribute(".pushed [role=slider]", "aria-valuenow") == "2"
    page.click(".pushed button[aria-label='Do not push feature 5']")
    page.wait_for_selector(".pushed", state="detached")
    assert "push" not in query(page)
    opened.check()


def test_words_find_features_to_push(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/steer?push=5:1", ".pushed")
    page.fill("#steer-add", "sleepy")
    page.press("#steer-add", "Enter")
    page.click("#steer-answer .chip >> nth=0")
    opened.until("document.querySelectorAll('.pushed').length === 2")
    assert query(page)["push"].startswith("5:1,")
    opened.check()


def test_other_sliders_stay_where_they_are_when_a_feature_comes_or_goes(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/steer?push=5:1,9:1", ".pushed")
    page.fill("#steer-add", "sleepy")
    page.press("#steer-add", "Enter")
    page.wait_for_selector("#steer-answer .chip")
    page.focus(".pushed [role=slider] >> nth=0")
    page.keyboard.press("ArrowRight")
    opened.until("new URL(location).searchParams.get('push') === '5:1.25,9:1'")
    page.click("#steer-answer .chip >> nth=0")
    opened.until("document.querySelectorAll('.pushed').length === 3")
    assert query(page)["push"].startswith("5:1.25,9:1,")
    page.focus(".pushed [role=slider] >> nth=0")
    page.keyboard.press("ArrowRight")
    opened.until("new URL(location).searchParams.get('push').startsWith('5:1.5,')")
    page.click(".pushed button[aria-label='Do not push feature 9']")
    opened.until("document.querySelectorAll('.pushed').length === 2")
    assert query(page)["push"].startswith("5:1.5,")
    assert page.get_attribute(".pushed [role=slider] >> nth=0", "aria-valuenow") == "1.5"
    opened.check()


def test_what_is_typed_counts_at_once_and_stays_while_the_controls_are_drawn_anew(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/steer?push=5:1", ".pushed")
    page.fill("#steer-name", "a name")
    page.focus("#steer-add")
    page.evaluate(
        """() => {  // as fast as fingers can be: no moment between the last key and Enter
          const field = document.activeElement;
          document.execCommand("insertText", false, "9");
          field.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}));
        }"""
    )
    opened.until("document.querySelectorAll('.pushed').length === 2")
    assert query(page)["push"] == "5:1,9:1"
    opened.until("document.activeElement.id === 'steer-add' && document.activeElement.value === ''")
    assert page.input_value("#steer-name") == "a name"
    page.keyboard.type("1")
    page.evaluate("window.scope.select({ during: 'generated' })")
    page.wait_for_selector(".steer-setting [aria-pressed=true]:text-is('New text')")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    opened.until("new URL(location).searchParams.get('push') === '5:1,9:1,11:1'")
    opened.check()


def test_texts_arrive_as_they_are_written_and_what_a_push_costs_is_said(visit: Callable) -> None:
    fakes.GATE.clear()
    opened = visit()
    page = opened.open(STEER.replace("The", "wait%20The"), ".steer-text.writing")
    opened.until("document.querySelector('[data-side=random] .steer-text').textContent.includes('ملك')")
    assert page.locator(DONE).count() == 0
    assert page.is_visible("#steer-progress")
    fakes.GATE.set()
    page.wait_for_selector(DONE)
    assert page.locator(".steer-side").count() == 3
    assert MARKUP in page.text_content("[data-side=steered]")
    assert page.locator(".steer-side script").count() == 0
    assert "Perplexity" in page.text_content("[data-side=plain]")
    assert "KL a token" not in page.text_content("[data-side=plain]")
    assert page.locator("[data-side=steered] .tok[data-on]").count() > 0
    assert "+35.0" in page.text_content(DONE)
    # A text goes on where its prompt ends: it does not move when it is done.
    prompt, new = (page.locator(f"[data-side=plain] .steer-flow > {part}") for part in ("span", ".strip .tok >> nth=0"))
    assert abs(prompt.bounding_box()["y"] - new.bounding_box()["y"]) < 8
    page.reload()
    page.wait_for_selector(DONE)
    opened.check()


def test_writing_can_be_called_off_and_what_there_is_stays(visit: Callable) -> None:
    fakes.GATE.clear()
    opened = visit()
    page = opened.open(STEER.replace("The", "wait%20A"), ".steer-text.writing")
    page.click("#steer-cancel")
    page.wait_for_selector("#steer-status:has-text('Cancelled')")
    fakes.GATE.set()
    assert page.locator(".steer-text").count() == 3
    assert page.locator(".steer-text.writing").count() == 0
    opened.check()


def test_nothing_pushed_is_said_and_named_interventions_are_kept(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/steer", "[data-sample]")
    page.click("[data-sample] >> nth=0")
    page.wait_for_selector("#steer-status:has-text('Nothing is pushed yet')")
    page = opened.open(STEER, DONE)
    page.click("#steer-save")
    page.wait_for_selector("#steer-saved [role=alert]")
    page.fill("#steer-name", "warmer")
    page.click("#steer-save")
    page.click("#steer-named button:has-text('warmer')")
    page.wait_for_selector(".steer-words li")
    assert page.text_content(".steer-words") == "Add 2, -1.5 × the maximum of features 5, 9."
    assert query(page)["named"] == "warmer"
    page.reload()
    page.wait_for_selector(DONE)
    page.click("button:has-text('Use sliders')")
    opened.until("document.querySelectorAll('.pushed').length === 2")
    assert query(page)["push"] == "5:2,9:-1.5"
    page = opened.open("/steer?named=gone", "#steer-controls [role=alert]")
    assert "gone" in page.text_content("#steer-controls [role=alert]")
    opened.check()


def test_a_feature_is_ablated_on_demand_and_the_address_says_so(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2", "#ablation-ask")
    page.click("#ablation-ask")
    page.wait_for_selector("#ablation-result .strip .tok[data-on=pos]")
    assert "the loss rises by 0.0200 nats a token" in page.text_content("#ablation-result")
    assert query(page)["ablate"] == "1"
    page.reload()
    page.wait_for_selector("#ablation-result .strip .tok[data-on=neg]")
    assert page.locator("#ablation-result .example").count() == 3
    opened.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_not_wider_than_a_phone(visit: Callable, theme: str) -> None:
    for width in (1440, 390):
        opened = visit(width=width, theme=theme)
        for path, ready in ((STEER, DONE), ("/feature/2?ablate=1", "#ablation-result .strip .tok")):
            page = opened.open(path, ready)
            page.wait_for_timeout(150)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert serious(page) == [], path
            if path == STEER:  # how a token has changed is seen without scrolling sideways
                last = page.locator(".steer-changes th >> nth=-1").bounding_box()
                assert last["x"] + last["width"] <= width
        opened.check()
