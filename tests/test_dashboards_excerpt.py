"""What the feature page shows of an excerpt: where there is one, where it lacks its text, where it is damaged."""

import json
from types import SimpleNamespace

import helpers_dashboards as fakes
import pytest
from helpers_features import FakeModel, GrowingStore, small_sae, tiny_index

from dashboards.app import create_app
from dashboards.context import Context
from dashboards.links import View
from scope.features import build_index, make_excerpt
from scope.workspace import Workspace

TITLE = "Over the whole sample"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """An index over a little of a text, and excerpts of one over all of it, of the same SAE."""
    folder = tmp_path_factory.mktemp("excerpts")
    whole, _, _ = tiny_index(folder)
    model = FakeModel()
    # The texts of both begin alike.
    local = build_index(GrowingStore(model, 30), small_sae(), folder / "local.index", model=model)
    return SimpleNamespace(
        whole=whole,
        local=local,
        read=make_excerpt(whole, folder / "read.excerpt", text=True),
        bare=make_excerpt(whole, folder / "bare.excerpt"),
        asleep=int((local.table["dead"] & ~whole.table["dead"]).to_numpy().argmax()),
        awake=int((~local.table["dead"]).to_numpy().argmax()),
    )


def page_of(made, folder, *excerpts, feature: int, search: str = "") -> str:
    """The feature page of the local index, in a workspace with these excerpts."""
    workspace = Workspace(folder / "w")
    for artefact in (made.local, *excerpts):
        workspace.add(artefact.path)
    client = fakes.LocalClient(create_app(workspace))
    return client.content(f"/feature/{feature}", f"?index={made.local.id}&{search}")


def examples_in(content: str) -> list[dict]:
    """What the strips of a page say."""
    found: list[str] = []

    def look(part: object) -> None:
        if isinstance(part, dict):
            found.extend([part["data-strip"]] if "data-strip" in part else [])
            part = list(part.values())
        for inner in part if isinstance(part, list) else ():
            look(inner)

    look(json.loads(content))
    return [json.loads(strip) for strip in found]


def test_its_examples_stand_above_those_of_the_index(made, tmp_path):
    content = page_of(made, tmp_path, made.read, feature=made.awake)
    assert content.count(TITLE) == 1
    assert content.index(TITLE) < content.index("In this index: 30 tokens")
    strips = examples_in(content)
    expected = made.whole.top_examples(made.awake, 10)
    # What else fires on the tokens of another text cannot be asked for; on those of the index it can.
    assert [strip["t"] for strip in strips if "i" not in strip] == [list(one.tokens) for one in expected]
    assert [strip["t"] for strip in strips if "i" in strip] == [
        list(one.tokens) for one in made.local.top_examples(made.awake, 20)
    ]
    assert f"{made.whole.table['n_firings'][made.awake]:,}" in content


def test_a_feature_that_is_silent_in_the_index_shows_where_it_fires(made, tmp_path):
    content = page_of(made, tmp_path, made.read, feature=made.asleep, search="whole=quantiles")
    assert "This feature never fires" in content
    drawn = [one for band in range(5) for one in made.read.band_examples(made.asleep, band)]
    assert [strip["t"] for strip in examples_in(content)] == [list(one.tokens) for one in drawn]


def test_a_feature_that_never_fires_anywhere(made, tmp_path):
    assert "The feature never fires on any of the" in page_of(made, tmp_path, made.read, feature=5)


def test_without_an_excerpt_the_page_is_as_before(made, tmp_path):
    content = page_of(made, tmp_path, feature=made.awake)
    assert TITLE not in content
    assert "In this index" not in content


def test_without_its_text_the_figures_stand_and_the_way_to_the_text(made, tmp_path):
    content = page_of(made, tmp_path, made.bare, feature=made.awake)
    assert "The text of its examples is not here yet" in content
    assert "scope demo" in content
    assert all("i" in strip for strip in examples_in(content))


def test_a_damaged_one_says_so_and_the_page_stands(made, tmp_path):
    broken = make_excerpt(made.whole, tmp_path / "broken.excerpt", text=True)
    (broken.path / "arrays.zst").write_bytes(b"nothing")
    content = page_of(made, tmp_path, broken, feature=made.awake)
    assert "What is known over the whole sample could not be read" in content
    assert "arrays.zst is damaged" in content
    assert any("i" in strip for strip in examples_in(content))


def test_the_workspace_page_tells_of_it(made, tmp_path):
    workspace = Workspace(tmp_path / "w")
    workspace.add(made.local.path)
    told = f"examples over {made.whole.n_rows:,} tokens"
    assert told not in fakes.LocalClient(create_app(workspace)).content("/")
    workspace.add(made.bare.path)
    assert told in fakes.LocalClient(create_app(workspace)).content("/")


def test_the_index_of_an_sae_with_an_excerpt_is_the_one_that_is_opened(made, tmp_path):
    other = build_index(GrowingStore(FakeModel(), 30), small_sae(seed=1), tmp_path / "a first.index")
    workspace = Workspace(tmp_path / "w")
    for artefact in (other, made.local):
        workspace.add(artefact.path)
    context = Context(workspace)
    assert context.entry(View("features")).name == "a first"
    workspace.add(made.read.path)
    assert context.entry(View("features")).name == "local"
    assert context.entry(View("features", query={"index": other.id})).name == "a first"
