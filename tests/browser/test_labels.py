"""Labels in the browser: typed, saved, seen again, kept apart from the next feature's; figures and files saved."""

import csv
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_browser import serious
from helpers_features import tiny_index

from dashboards.components import labels
from scope.features.labels import ImportedLabel
from scope.workspace import Workspace

pytestmark = pytest.mark.browser

HARD = ['<script>alert("x")</script>', "=cmd()", "قط يجلس على السطح", "長い" * 100]
PATIENCE = 60.0
"""Seconds."""
TEXT = '[id*="label-text"]'
NOTES = '[id*="label-notes"]'
STAR = ".label-panel .star"
STATUS = ".label-panel [role=status]"


@pytest.fixture(scope="module")
def real(tmp_path_factory, serve: Callable) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("labels")
    built, _, _ = tiny_index(folder)
    workspace = Workspace(folder / "w")
    workspace.add(built.path)
    return SimpleNamespace(server=serve(workspace), labels=workspace.labels(built.id), index=workspace.index(built.id))


@pytest.fixture
def panel(visit: Callable, real: SimpleNamespace) -> Iterator[Callable]:
    """Opens a feature's page, in the one tab of a test and theme: `panel(3, width=390)`."""
    tabs: dict[tuple, Any] = {}

    def open(feature: int, **settings: Any) -> Any:
        key = tuple(settings.items())
        if key not in tabs:
            tabs[key] = visit(server=real.server, **settings)
        tab = tabs[key]
        tab.open(f"/feature/{feature}?index={real.index.id}", f'.label-panel [id*="label-text"][id*=":{feature}"]')
        return tab

    yield open
    for tab in tabs.values():
        tab.check()


def said(tab, words: str) -> None:
    tab.until(f"document.querySelector('{STATUS}').textContent.includes({json.dumps(words)})")


def test_a_label_is_saved_and_shows_as_text(panel, real):
    for feature, text in enumerate(HARD, start=10):
        tab = panel(feature)
        tab.page.fill(TEXT, text)
        tab.page.press(TEXT, "Enter")
        said(tab, "Label saved")
        assert real.labels.get(feature).text == text
    for feature, text in enumerate(HARD, start=10):
        assert panel(feature).page.input_value(TEXT) == text
        assert tab.page.locator("#content script").count() == 0


def test_a_label_of_200_characters_wraps_on_a_phone(panel, real):
    real.labels.set(6, text="long words " * 18)
    tab = panel(6, width=390, theme="dark")
    box = tab.page.locator(TEXT)
    assert box.bounding_box()["height"] > 60
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_by_keyboard_alone_notes_star_and_lists(panel, real):
    tab = panel(4)
    tab.page.focus(TEXT)
    tab.page.keyboard.type("mine")
    tab.page.keyboard.press("Tab")
    said(tab, "Label saved")
    assert tab.page.evaluate("document.activeElement.id").find("label-notes") >= 0
    tab.page.keyboard.type("first line")
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.type("second line")
    tab.page.keyboard.press("Tab")
    tab.until(f"document.querySelector('{STATUS}').textContent === 'Notes saved'")
    tab.page.keyboard.type("to look at")
    tab.page.keyboard.press("Enter")
    said(tab, "Lists saved")
    tab.page.keyboard.press("Escape")
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("s")
    said(tab, "Starred")
    assert tab.page.get_attribute(STAR, "aria-pressed") == "true"
    label = real.labels.get(4)
    assert (label.text, label.notes) == ("mine", "first line\nsecond line")
    assert (label.starred, label.lists) == (True, ("to look at",))


def test_ones_own_label_stands_before_an_imported_one_and_taken_away_shows_it_again(panel, real):
    real.labels.take_in([ImportedLabel(7, "<b>imported</b>", "neuronpedia: a model", "1")])
    tab = panel(7)
    assert tab.page.input_value(TEXT) == "<b>imported</b>"
    assert "neuronpedia: a model" in tab.page.text_content(".label-source")
    tab.page.focus(TEXT)
    tab.page.keyboard.press("Tab")
    tab.page.fill(TEXT, "my own")
    tab.page.press(TEXT, "Enter")
    said(tab, "Label saved")
    tab.until("document.querySelector('.label-source').textContent.includes('<b>imported</b>')")
    assert [stored.source for stored in real.labels.all(7)] == ["own", "neuronpedia: a model"]
    tab.page.fill(TEXT, "")
    tab.page.press(TEXT, "Enter")
    tab.until(f"document.querySelector('{TEXT}').value === '<b>imported</b>'")
    assert [stored.source for stored in real.labels.all(7)] == ["neuronpedia: a model"]


