"""A comparison of two models on the compare page: listed, shown, accessible, as wide as the screen, markup as text."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_diffing import written_report

pytestmark = pytest.mark.browser

AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
MARKUP = "<b>thou</b>"


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_two_models_are_shown(visit: Callable, serve: Callable, tmp_path: Path, width: int, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    from scope.workspace import Workspace

    id = written_report(tmp_path / "workspace" / "diffs" / "plays", MARKUP)
    opened = visit(width=width, theme=theme, server=serve(Workspace(tmp_path / "workspace")))
    page = opened.open("/", ".workspace-page")
    assert page.locator(f"a[href$='diff={id}']").text_content() == "plays"
    page = opened.open("/compare", ".compare-page .chip")
    page.click(".chip:has-text('plays')")
    page.wait_for_selector("#diff-layers .main-svg")
    assert f"diff={id}" in page.url
    page.wait_for_selector("#diff-scaling .main-svg")
    assert MARKUP in page.text_content("[aria-label='Features that changed']")
    assert "does not hold" in page.text_content("[aria-label='Conclusions']")
    found = Axe().run(page, options=AXE).response["violations"]
    serious = [(v["id"], v["nodes"][0]["html"][:300]) for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    opened.open("/compare?diff=nothing", ".state.error")
    opened.check()
