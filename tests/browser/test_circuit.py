"""The circuit page in a browser: a graph of five hundred nodes made up, and one made, verified and split there."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import helpers_dashboards as fakes
import pytest
from helpers_browser import query, serious
from helpers_circuits import made_graph
from helpers_models import one_thread, tiny_model
from test_attribution_graph import prompt_of, transcoders
from test_dashboards_circuits import dictionary_folder

from dashboards.circuits import Circuits
from dashboards.context import Context
from scope.attribution.graph import build_graph
from scope.attribution.graph_json import load_graph, save_graph
from scope.attribution.graph_settings import GraphSettings
from scope.interventions import Intervention, InterventionSpec
from scope.workspace import Workspace

__all__ = ["dictionary_folder", "one_thread"]

pytestmark = pytest.mark.browser

GRAPH = "/circuit?graph=large"
INDEX_OF = Circuits.index_of
SVG = ".circuit-svg"
FEATURE = ".node.kind-feature"
IN_SIGHT = (
    "(({{ top, bottom }}) => top >= 0 && bottom <= innerHeight)(document.querySelector('{}').getBoundingClientRect())"
)
"""Of the first element that a selector finds: it stands in the window."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("circuit") / "workspace")
    save_graph(made_graph(475), workspace.path_for("circuit-graph", "large"), 0.9)
    return workspace


@pytest.fixture(scope="module")
def dashboard(workspace: Workspace, serve: Callable):
    """A dashboard over the large graph; every feature has examples, those of an index in memory."""
    index = fakes.FakeIndex()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Circuits, "index_of", lambda self, id, layer: index)
        yield serve(workspace)


def point(page, key: str) -> None:
    page.locator(f'[data-node="{key}"]').hover()


def keys(page, kind: str = "feature") -> list[str]:
    return page.eval_on_selector_all(f".node.kind-{kind}", "marks => marks.map((mark) => mark.dataset.node)")


def supernodes(workspace: Workspace) -> list[tuple[str, ...]]:
    return [(group.name, *group.nodes) for group in Circuits(Context(workspace)).supernodes("large")]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def with_examples(page) -> str:
    return next(key for key in keys(page) if int(key.split("_")[1]) < fakes.FEATURES)


