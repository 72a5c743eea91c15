"""Trainings, comparisons and the workspace in a browser: accessible, quiet, live, and as wide as the screen."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import serious
from helpers_runs import trained_workspace, write_lines

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_workspace(tmp_path_factory.mktemp("runs") / "workspace")


@pytest.fixture(scope="module")
def served(folder: Path, serve: Callable[[Any], Any]) -> Any:
    from scope.workspace import Workspace

    return serve(Workspace(folder))


PAGES = {
    "/": ".table",
    "/training": ".curves .main-svg",
    "/training/diverged": ".state.error",
    "/compare": ".compare-form",
    "/compare?a=topk-2&b=topk-4": "#compare-histogram .main-svg",
}


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_pages_are_quiet_accessible_and_fit(visit: Callable, served: Any, width: int, theme: str) -> None:
    opened = visit(width=width, theme=theme, server=served)
    for path, ready in PAGES.items():
        page = opened.open(path, ready)
        assert serious(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    opened.check()


def test_a_training_grows_while_one_looks_and_runs_are_chosen(
    visit: Callable, folder: Path, serve: Callable[[Any], Any], tmp_path: Path
) -> None:
    from scope.workspace import Workspace

    copy = shutil.copytree(folder, tmp_path / "workspace")
    write_lines(copy, "live", range(1, 4))
    opened = visit(server=serve(Workspace(copy)))
    page = opened.page
    opened.open("/training", ".curves .main-svg")
    page.wait_for_selector("tr:has-text('live') .number:text-is('300')")
    write_lines(copy, "live", range(4, 9))
    page.wait_for_selector("tr:has-text('live') .number:text-is('800')")
    page.click("[aria-label='Leave out live']")
    page.wait_for_selector("[aria-label='Draw live']")
    assert "runs=" in page.url
    page.click(".training-head .chip:has-text('Steps')")
    page.wait_for_selector(".training-head .chip[aria-current=true]:has-text('Steps')")
    page.go_back()
    page.wait_for_selector(".training-head .chip[aria-current=true]:has-text('Tokens')")
    page.click("tr:has-text('diverged') td a >> nth=1")
    page.wait_for_selector("h2:has-text('It did not reach its end')")
    opened.check()


def test_an_artefact_is_verified_from_the_workspace_page(visit: Callable, served: Any) -> None:
    opened = visit(server=served)
    page = opened.page
    opened.open("/", ".table")
    page.click("[aria-label='Verify topk-4']")
    page.click("[aria-label='Verify topk-2']")  # while the first is under way
    for name in ("topk-4", "topk-2"):
        page.wait_for_selector(f"tr:has-text('{name}') .health:has-text('as it was written')")
    page.reload()
    page.wait_for_selector("tr:has-text('topk-4') .health:has-text('as it was written')")
    opened.check()


def test_two_saes_are_chosen_and_compared(visit: Callable, served: Any) -> None:
    opened = visit(server=served)
    page = opened.page
    opened.open("/compare", ".compare-form")
    for id, name in (("compare-a", "topk-2"), ("compare-b", "topk-4")):
        page.click(f"#{id}")
        page.click(f"[role=option]:has-text('{name}'):visible")
        opened.until(f"new URL(location).searchParams.has('{id[-1]}')")
    page.wait_for_selector("#compare-histogram .main-svg")
    page.click(".compare-result .chip:has-text('Only in B')")
    page.wait_for_selector(".compare-result .chip[aria-current=true]:has-text('Only in B')")
    assert "show=only-b" in page.url
    page.click("a:has-text('Swap')")
    page.wait_for_selector("#compare-histogram .main-svg")
    opened.check()
