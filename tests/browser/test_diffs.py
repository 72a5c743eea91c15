"""A comparison of two models on the compare page: listed, shown, accessible, as wide as the screen, markup as text."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_browser import serious
from helpers_diffing import written_report

pytestmark = pytest.mark.browser

MARKUP = "<b>thou</b>"


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_two_models_are_shown(visit: Callable, serve: Callable, tmp_path: Path, width: int, theme: str) -> None:
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
    assert MARKUP in page.text_content("[aria-label='Features that changed beyond the control']")
    assert "B / control" in page.text_content("[aria-label='Features that changed beyond the control']")
    assert "control's change" in page.text_content("[aria-label='Predictions by source']")
    assert "2 in the control" in page.text_content("dl.stats >> nth=-1")
    assert "plays" in page.text_content("[aria-label='Changed features by source']")
    assert "does not hold" in page.text_content("[aria-label='Conclusions']")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    opened.open("/compare?diff=nothing", ".state.error")
    opened.check()
