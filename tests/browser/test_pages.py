"""The pages over an index in memory with everything that is hard to show."""

import re
from collections.abc import Callable
from urllib.parse import quote

import helpers_dashboards as fakes
import pytest
from helpers_browser import query, serious

pytestmark = pytest.mark.browser

MARKUP = "A <script>alert('no')</script> & <b>bold</b>"
PAGES = {
    "workspace": "/",
    "features": "/features",
    "feature": "/feature/2?n=6",
    "dead": f"/feature/{fakes.DEAD}",
    "prompt": "/prompt?text=" + quote(MARKUP) + "&token=4&target=2",
}
READY = {
    "workspace": ".card",
    "features": ".features-grid .cell-spark",
    "feature": ".example .tok",
    "dead": ".state",
    "prompt": "#prompt-strip .tok",
}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_quiet_accessible_and_stays_on_this_machine(visit: Callable, theme: str) -> None:
    opened = visit(theme=theme)
    for name, path in PAGES.items():
        page = opened.open(path, READY[name])
        page.wait_for_timeout(150)
        assert serious(page) == [], name
        assert page.title().endswith("Scope")
    opened.check()


def test_no_page_scrolls_sideways_on_a_phone(visit: Callable) -> None:
    opened = visit(width=390)
    for name, path in PAGES.items():
        page = opened.open(path, READY[name])
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    opened.check()


def test_markup_is_text(visit: Callable) -> None:
    opened = visit()
    page = opened.open(PAGES["prompt"], READY["prompt"])
    assert MARKUP in page.text_content("#prompt-strip")
    assert page.locator(".strip script, .strip b, .example script").count() == 0
    page = opened.open("/features?q=script", READY["features"])
    assert "script" in page.text_content(".features-grid")
    page = opened.open("/feature/2?source=handbook", ".example")
    assert page.locator(".from", has_text="Handbook of <b>markup</b> & more").count() > 0
    opened.check()