def test_a_node_says_what_it_is_and_is_pinned(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    page = opened.open(GRAPH, SVG)
    assert len(page.query_selector_all(".node")) > 400
    key = with_examples(page)
    layer, feature, _ = key.split("_")
    point(page, key)
    page.wait_for_selector("#tip .strip .tok")
    assert f"L{layer} feature {feature}" in page.text_content("#tip")
    assert page.locator(".near-edges .edge").count() > 0
    page.locator(f'[data-node="{key}"]').click()
    page.wait_for_selector("#circuit-panel h2")
    opened.until("new URL(location).searchParams.has('pin')")
    assert query(page)["pin"] == key
    # The list beside leads on, by keyboard too.
    rows = page.locator("#circuit-panel .circuit-go")
    assert rows.count() > 2
    title = page.text_content("#circuit-panel h2")
    rows.first.focus()
    page.keyboard.press("Enter")
    opened.until(f"document.querySelector('#circuit-panel h2').textContent !== {json.dumps(title)}")
    # What was pinned and shown is in the address.
    pinned = query(page)["pin"]
    page.reload()
    page.wait_for_selector("#circuit-panel h2")
    assert page.get_attribute(".node.pinned", "data-node") == pinned
    opened.check()


def test_keys_move_pin_select_group_hide_and_let_go(visit: Callable, dashboard, workspace: Workspace) -> None:
    opened = visit(server=dashboard)
    page = opened.open(GRAPH, SVG)
    page.focus(SVG)
    page.keyboard.press("ArrowDown")
    at = "document.querySelector('.circuit-svg').getAttribute('aria-activedescendant')"
    first = page.evaluate(at)
    assert page.get_attribute(f"#{first}", "class").count("kind-logit")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert page.evaluate(at) != first
    page.keyboard.press("Enter")
    pinned = page.get_attribute(".node.pinned", "data-node")
    assert query(page)["pin"] == pinned
    page.keyboard.press("Escape")
    assert page.locator(".node.pinned").count() == 0
    # Two nodes become one with a name.
    two = keys(page)[:2]
    for key in two:
        page.locator(f'[data-node="{key}"]').click(modifiers=["Shift"])
    assert page.locator(".node.chosen").count() == 2
    page.keyboard.press("g")
    page.keyboard.type("about <b>heat</b>")
    page.keyboard.press("Enter")
    page.wait_for_selector(".node.kind-group")
    assert "about <b>heat</b>" in page.text_content("#circuit-panel")
    assert not set(two) & set(keys(page))
    opened.until("new URL(location).searchParams.get('pin') === 'group:about <b>heat</b>'")
    until(lambda: supernodes(workspace) == [("about <b>heat</b>", *two)])
    page.reload()
    page.wait_for_selector(".node.kind-group")
    assert page.locator(".node.kind-group b").count() == 0
    # The file brings it along.
    with page.expect_download() as saved:
        page.click(".circuit-buttons a:has-text('JSON')")
    content = json.loads(Path(saved.value.path()).read_text())
    assert content["qParams"]["supernodes"] == [["about <b>heat</b>", *two]]
    page.click(".circuit-groups button:has-text('Ungroup')")
    page.wait_for_selector(".node.kind-group", state="detached")
    assert set(two) <= set(keys(page))
    # Hidden, shown again.
    page.locator(f'[data-node="{two[0]}"]').click()
    page.keyboard.press("h")
    page.wait_for_selector(f'[data-node="{two[0]}"]', state="detached")
    assert query(page)["hide"] == two[0]
    page.reload()
    page.wait_for_selector(SVG)
    assert two[0] not in keys(page)
    page.click("button:has-text('Show hidden')")
    page.wait_for_selector(f'[data-node="{two[0]}"]')
    assert "hide" not in query(page)
    opened.check()


def test_thresholds_prune_and_what_is_saved_is_what_is_shown(visit: Callable, dashboard, tmp_path: Path) -> None:
    opened = visit(server=dashboard)
    page = opened.open(GRAPH, SVG)
    before = len(keys(page))
    for name, share in (("nodes", "0.5"), ("edges", "0.8")):
        page.eval_on_selector(
            f"#circuit-{name}", f"box => {{ box.value = '{share}'; box.dispatchEvent(new Event('input')); }}"
        )
        opened.until(f"new URL(location).searchParams.get('{name}') === '{share}'")
    opened.until(f"document.querySelectorAll('{FEATURE}').length < {before}")
    opened.until("!document.querySelector('.circuit-view').hasAttribute('aria-busy')")
    left = keys(page)
    page.reload()
    page.wait_for_selector(SVG)
    assert keys(page) == left
    with page.expect_download() as saved:
        page.click(".circuit-buttons a:has-text('JSON')")
    saved.value.save_as(tmp_path / "shown.json")
    graph = load_graph(tmp_path / "shown.json")
    assert (graph.nodes["kind"] == "feature").sum() == len(left)
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as saved:
            page.click(f"[data-save-circuit={kind}]")
        content = Path(saved.value.path()).read_bytes()
        assert content.startswith(start)
        assert len(content) > 10_000
    opened.check()


def test_five_hundred_nodes_stand_apart(visit: Callable, dashboard) -> None:
    for width in (1440, 390):
        opened = visit(server=dashboard, width=width)
        page = opened.open(GRAPH, SVG)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        overlapping = page.evaluate(
            """() => {
              const at = (one) => [+one.getAttribute('cx'), +one.getAttribute('cy')];
              const places = Array.from(document.querySelectorAll('.node .target'), at);
              const close = ([x, y], [a, b]) => Math.hypot(x - a, y - b) < 6;
              return places.filter((one, n) => places.slice(n + 1).some((other) => close(one, other))).length;
            }"""
        )
        assert overlapping == 0
        opened.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_accessible(visit: Callable, dashboard, theme: str) -> None:
    opened = visit(theme=theme, server=dashboard)
    for path, ready in (("/circuit", ".circuit-page .table"), (GRAPH, SVG)):
        page = opened.open(path, ready)
        if path == GRAPH:
            page.locator(f'[data-node="{with_examples(page)}"]').click()
            page.wait_for_selector("#circuit-panel .circuit-list")
        page.wait_for_timeout(200)
        assert serious(page) == [], path
    opened.check()


def test_what_cannot_be_shown_says_so(visit: Callable, dashboard) -> None:
    opened = visit(server=dashboard)
    page = opened.open("/circuit?graph=nothing", ".state.error")
    assert "nothing" in page.text_content(".state.error")
    page = opened.open("/circuit?graph=large&nodes=7", ".state.error")
    assert "above 0 up to 1" in page.text_content(".state.error")
    page = opened.open("/circuit?graph=large&pin=9_9_9", SVG)
    assert "not shown" in page.text_content("#circuit-panel")
    opened.check()


def test_a_graph_is_made_verified_and_split_on_the_page(
    visit: Callable, serve: Callable, dictionary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Circuits, "index_of", INDEX_OF)  # this workspace's own, which are none
    shutil.copytree(dictionary_folder, tmp_path / "w")
    opened = visit(server=serve(Workspace(tmp_path / "w")))
    page = opened.open("/circuit", "#circuit-prompt")
    page.click("#circuit-make-run")
    page.wait_for_selector("#circuit-make-result .error")
    page.fill("#circuit-prompt", "The cat sat on the mat")
    page.click("#circuit-make-run")
    page.wait_for_selector(SVG)
    assert "the-cat-sat-on-the-mat" in page.text_content("h1")
    assert page.is_hidden(".circuit-sample .fails")
    assert page.is_hidden(".circuit-sample .table")
    # No index has these features: that is said, with the command that makes one.
    page.locator(FEATURE).first.click()
    page.wait_for_selector("#circuit-panel .circuit-examples .code")
    assert "have no index yet" in page.text_content("#circuit-panel .circuit-examples")
    assert "scope index" in page.get_attribute("#circuit-panel .copy", "data-copy")
    page.click("#circuit-verify-run")
    page.wait_for_selector(".circuit-verified .circuit-agreement")
    opened.until("document.querySelector('.circuit-sample .fails').checkVisibility()")
    assert page.locator(".edge.fails, .node.fails").count() > 0
    page.locator(".node.kind-logit").first.click()
    page.locator(".circuit-list td button:has-text('Heads')").first.click()
    page.wait_for_selector("#circuit-heads-result tbody tr")
    opened.until(IN_SIGHT.format("#circuit-heads-result tbody tr"))
    edge = query(page)["edge"]
    page.reload()
    page.wait_for_selector("#circuit-heads-result tbody tr")
    assert query(page)["edge"] == edge
    page.wait_for_selector(".circuit-verified .circuit-agreement")
    opened.check()


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_nodes_of_layers_own_tables_are_drawn_and_explained(
    visit: Callable, serve: Callable, tmp_path: Path, kind: str
) -> None:
    workspace, model = Workspace(tmp_path / "w"), tiny_model(kind)
    settings = GraphSettings(max_features=20)
    graph = build_graph(model, prompt_of(model, 5), transcoders(model), settings)
    save_graph(graph, workspace.path_for("circuit-graph", "tables"), 1.0)
    opened = visit(server=serve(workspace))
    page = opened.open("/circuit?graph=tables", SVG)
    assert page.is_visible(".circuit-sample .table")
    label = page.locator(".node.kind-table").first.get_attribute("aria-label")
    assert re.match(r"L\d table at “", label)
    opened.check()


def test_a_graph_is_made_under_interventions_that_the_workspace_keeps(
    visit: Callable, serve: Callable, dictionary_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(dictionary_folder, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    one = Intervention(kind="set", component="mlp", layer=0, value=8.0, positions=(6,))
    workspace.save_intervention(InterventionSpec(name="an MLP held", interventions=(one,)))
    opened = visit(server=serve(workspace))
    page = opened.open("/circuit", "#circuit-prompt")
    page.fill("#circuit-prompt", "The cat sat on the mat")
    page.click("#circuit-interventions")
    page.get_by_role("option", name="an MLP held").click()
    assert serious(page) == []
    page.click("#circuit-make-run")
    page.wait_for_selector(SVG)
    header = page.text_content(".circuit-page")
    assert "Under interventions: an MLP held: Set the mlp of layer 0 to 8.0, at position 6." in header
    assert page.is_visible(".circuit-sample .intervention")
    mark = page.locator(".node.kind-intervention").first
    assert mark.get_attribute("aria-label").startswith("Set the mlp of layer 0 to 8.0, at “")
    opened.check()
