"""The pages about a model, over tiny models with experts, with per-layer embeddings, and with neither."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from helpers_browser import query, serious
from helpers_family import family_workspace

pytestmark = pytest.mark.browser

TEXT = "text=" + quote("The cat sat on <b>the</b> mat")
ERROR = ".state.error"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, serve: Callable[[Any], Any]) -> SimpleNamespace:
    workspace = family_workspace(tmp_path_factory.mktemp("family"), ("mixtral", "gemma4", "llama"))
    ids = {entry.name: entry.id for entry in workspace.indexes()}
    return SimpleNamespace(server=serve(workspace), workspace=workspace, **ids)


def pages(family: SimpleNamespace) -> dict[str, tuple[str, str]]:
    """Addresses, and what is there once they are drawn."""
    prompt = f"/experts?index={family.mixtral}&view=prompt&{TEXT}"
    return {
        "parameters": (f"/model?index={family.mixtral}", ".model-parts"),
        "embeddings": (
            f"/embeddings?index={family.gemma4}&{TEXT}&token=3&layer=1&target=305",
            "#table-effects-grid td",
        ),
        "load": (f"/experts?index={family.mixtral}&expert=2", "#experts-groups-chart .main-svg"),
        "features": (f"/experts?index={family.mixtral}&view=features&layer=1", ".experts-table"),
        "prompt": (prompt, "#experts-nothing"),
        "edited": (f"{prompt}&do=swap&layer=1&expert=1&other=3&at=2,3", ".experts-next"),
    }


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_accessible_and_not_wider_than_a_phone(
    visit: Callable, family: SimpleNamespace, width: int, theme: str
) -> None:
    opened = visit(width=width, theme=theme, server=family.server)
    shown = pages(family)
    for name in shown if width > 500 else ("load", "edited"):
        path, ready = shown[name]
        page = opened.open(path, ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert serious(page) == [], name
        assert page.locator("#content script, #content .tok b").count() == 0, name
    opened.check()


def test_parameters_are_those_of_scope_info_and_the_workspace_leads_to_them(
    visit: Callable, family: SimpleNamespace
) -> None:
    from scope.models import LanguageModel

    index = family.workspace.index(family.mixtral)
    count = LanguageModel.load(index.model_info["load_name"]).parameter_count()
    opened = visit(server=family.server)
    page = opened.open("/", "a[href^='/model']")
    page.click(f"a[href='/model?index={family.mixtral}']")
    page.wait_for_selector(".model-parts")
    shown = page.locator(".model-facts .stat dd[title]").evaluate_all("all => all.map(one => one.title)")
    tables = sum(count.lookup_tables.values())
    expected = [count.total, count.active_per_token, count.effective, tables, count.experts]
    assert shown == [f"{number:,}" for number in expected]
    assert "2 of 4 in each of 3 layers" in page.text_content(".model-parts")
    assert "cpu" in page.text_content("[aria-label=Devices]")
    page.click(".model-nav a:has-text('Experts')")
    page.wait_for_selector(".experts-table")
    opened.check()


def test_a_cell_of_the_tables_tells_its_parts_and_its_features(visit: Callable, family: SimpleNamespace) -> None:
    opened = visit(server=family.server)
    page = opened.open(f"/embeddings?index={family.gemma4}", "[data-sample]")
    page.fill("#prompt-text", "The cat sat on the mat")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#embeddings-grid td")
    assert page.locator("#embeddings-grid tbody tr").count() == 4
    page.click("#embeddings-grid tr[data-id='1'] td >> nth=2")
    opened.until("new URL(location).searchParams.get('layer') === '1'")
    page.wait_for_selector("h2:has-text('At'):has-text('cat')")
    page.wait_for_selector(".pushed-features a[href*='/feature/']")
    assert query(page)["token"] == "2"
    page.click("button:has-text('Projected main embedding')")
    page.wait_for_selector("[aria-pressed=true]:has-text('Projected main embedding')")
    page.reload()
    page.wait_for_selector("[aria-pressed=true]:has-text('Projected main embedding')")
    page.wait_for_selector("#embeddings-grid td[aria-selected=true]")
    page.focus("#embeddings-grid td[aria-selected=true]")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    opened.until("new URL(location).searchParams.get('layer') === '2'")
    page.wait_for_selector("#embeddings-result p:has-text('up to the layer it reads')")
    page.click(".table-effects .chips button >> nth=1")
    page.wait_for_selector("#table-effects-grid td")
    assert page.locator("#table-effects-grid tbody tr").count() == 4
    assert query(page)["target"].isdigit()
    assert page.locator(".table-effects .chips [aria-pressed=true]").count() == 1
    assert "without the tables" in page.text_content(".table-effects")
    page.reload()
    page.wait_for_selector("#table-effects-grid td")
    assert serious(page) == []
    page.click(".table-effects .chips [aria-pressed=true]")
    page.wait_for_selector("#table-effects-grid", state="detached")
    opened.check()


def test_another_kind_of_model_says_so_in_words(visit: Callable, family: SimpleNamespace) -> None:
    opened = visit(server=family.server)
    for path, words in (
        (f"/embeddings?index={family.llama}&{TEXT}", "no per-layer embeddings"),
        (f"/experts?index={family.llama}", "no experts"),
        (f"/experts?index={family.llama}&view=prompt&{TEXT}", "no experts"),
    ):
        page = opened.open(path, f".state h2:has-text('{words}')")
        assert page.locator(ERROR).count() == 0, path
    page = opened.open(f"/experts?index={family.mixtral}&store=none", ".state.error")
    assert "none" in page.text_content(".state.error")
    opened.check()


def test_another_index_keeps_the_page_and_lets_go_of_what_was_of_the_old_one(
    visit: Callable, family: SimpleNamespace
) -> None:
    opened = visit(server=family.server)
    for path, gone, kept in (("/prompt", "window=1", ""), ("/experts", "store=mixtral&expert=1", "layer=1")):
        page = opened.open(f"{path}?index={family.mixtral}&{gone}&{kept}", "#content > *")
        page.evaluate("id => window.dash_clientside.scope.switchIndex(id)", family.gemma4)
        opened.until(f"new URL(location).searchParams.get('index') === '{family.gemma4}'")
        assert page.url.startswith(f"{family.server.url}{path}?")
        assert not {name.split("=")[0] for name in gone.split("&")} & set(query(page))
        assert not kept or query(page)["layer"] == "1"


def test_experts_are_chosen_in_the_map_and_sorted_by_any_column(visit: Callable, family: SimpleNamespace) -> None:
    opened = visit(server=family.server)
    page = opened.open(f"/experts?index={family.mixtral}", "#experts-load-grid td")
    page.wait_for_selector(".experts-table")
    page.click("#experts-load-grid tr[data-id='1'] td >> nth=3")
    page.wait_for_selector("h2:has-text('Expert 3')")
    page.wait_for_selector("#experts-groups-chart .main-svg")
    figure = "document.querySelector('#experts-groups-chart .js-plotly-plot')"
    assert page.evaluate(f"{figure}._fullData[0].zmin") == 0
    assert (query(page)["layer"], query(page)["expert"]) == ("1", "3")
    page.wait_for_selector("h2:has-text('the experts of layer 1')")
    page.click(".experts-table .sort:has-text('Share')")
    page.wait_for_selector("th[aria-sort=descending] .sort:has-text('Share')")
    shares = page.locator(".experts-table td[data-name=Share]").all_text_contents()
    values = [float(one.strip("%")) for one in shares]
    assert values == sorted(values, reverse=True)
    page.click(".experts-table .sort:has-text('Share')")
    page.wait_for_selector("th[aria-sort=ascending] .sort:has-text('Share')")
    page.click("button:has-text('By token')")
    page.wait_for_selector('h2:has-text("Each token\'s experts")')
    page.click("a:has-text('Its features')")
    page.wait_for_selector("h2:has-text('Features of expert 3')")
    page.go_back()
    page.wait_for_selector('h2:has-text("Each token\'s experts")')
    opened.check()


def test_from_a_feature_to_its_experts_and_back(visit: Callable, family: SimpleNamespace) -> None:
    opened = visit(server=family.server)
    page = opened.open(f"/experts?index={family.mixtral}&view=features&layer=1", ".experts-table .firing-label")
    feature = page.text_content(".pair-feature a >> nth=0")
    page.click(".pair-feature .firing-label >> nth=0")
    page.wait_for_selector(f"h2:has-text('Experts of feature {feature}')")
    assert page.locator(".experts-table tbody tr").count() == 4
    page.fill("#experts-feature-text", "100000")
    page.press("#experts-feature-text", "Enter")
    page.wait_for_selector("#experts-typed-answer [role=alert]:has-text('0 to 59')")
    page.fill("#experts-expert-text", "2")
    page.press("#experts-expert-text", "Enter")
    opened.until("new URL(location).searchParams.get('expert') === '2'")
    page.click("button:has-text('Feature'):has-text('×')")
    page.wait_for_selector("h2:has-text('Features of expert 2')")
    assert set(page.locator(".experts-table td[data-name=Expert]").all_text_contents()) == {"2"}
    feature = page.text_content(".pair-feature a >> nth=0")
    page.click(".pair-feature a >> nth=0")
    page.wait_for_selector(f"h1:has-text('Feature {feature}')")
    page.click("aside a:has-text('The experts that its tokens go to')")
    page.wait_for_selector(f"h2:has-text('Experts of feature {feature}')")
    opened.check()


def test_an_expert_is_forbidden_forced_and_swapped_on_chosen_tokens(visit: Callable, family: SimpleNamespace) -> None:
    opened = visit(server=family.server)
    page = opened.open(f"/experts?index={family.mixtral}&view=prompt&{TEXT}", "#experts-routing-grid td")
    page.click("#experts-routing-grid tr[data-id='0'] td >> nth=3")
    page.wait_for_selector("h2:has-text('Change the choice of layer 0')")
    chosen = page.text_content("#experts-routing-grid td[aria-selected=true]").split()
    page.click("button:text-is('Forbid')")
    page.wait_for_selector(f"h2:has-text('Layer 0 without expert {chosen[0]} on all tokens')")
    page.wait_for_selector(".experts-flips")
    page.click("button[aria-label='On token 3']")
    page.wait_for_selector("h2:has-text('on 1 token')")
    assert (query(page)["at"], query(page)["do"]) == ("3", "forbid")
    tokens = page.locator(".experts-flips td[data-name=Token] .number").all_text_contents()
    assert all(int(one) >= 3 for one in tokens)
    page.click("button:text-is('Swap')")
    page.wait_for_selector("#experts-nothing:has-text('swap with')")
    other = next(one for one in "0123" if one not in chosen)
    page.click(f"button[aria-label='Swap with expert {other}']")
    page.wait_for_selector(f"h2:has-text('experts {chosen[0]} and {other} swapped on 1 token')")
    page.wait_for_selector(".experts-next .firing-bar")
    page.reload()
    page.wait_for_selector(".experts-next .firing-bar")
    page.click("button:text-is('Swap')")
    page.wait_for_selector("#experts-nothing:has-text('Forbid, force or swap')")
    opened.check()
