"""Attention on the circuit page in a browser: heads of an edge and of a node, and why one looked where it did."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from helpers_models import one_thread, tiny_folder, tiny_model
from test_attribution_graph import ALL, transcoders
from test_dashboards_circuits import dictionary_folder

from scope.attribution.graph import build_graph
from scope.attribution.graph_json import save_graph
from scope.attribution.pruning import prune
from scope.workspace import Workspace

__all__ = ["dictionary_folder", "one_thread"]

pytestmark = pytest.mark.browser

AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}
GRAPH = "/circuit?graph=small"
SVG = ".circuit-svg"
PROMPT = "The <b>cat</b> sat on the mat"


@pytest.fixture(scope="module")
def dashboard(dictionary_folder: Path, tmp_path_factory: pytest.TempPathFactory, serve: Callable):
    """A dashboard over a small graph and its transcoders."""
    folder = tmp_path_factory.mktemp("attention") / "workspace"
    shutil.copytree(dictionary_folder, folder)
    workspace, model = Workspace(folder), tiny_model("gemma3")
    graph = prune(build_graph(model, PROMPT, transcoders(model), ALL), 0.6, 0.9)
    paths = tuple(str(entry.path) for entry in workspace.saes())
    folder_of_model = str(tiny_folder("gemma3"))
    save_graph(
        replace(graph, transcoders=paths, model_name=folder_of_model), workspace.path_for("circuit-graph", "small")
    )
    return serve(workspace)


def query(page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def open_pairs(opened):
    """A logit pinned, its heads shown, and the strongest head asked about."""
    page = opened.open(GRAPH, SVG)
    page.locator(".node.kind-logit").first.click()
    page.locator(".circuit-head button:has-text('Heads')").click()
    page.wait_for_selector("#circuit-heads-result [data-head]")
    page.locator("#circuit-heads-result [data-head]").first.click()
    page.wait_for_selector("#circuit-pairs-result tbody tr")
    return page


def test_a_head_of_a_node_says_why_it_looked_there(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    page = open_pairs(opened)
    pin = query(page)["pin"]
    assert query(page)["edge"] == ":" + pin
    head = query(page)["head"]
    assert "Heads that write it" in page.text_content("#circuit-heads-result")
    assert page.get_attribute("#circuit-heads-result [data-head]", "aria-pressed") == "true"
    assert page.locator("#circuit-pairs-result .circuit-why-table tbody tr").count() > 10
    assert "features" in page.text_content(".circuit-why-columns > section:last-child")
    # Another key, by keyboard; the address follows, and brings it all back.
    page.focus(".circuit-keys .strip")
    chosen = int(head.split(".")[3])
    page.keyboard.press("ArrowLeft" if chosen else "ArrowRight")
    other = head.rsplit(".", 1)[0] + f".{chosen - 1 if chosen else 1}"
    opened.until(f"new URL(location).searchParams.get('head') === '{other}'")
    opened.until(
        "document.querySelector('.circuit-keys .tok[aria-selected=true]')?.dataset.n === " + repr(other.split(".")[3])
    )
    page.reload()
    page.wait_for_selector("#circuit-pairs-result tbody tr")
    page.wait_for_selector("#circuit-heads-result [data-head][aria-pressed=true]")
    assert query(page)["head"] == other
    # Markup in a prompt stays text.
    assert page.locator(".circuit-keys b, .circuit-why h2 b").count() == 0
    # Asked no more.
    page.locator("#circuit-panel button:has-text('Let go')").click()
    assert page.is_hidden("#circuit-pairs-part")
    assert not {"head", "edge", "pin"} & query(page).keys()
    opened.check()


def test_a_head_that_is_not_there_is_said(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    for head, told in (("9.0.3.1", "layer is 9"), ("1.77.3.1", "head is 77"), ("<b>", "LAYER.HEAD.QUERY.KEY")):
        page = opened.open(f"{GRAPH}&head={head}", "#circuit-pairs-result .error")
        opened.until(f"document.querySelector('#circuit-pairs-result').textContent.includes('{told}')")
    assert page.locator("#circuit-pairs-result b").count() == 0


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_it_is_accessible(visit: Callable, dashboard, theme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened = visit(theme=theme, width=width, server=dashboard)
    page = open_pairs(opened)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.wait_for_timeout(200)
    found = Axe().run(page, options=AXE).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:300]) for v in found if v["impact"] in ("serious", "critical")] == []
    opened.check()
