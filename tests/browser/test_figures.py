"""Every figure on every page can be saved as PNG and SVG."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers_runs import trained_workspace

pytestmark = pytest.mark.browser

FIGURES = ".js-plotly-plot, .token-grid, .scatter canvas"
FRAMES = {".js-plotly-plot": ".figure", ".token-grid": ".panel", ".scatter canvas": ".plot-part"}
"""What a kind of figure and its two buttons stand in."""
PAGES = {
    "/features": (".scatter-note:has-text('features')", 1),
    "/feature/2?logits=all": ("#logits-histogram .main-svg", 2),
    "/prompt?text=The+hot+day": (".token-grid table", 1),
    "/lens?text=The+hot+day": ("#lens-chart .main-svg", 2),
}
"""Pages of the index in memory: what to wait for, and figures."""
RUNS = {
    "/training": ("#training-pareto .main-svg", 9),
    "/training/topk-2": (".curves .main-svg", 8),
    "/compare?a=topk-2&b=topk-4": ("#compare-histogram .main-svg", 1),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, serve: Callable[[Any], Any]) -> Any:
    from scope.workspace import Workspace

    return serve(Workspace(trained_workspace(tmp_path_factory.mktemp("runs") / "workspace")))


def save_all(opened: Any, n: int, saved_ones: int = 2) -> None:
    """Each figure of a page has its two buttons; save some of them both ways, and look at the files."""
    page = opened.page
    opened.until(f"document.querySelectorAll('{FIGURES}').length >= {n}")
    frames = page.locator(", ".join(f"{around}:has({kind})" for kind, around in FRAMES.items()))
    opened.until(f"document.querySelectorAll('{FIGURES}').length === {frames.count()}")
    for place in range(frames.count()):
        saves = frames.nth(place).locator("[data-save-figure], [data-save-grid], [data-save-scatter]")
        assert saves.all_text_contents() == ["PNG", "SVG"]
    for place in range(min(saved_ones, frames.count())):
        frame = frames.nth(place)
        for kind in ("png", "svg"):
            frame.hover()
            with page.expect_download() as saved:
                frame.locator(f"[data-save-figure={kind}], [data-save-grid={kind}], [data-save-scatter={kind}]").click()
            content = Path(saved.value.path()).read_bytes()
            assert saved.value.suggested_filename.endswith(f".{kind}")
            assert len(content) > 500
            if kind == "png":
                assert content.startswith(b"\x89PNG")
            else:
                assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"


def test_figures_about_an_index_are_saved(visit: Callable) -> None:
    opened = visit()
    for path, (ready, n) in PAGES.items():
        opened.open(path, ready)
        save_all(opened, n)
    opened.check()


def test_figures_about_trainings_are_saved(visit: Callable, trained: Any) -> None:
    opened = visit(server=trained)
    for path, (ready, n) in RUNS.items():
        opened.open(path, ready)
        save_all(opened, n, saved_ones=1)
    opened.check()
