"""Attention and single edges on the circuit page in a browser: heads of an edge and of a node, why one looked where it
did, and whether an edge holds in the model."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_browser import query, serious
from helpers_models import one_thread, tiny_folder, tiny_model
from test_attribution_graph import ALL, transcoders
from test_dashboards_circuits import add_cross_layer, dictionary_folder

from scope.attribution.graph import build_graph
from scope.attribution.graph_json import save_graph
from scope.attribution.pruning import prune
from scope.workspace import Workspace

__all__ = ["dictionary_folder", "one_thread"]

pytestmark = pytest.mark.browser

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
    add_cross_layer(workspace)
    across = next(entry for entry in workspace.saes() if entry.name == "across")
    graph = prune(build_graph(model, PROMPT, [workspace.sae(across.id)], ALL), 0.6, 0.9)
    graph = replace(graph, transcoders=(str(across.path),), model_name=folder_of_model)
    save_graph(graph, workspace.path_for("circuit-graph", "across"))
    return serve(workspace)


def again(opened) -> None:
    """Leave the page and come back to the same address."""
    path = opened.page.url.removeprefix(opened.url)
    opened.open("/circuit", ".circuit-page .table")
    opened.open(path, SVG)


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
    again(opened)
    page.wait_for_selector("#circuit-pairs-result tbody tr")
    page.wait_for_selector("#circuit-heads-result [data-head][aria-pressed=true]")
    assert query(page)["head"] == other
    # Markup in a prompt stays text.
    assert page.locator(".circuit-keys b, .circuit-why h2 b").count() == 0
    page.wait_for_timeout(200)
    assert serious(page) == []
    # Asked no more.
    page.locator("#circuit-panel button:has-text('Let go')").click()
    assert page.is_hidden("#circuit-pairs-part")
    assert not {"head", "edge", "pin"} & query(page).keys()
    opened.check()


def test_an_edge_is_tested_and_marked_by_what_that_shows(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    page = opened.open(GRAPH, SVG)
    assert page.is_hidden(".circuit-sample .fails")
    page.locator(".node.kind-logit").first.click()
    page.locator(".circuit-list td button:has-text('Heads')").first.click()
    page.wait_for_selector("#circuit-test-run", state="visible")
    page.click("#circuit-test-run")
    page.wait_for_selector("#circuit-test-result .circuit-tested")
    said = page.text_content("#circuit-test-result strong")
    held = said == "It holds"
    rows = page.locator("#circuit-test-result tbody tr")
    assert [rows.nth(n).locator("th").text_content() for n in range(2)] == ["set to 0", "doubled"]
    assert page.locator(f".circuit-tested td.{'circuit-holds' if held else 'circuit-fails'}").count() == 2
    # The list beside says so too, and so does the page when it is opened again.
    opened.until("document.querySelector('#circuit-panel th:nth-child(3)')?.textContent === 'Holds'")
    word = page.text_content("#circuit-panel tbody tr:first-child td:nth-child(3)")
    assert word == ("yes" if held else "no")
    again(opened)
    page.wait_for_selector("#circuit-test-result .circuit-tested")
    assert page.text_content("#circuit-test-result strong") == said
    # Of a node there is nothing to test by itself.
    page.locator(".circuit-head button:has-text('Heads')").click()
    opened.until("document.querySelector('#circuit-test-part').hidden")
    opened.check()


def test_a_feature_of_a_cross_layer_transcoder_says_what_it_reads_and_writes(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    page = opened.open("/circuit?graph=across", SVG)
    keys = page.eval_on_selector_all(".node.kind-feature", "marks => marks.map((mark) => mark.dataset.node)")
    for layer, said in (("0", "reads L0 · writes L0 to L3"), ("2", "reads L2 · writes L2, L3")):
        key = next(key for key in keys if key.startswith(layer + "_"))
        page.locator(f'[data-node="{key}"]').hover()
        page.wait_for_selector("#tip .circuit-layers")
        page.locator(f'[data-node="{key}"]').click()
        opened.until(f"document.querySelector('#circuit-panel .circuit-layers')?.textContent === '{said}'")
    # How strongly it writes each of them, with what that does to the likeliest logit.
    page.locator(".circuit-head button:has-text('Layers')").click()
    rows = page.locator("#circuit-heads-result .circuit-writes tbody tr")
    rows.first.wait_for()
    assert rows.locator("th").all_text_contents() == ["L2", "L3"]
    assert query(page)["edge"] == key + ":"
    assert page.is_hidden("#circuit-test-part")
    again(opened)
    rows.first.wait_for()
    page.wait_for_timeout(200)
    assert serious(page) == []
    page.locator(".circuit-head button:has-text('Heads')").click()
    page.wait_for_selector("#circuit-heads-result [data-head]")
    page.locator("#circuit-heads-result [data-head]").first.click()
    page.wait_for_selector("#circuit-pairs-result tbody tr")
    # It can be chosen for another graph, beside those of single layers.
    page = opened.open("/circuit", "#circuit-transcoders")
    page.click("#circuit-transcoders")
    page.wait_for_selector("text=L0 to L3, cross-layer")
    opened.check()


def test_a_head_that_is_not_there_is_said(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    for head, told in (("9.0.3.1", "layer is 9"), ("1.77.3.1", "head is 77"), ("<b>", "LAYER.HEAD.QUERY.KEY")):
        page = opened.open(f"{GRAPH}&head={head}", "#circuit-pairs-result .error")
        opened.until(f"document.querySelector('#circuit-pairs-result').textContent.includes('{told}')")
    assert page.locator("#circuit-pairs-result b").count() == 0


def test_it_is_accessible_on_a_phone_in_the_dark(visit: Callable, dashboard) -> None:
    opened = visit(theme="dark", width=390, server=dashboard)
    page = open_pairs(opened)
    page.locator(".circuit-list td button:has-text('Heads')").first.click()
    page.wait_for_selector("#circuit-test-run", state="visible")
    page.click("#circuit-test-run")
    page.wait_for_selector("#circuit-test-result .circuit-tested")
    page.locator("#circuit-heads-result [data-head]").first.click()
    page.wait_for_selector("#circuit-pairs-result tbody tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.wait_for_timeout(200)
    assert serious(page) == []
    opened.check()