def test_what_is_too_long_is_not_saved_and_says_so(panel, real):
    tab = panel(8)
    tab.page.fill(TEXT, "x" * 2001)
    tab.page.press(TEXT, "Enter")
    said(tab, "Not saved. The label has 2,001 characters; at most 2,000 are kept.")
    assert real.labels.get(8).text == ""


def test_what_is_typed_while_a_label_is_saved_stays(panel, real, monkeypatch):
    asked, gate = threading.Event(), threading.Event()
    save = labels._changed

    def slow(*rest):
        asked.set()
        assert gate.wait(PATIENCE)
        return save(*rest)

    monkeypatch.setattr(labels, "_changed", slow)
    tab = panel(9)
    tab.page.fill(TEXT, "one  ")
    tab.page.press(TEXT, "Enter")
    assert asked.wait(PATIENCE)
    tab.page.keyboard.type("two")
    gate.set()
    said(tab, "Label saved")
    tab.until("document.querySelector('[data-label-of]').textContent === 'one'")
    assert tab.page.input_value(TEXT) == "one  two"
    tab.page.keyboard.press("Enter")
    tab.until(f"document.querySelector('{TEXT}').value === 'one two'")
    assert real.labels.get(9).text == "one two"


def test_two_parts_that_change_at_once_are_both_saved(panel, real):
    tab = panel(1)
    tab.page.evaluate(
        """of => {
          window.scope.setProps({ of, part: "label-text" }, { value: "both" });
          window.scope.setProps({ of, part: "label-star" }, { n_clicks: 1 });
        }""",
        f"{real.index.id}:1",
    )
    said(tab, "Starred")
    assert (real.labels.get(1).text, real.labels.get(1).starred) == ("both", True)


def test_what_was_typed_is_saved_when_one_goes_on_to_the_next_feature(panel, real):
    tab = panel(2)
    tab.page.fill(TEXT, "typed and left")
    tab.page.click("[data-key=ArrowRight]")
    tab.until("document.querySelector('h1').textContent.includes('Feature') && !location.pathname.endsWith('/2')")
    tab.until(f"!!document.querySelector('{TEXT}') && document.querySelector('{TEXT}').value === ''")
    deadline = time.monotonic() + PATIENCE
    while not real.labels.get(2).text and time.monotonic() < deadline:
        tab.page.wait_for_timeout(50)
    assert real.labels.get(2).text == "typed and left"
    other = int(tab.page.evaluate("location.pathname").rsplit("/", 1)[1])
    assert real.labels.get(other).text == ""


def test_the_panel_is_accessible(panel):
    for theme in ("light", "dark"):
        tab = panel(4, theme=theme)
        assert serious(tab.page, ".label-panel") == []


def test_a_figure_is_saved_without_a_network(panel):
    tab = panel(3)
    tab.page.wait_for_selector("#feature-histogram .main-svg")
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<svg")):
        with tab.page.expect_download() as waited:
            tab.page.locator(f".figure [data-save-figure={kind}]").first.click()
        content = waited.value.path().read_bytes()
        assert waited.value.suggested_filename.endswith(f".{kind}")
        assert content.startswith(head)
        assert len(content) > 2_000


def test_files_are_downloaded_from_the_page(panel, real):
    tab = panel(3)
    with tab.page.expect_download() as waited:
        tab.page.click("a[href$='/feature/3/neuronpedia.json']")
    assert json.loads(waited.value.path().read_text("utf-8"))["index"] == "3"
    with tab.page.expect_download() as waited:
        tab.page.click("a[href$='/feature/3/activations.csv']")
    rows = list(csv.DictReader(io.StringIO(waited.value.path().read_text("utf-8-sig"))))
    assert len(rows) == real.index.table["n_firings"][3]
