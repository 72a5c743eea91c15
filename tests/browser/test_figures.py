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


def save_all(page: Any, n: int, saved_ones: int = 2) -> None:
    """Each figure of a page has its two buttons; save some of them both ways, and look at the files."""
    page.wait_for_timeout(200)
    frames = {
        id(frame): frame
        for kind, around in FRAMES.items()
        for frame in page.query_selector_all(f"{around}:has({kind})")
    }
    drawn = page.locator(FIGURES).count()
    assert drawn >= n
    assert len(frames) == drawn
    for frame in list(frames.values())[:saved_ones]:
        for kind in ("png", "svg"):
            (button,) = frame.query_selector_all(
                f"[data-save-figure={kind}], [data-save-grid={kind}], [data-save-scatter={kind}]"
            )
            frame.hover()
            with page.expect_download() as saved:
                button.click()
            content = Path(saved.value.path()).read_bytes()
            assert saved.value.suggested_filename.endswith(f".{kind}")
            assert len(content) > 500
            if kind == "png":
                assert content.startswith(b"\x89PNG")
            else:
                assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    for frame in frames.values():
        saves = frame.query_selector_all("[data-save-figure], [data-save-grid], [data-save-scatter]")
        assert [one.text_content() for one in saves] == ["PNG", "SVG"]


def test_figures_about_an_index_are_saved(visit: Callable) -> None:
    opened = visit()
    for path, (ready, n) in PAGES.items():
        save_all(opened.open(path, ready), n)
    opened.check()


def test_figures_about_trainings_are_saved(visit: Callable, trained: Any) -> None:
    opened = visit(server=trained)
    for path, (ready, n) in RUNS.items():
        save_all(opened.open(path, ready), n, saved_ones=1)
    opened.check()
