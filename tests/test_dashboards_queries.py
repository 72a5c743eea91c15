"""What the pages show, as plain objects: addresses, numbers, grid rows, examples."""

import json
import re
from pathlib import Path

import helpers_dashboards as fakes
import numpy as np
import pytest
from dash import html
from hypothesis import assume, given
from hypothesis import strategies as st

import dashboards
from dashboards import artefacts, links, queries
from dashboards.components.lens_view import LensSelection
from dashboards.components.prompt_state import Selection
from dashboards.components.strip import BEARER, INVISIBLE, token, token_strip
from dashboards.conversations import form_turns
from dashboards.format import duration, percent, plural
from dashboards.glossary import GLOSSARY
from dashboards.prompts import Asked
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError


@pytest.fixture(scope="module")
def index() -> fakes.FakeIndex:
    return fakes.FakeIndex(repeats=3)


def plain(component: object) -> str:
    """All text of a component."""
    if isinstance(component, str):
        return component
    if isinstance(component, list | tuple):
        return "".join(plain(child) for child in component)
    children = getattr(component, "children", None)
    return "" if children is None else plain(children)


@given(text=st.text(min_size=1), feature=st.integers(0, 10**6))
def test_an_address_is_read_as_it_was_written(text: str, feature: int) -> None:
    address = links.prompt_link("ab12", text=text, feature=feature)
    path, _, search = address.partition("?")
    view = links.parse(path, "?" + search)
    assert (view.page, view.index, view.get("text"), view.get("feature")) == ("prompt", "ab12", text, str(feature))


@pytest.mark.parametrize(
    ("path", "page", "target"),
    [
        ("/", "workspace", ""),
        ("/features", "features", ""),
        ("/feature/12", "feature", "12"),
        ("/x", "", ""),
        (None, "workspace", ""),
    ],
)
def test_paths(path: str | None, page: str, target: str) -> None:
    view = links.parse(path, None)
    assert (view.page, view.target) == (page, target)


def test_selection_ignores_what_cannot_be_read() -> None:
    assert Selection.of({"token": "3", "feature": "-1", "target": "x", "sort": "effect"}) == Selection(
        token=3, sort="effect"
    )
    assert Selection.of({"sort": "best", "rows": "9999", "pins": "7,x,3,7,,-1", "at": "5,2"}) == Selection(
        rows=200, pins=(7, 3), at=(2, 5)
    )
    assert Selection.of(None) == Selection()
    assert LensSelection.of_query({"sae": "x", "show": "y", "layer": "2", "follow": "5,5,9"}) == LensSelection(
        layer=2, follow=(5, 9)
    )


@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "critic"]), st.text()), min_size=1))
def test_a_chat_is_read_from_an_address_as_it_was_written(turns: list[tuple[str, str]]) -> None:
    asked = Asked.of({"chat2": json.dumps(turns), "text2": "not this"}, "2")
    assert [(role, content) for role, content, *_ in form_turns(asked.text)[0]] == turns
    assert asked.empty == (not any(content for _, content in turns))


@pytest.mark.parametrize("chat", ["{", "3", '{"a": 1}', '[["user"]]', '[["user", 3]]', "[1]"])
def test_a_chat_that_cannot_be_read_is_empty(chat: str) -> None:
    assert Asked.of({"chat": chat}).empty


def test_numbers_in_words() -> None:
    assert percent(0.1234) == "12.3%"
    assert percent(float("nan")) == "–"
    assert (plural(1, "token"), plural(1200, "token")) == ("1 token", "1,200 tokens")
    assert (duration(0.42), duration(61), duration(600)) == ("0.4 s", "61 s", "10 min")


@pytest.mark.parametrize("text", ["-1", "96", "1.5", "", "x", "٣", "1e1", " 1"])
def test_feature_ids_that_do_not_exist_are_refused_with_the_valid_range(index: fakes.FakeIndex, text: str) -> None:
    with pytest.raises(OutOfRangeError, match="0 to 95"):
        queries.feature_id(index, text)


def test_examples_come_in_the_groups_that_were_asked_for(index: fakes.FakeIndex) -> None:
    (top,) = queries.examples(index, 2, queries.ExampleRequest(n=5))
    assert len(top.examples) == 5
    bands = queries.examples(index, 2, queries.ExampleRequest("quantiles"))
    strongest = [max(example.value for example in band.examples) for band in bands]
    assert strongest == sorted(strongest, reverse=True)
    (arabic,) = queries.examples(index, 15, queries.ExampleRequest(language="ar"))
    assert {example.language for example in arabic.examples} == {"ar"}
    (none,) = queries.examples(index, fakes.DEAD, queries.ExampleRequest())
    assert none.examples == ()
    with pytest.raises(UnknownNameError, match="language"):
        queries.examples(index, 2, queries.ExampleRequest(language="xx"))
    with pytest.raises(InvalidInputError, match="best"):
        queries.examples(index, 2, queries.ExampleRequest("best"))


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_a_bar_of_the_histogram_is_a_band_of_quantiles(counts: list[int]) -> None:
    array = np.array(counts)
    if not array.sum():
        with pytest.raises(OutOfRangeError):
            queries.band_of_bin(array, 0)
        return
    bands = [queries.band_of_bin(array, bin) for bin in range(len(counts))]
    assert bands[0][0] == 0
    assert bands[-1][1] == 1
    widths = [(high - low) * array.sum() for low, high in bands]
    assert widths == pytest.approx(counts)