def test_browser_sorts_and_filters_on_the_server_and_keeps_it_in_the_address(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features", READY["features"])
    assert page.text_content("#features-count") == f"{fakes.FEATURES} features"
    page.click(".ag-header-cell[col-id=max_value]")
    opened.until("new URL(location).searchParams.get('sort') === 'max_value:desc'")
    page.fill("#features-text", "sleepy")
    opened.until("new URL(location).searchParams.get('q') === 'sleepy'")
    opened.until("document.querySelector('#features-count').textContent.includes(' of ')")
    count = page.text_content("#features-count")
    page.reload()
    page.wait_for_selector(READY["features"])
    assert page.input_value("#features-text") == "sleepy"
    assert page.text_content("#features-count") == count
    assert page.get_attribute(".ag-header-cell[col-id=max_value]", "aria-sort") == "descending"
    page = opened.open("/features?show=dead", ".features-grid .ag-row a")
    assert page.text_content("#features-count") == f"1 of {fakes.FEATURES} features"
    page.fill("#features-text", "no such token")
    opened.until("document.querySelector('#features-count').textContent.startsWith('No feature matches')")
    opened.check()


def test_keys(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2?show=random", READY["feature"])
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:has-text('Feature 3')")
    assert query(page)["show"] == "random"
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("h1:has-text('Feature 2')")
    page.go_back()
    page.wait_for_selector("h1:has-text('Feature 3')")
    page.go_forward()
    page.wait_for_selector("h1:has-text('Feature 2')")
    page.keyboard.press("r")
    opened.until("!document.querySelector('h1').textContent.endsWith(' 2')")
    page.keyboard.press("?")
    assert page.is_visible("dialog#keys")
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    page.wait_for_selector("#toast:has-text('Link copied')")
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    page.keyboard.press("/")
    page.keyboard.type("sleepy")
    page.keyboard.press("Enter")
    page.wait_for_selector(READY["features"])
    assert query(page)["q"] == "sleepy"
    opened.check()


def test_examples_by_quantile_language_and_source_are_in_the_address(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2", READY["feature"])
    page.click(".examples-part .mantine-SegmentedControl-label:has-text('Quantiles')")
    page.wait_for_selector(".examples h3:has-text('Strongest 10%')")
    assert query(page)["show"] == "quantiles"
    page.click(".bars a:has-text('gutenberg')")
    opened.until("new URL(location).searchParams.get('source') === 'gutenberg'")
    opened.until("!document.querySelector('.examples h3') && document.querySelector('.example')")
    assert set(
        page.locator(".example .from").evaluate_all("all => all.map(one => one.textContent.split(' · ')[1])")
    ) == {"gutenberg"}
    page.go_back()
    page.wait_for_selector(".examples h3:has-text('Strongest 10%')")
    page.reload()
    page.wait_for_selector(".examples h3:has-text('Strongest 10%')")
    page.go_back()
    opened.until("!new URL(location).searchParams.has('show')")
    page.wait_for_selector(".example")
    page.click("button:has-text('Show 20 more')")
    opened.until("document.querySelectorAll('.example').length > 20")
    assert query(page)["n"] == "40"
    opened.check()


def test_pointing_at_a_token_says_its_value_and_rank_and_a_click_pins_what_else_fires(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2", READY["feature"])
    token = page.locator(".example .tok.centre").first
    token.hover()
    page.wait_for_selector("#tip:has-text('rank')")
    assert re.search(r"rank \d+ of \d+ features? here", page.text_content("#tip"))
    token.click()
    page.wait_for_selector("#tip.pinned li a")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")
    page.click(".define >> nth=0")
    assert "firings / indexed tokens" in page.text_content("#tip")
    opened.check()


MARKS_OF_THEIR_OWN = """async () => {
    const strip = document.createElement("div");
    strip.className = "strip";
    const t = ["e", "\\u0301", " \\u0628", "\\u064e\\u0651", "\\u0915", "\\u094d"];
    strip.dataset.strip = JSON.stringify({t, v: [0, 1, 0, 1, 0, 1], m: 1});
    document.querySelector("main").append(strip);
    for (let n = 0; n < 50 && !strip.children.length; n++) await new Promise((done) => setTimeout(done, 20));
    return Array.from(strip.querySelectorAll(".ink"), (one) => one.getBoundingClientRect().width);
}"""


def test_right_to_left_examples_run_right_to_left(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/15?language=ar", READY["feature"])
    assert page.locator(".example .strip").first.evaluate("one => getComputedStyle(one).direction") == "rtl"
    assert page.locator("main").evaluate("one => getComputedStyle(one).direction") == "ltr"
    widths = page.evaluate(MARKS_OF_THEIR_OWN)
    assert all(width > 1 for width in widths), widths
    opened.check()


def test_states_say_what_happened_and_what_to_do(visit: Callable, serve: Callable) -> None:
    opened = visit()
    page = opened.open(f"/feature/{fakes.DEAD}", ".state")
    assert "never fires" in page.text_content(".state")
    page = opened.open("/feature/96", ".state.error")
    assert "0 to 95" in page.text_content(".state.error")
    page = opened.open("/feature/-1", ".state.error")
    page = opened.open("/features?index=nothing", ".state.error")
    assert "nothing" in page.text_content(".state.error")
    page = opened.open("/no/such/page", ".state.error")
    page = opened.open("/feature/2?language=xx", ".state.error")
    page = opened.open("/feature/2?show=best", ".state.error")
    opened.check()
    empty = visit(server=serve(fakes.FakeWorkspace()))
    page = empty.open("/", ".state")
    assert "scope demo" in page.text_content(".state .code")
    page = empty.open("/features", ".state")
    assert "no feature index" in page.text_content(".state").lower()
    empty.check()


def test_prompt_runs_and_its_address_restores_it(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/prompt", "[data-sample]")
    page.fill("#prompt-text", "The opposite of hot is")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(READY["prompt"])
    page.click("#prompt-strip .tok:has-text('hot')")
    page.wait_for_selector(".firing")
    page.click("aside .chips .chip >> nth=0")
    page.wait_for_selector(".firing-bar.effect")
    page.click("button:has-text('By effect')")
    page.click(".firing-label >> nth=1")
    page.wait_for_selector(".firing-label[aria-pressed=true]")
    asked = query(page)
    assert asked["text"] == "The opposite of hot is"
    assert asked["token"] == "4"
    assert {"feature", "target"} <= set(asked)
    assert asked["sort"] == "effect"
    effects = page.locator(".firing-bar.effect .number").all_text_contents()
    page.reload()
    page.wait_for_selector(".firing-bar.effect")
    assert page.locator(".firing-bar.effect .number").all_text_contents() == effects
    assert page.get_attribute("#prompt-strip [aria-selected=true]", "data-n") == "4"
    page.fill(".target-text input", "cold")
    page.press(".target-text input", "Enter")
    page.wait_for_selector(".chip:has-text('chosen')")
    page.click(".firing a >> nth=0")
    page.wait_for_selector(".feature-page")
    page.go_back()
    page.wait_for_selector(".firing-bar.effect")
    opened.check()


def test_a_slow_prompt_shows_progress_can_be_cancelled_and_blocks_nobody(visit: Callable) -> None:
    opened, other = visit(), visit()
    fakes.GATE.clear()
    page = opened.open("/prompt?text=wait", "#prompt-cancel:visible")
    page.wait_for_selector("#prompt-step:has-text('Running the model')")
    other.open("/feature/2", READY["feature"])
    page.click("#prompt-cancel:visible")
    page.wait_for_selector("#prompt-status:has-text('Cancelled')")
    fakes.GATE.set()
    page = opened.open("/prompt?text=" + quote("word " * 2100), ".state.error")
    assert "takes up to 2,048" in page.text_content(".state.error")
    opened.check()
    other.check()


def test_theme_is_remembered(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/feature/2", READY["feature"])
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.click(".theme-toggle")
    opened.until(f"{background} !== '{before}'")
    opened.until("document.querySelector('#feature-histogram .main-svg').style.background !== 'rgb(255, 255, 255)'")
    page.reload()
    page.wait_for_selector(READY["feature"])
    assert page.evaluate(background) != before
    opened.check()