def test_token_detail_lists_the_feature_whatever_its_rank(index: fakes.FakeIndex) -> None:
    row = int(index.firings(2, 0, 1)["row"].iloc[0])
    detail = queries.token_detail(index, row, n=1, feature=2)
    assert 2 in [one["feature"] for one in detail.features]
    ranks = {one["feature"]: one["rank"] for one in detail.features}
    assert ranks[2] == list(index.features_at(row)["feature"]).index(2) + 1


def test_a_long_label_is_the_name_of_its_feature(index: fakes.FakeIndex) -> None:
    assert len(queries.summary(index, fakes.LONG_LABEL).row["label"]) >= 199
    assert queries.feature_name(queries.table_row(index, fakes.LONG_LABEL)).startswith("a very long label")
    assert queries.feature_name({"top_tokens": [" told", "\n", "asked", " told"]}) == "told · asked"


def test_an_index_that_cannot_be_read_is_shown_with_its_problem(index: fakes.FakeIndex) -> None:
    entry = fakes.FakeWorkspace(index).indexes()[0]
    entry.problem = "it is broken"
    artefact = artefacts.describe(fakes.FakeWorkspace(index), entry)
    assert artefact.problem == "it is broken"


@given(st.text())
def test_a_token_keeps_its_text(text: str) -> None:
    assume(not unseen(text))
    drawn = plain(token(text)).replace(BEARER, "")
    assert drawn.replace("⏎", "\n").replace("⇥", "\t").replace("␍", "\r").replace("␣", " ") == text.replace(
        BEARER, ""
    ).replace("⏎", "\n").replace("⇥", "\t").replace("␍", "\r").replace("␣", " ")


def unseen(text: str) -> bool:
    """Whether something in a text might be named instead of shown."""
    return any(character in INVISIBLE for character in text)


def test_a_token_that_shows_nothing_is_named() -> None:
    assert plain(token("\u200d")) == "ZWJ"
    assert plain(token(" \u00a0\ufe0f")) == "␣NBSPVS16"
    assert plain(token(" ")) == "␣"
    assert plain(token("\u200d ¹⁄₃")) == "ZWJ ¹⁄₃"
    assert plain(token("é ¹⁄₂")) == "é ¹⁄₂"
    assert plain(token("\u0645\u06cc\u200c")) == "\u0645\u06cc\u200c"
    script = Path(dashboards.__file__).with_name("assets") / "00_core.js"
    drawn = dict(re.findall(r'"(\\u[0-9a-f]{4})": "([^"]+)"', script.read_text()))
    assert {json.loads(f'"{character}"'): name for character, name in drawn.items()} == INVISIBLE


def test_a_combining_mark_by_itself_stands_on_a_circle() -> None:
    assert plain(token("\u0301")) == "◌\u0301"
    assert plain(token(" \u064e\u0628")) == "␣◌\u064e\u0628"
    assert plain(token("e\u0301")) == "e\u0301"


def test_neighbours_are_those_of_the_list_that_one_came_from(index: fakes.FakeIndex) -> None:
    among = np.array([5, 2, fakes.DEAD, 40])
    found = queries.summary(index, 2, among)
    assert (found.previous, found.next, found.place, found.n_listed) == (5, fakes.DEAD, 2, 4)
    assert {queries.summary(index, 2, among).random for _ in range(40)} == {5, 40}
    assert (queries.summary(index, 5, among).previous, queries.summary(index, 40, among).next) == (40, 5)
    for other in (None, np.array([5, 7]), np.array([], int)):
        alone = queries.summary(index, 0, other)
        assert (alone.previous, alone.next, alone.place) == (fakes.FEATURES - 1, 1, None)


def test_an_address_carries_the_list_and_no_name_in_it_clashes() -> None:
    address = links.feature_link("ab12", 3, **{"in": "q=a%26b&sort=density%3Adesc", "index": "", "feature": "x"})
    view = links.parse(*address.split("?"))
    assert (view.index, view.target, view.get("feature")) == ("ab12", "3", "x")
    assert links.list_query(view.get("in")) == {"q": "a&b", "sort": "density:desc"}
    for link in (links.features_link, links.prompt_link, links.lens_link):
        assert links.parse("/", link("ab12", index="other").partition("?")[2]).index == "ab12"


def test_a_strip_is_one_component_and_carries_its_text_as_data() -> None:
    strip = token_strip(["<b>", " x"], [0.0, 2.0], scale=2.0)
    assert isinstance(strip, html.Div)
    assert not getattr(strip, "children", None)
    assert json.loads(strip.to_plotly_json()["props"]["data-strip"])["t"] == ["<b>", " x"]


def test_every_definition_is_a_sentence() -> None:
    assert all(entry.definition.endswith(".") for entry in GLOSSARY.values())
