"""Reading an index: examples, documents, queries, notebook panels, threads."""

import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers_features import TEXTS, dense_strengths, tiny_index

from activations.source import RowFlag
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features import Example, FeatureIndex


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    index, store, sae = tiny_index(tmp_path_factory.mktemp("index"))
    return index, store, dense_strengths(store, sae)


@pytest.fixture(scope="module")
def busy(built):
    """The feature with the most firings."""
    return int(built[0].table["n_firings"].idxmax())


def check_example(example: Example, built, feature: int) -> None:
    index, store, dense = built
    rows = np.arange(example.start_row, example.start_row + len(example.tokens))
    assert example.row == rows[example.centre]
    assert example.value == dense[example.row, feature] == example.values[example.centre]
    assert list(example.values) == dense[rows, feature].tolist()
    assert len(set(store.columns["sequence"][rows])) == 1
    assert not (store.columns["flags"][rows] & RowFlag.BOS).any()
    assert example.position == store.columns["position"][example.row]
    title, source, language, _ = TEXTS[example.document % len(TEXTS)]
    assert (example.title, example.source, example.language) == (title, source, language)
    assert index.document_rows(example.document)[example.document_position] == example.row
    firings = index.firings(feature)
    assert firings["row"][example.rank] == example.row
    assert example.quantile == 1 - example.rank / len(firings)


def test_top_examples(built, busy):
    index, _, _ = built
    examples = index.top_examples(busy, 10)
    assert len(examples) == 10
    for example in examples:
        check_example(example, built, busy)
    assert [example.rank for example in examples] == sorted(example.rank for example in examples)
    assert examples[0].rank == 0
    everything = index.top_examples(busy, 1000, distinct=False, per_sequence=1000)
    assert [example.row for example in everything] == index.firings(busy)["row"].tolist()


def test_top_examples_differ(built, busy):
    index, store, _ = built
    tokens, sequence = store.columns["token_id"], store.columns["sequence"]
    examples = index.top_examples(busy, 1000, per_sequence=1)
    assert len({sequence[example.row] for example in examples}) == len(examples)
    contexts = [tuple(tokens[max(e.row - e.position + 1, e.row - 7) : e.row + 1]) for e in examples]
    assert len(set(contexts)) == len(contexts)
    assert len(examples) < index.table["n_firings"][busy]


def test_window(built, busy):
    index, _, _ = built
    for example in index.top_examples(busy, 20, window=(3, 1)):
        assert len(example.tokens) <= 5
        assert example.centre <= 3
    assert all(e.tokens == (e.token,) for e in index.top_examples(busy, 3, window=(0, 0)))
    with pytest.raises(InvalidInputError, match="window"):
        index.top_examples(busy, 3, window=(-1, 2))


def test_quantile_examples(built, busy):
    index, _, _ = built
    n = int(index.table["n_firings"][busy])
    band = index.quantile_examples(busy, 0.25, 0.5, n=1000)
    assert {example.rank for example in band} == set(range(round(0.5 * n), round(0.75 * n)))
    for example in band:
        check_example(example, built, busy)
    few = index.quantile_examples(busy, 0, 1, n=5, seed=1)
    assert few == index.quantile_examples(busy, 0, 1, n=5, seed=1) == index.random_examples(busy, 5, seed=1)
    assert few != index.random_examples(busy, 5, seed=2)
    with pytest.raises(InvalidInputError, match="quantile"):
        index.quantile_examples(busy, 0.5, 0.5)


def test_examples_in_a_language(built, busy):
    index, _, _ = built
    for language in index.languages:
        examples = index.examples_in(busy, 5, language=language)
        assert all(example.language == language for example in examples)
        for example in examples:
            check_example(example, built, busy)
        assert bool(examples) == (index.by_language(busy).set_index("language").loc[language, "n_firings"] > 0)
    assert all(example.source == "handbook" for example in index.examples_in(busy, 5, source="handbook"))
    assert index.examples_in(busy, 5, language="ja", source="gutenberg") == ()
    with pytest.raises(UnknownNameError, match="en"):
        index.examples_in(busy, language="enn")


def test_documents_read_as_they_were(built):
    index, _, _ = built
    for document in range(2 * len(TEXTS)):
        text = TEXTS[document % len(TEXTS)][3] * (1 + document % 3)
        assert index.document_text(document) == text
    tokens = index.document_tokens(3)
    assert tokens["token"][:3].tolist() == ["吾 ¹⁄₃", "吾 ²⁄₃", "吾 ³⁄₃"]
    assert (tokens["flags"] == 0).all()


def test_an_example_shows_whole_characters_at_its_edges(built):
    index, _, _ = built
    lengths = index.sequences.set_index("sequence")["n_rows"]
    seen = 0
    for feature in index.table["feature"][index.table["n_firings"] > 0]:
        for example in index.examples_in(feature, 10, language="ja", window=(1, 1)):
            sequence = int(index.tokens(example.row, example.row + 1)["sequence"][0])
            if 4 <= example.position < lengths[sequence] - 4:
                assert "<0x" not in "".join(example.tokens)
                seen += 1
    assert seen > 10


def test_features_on_rows(built):
    index, _, dense = built
    row = int(np.flatnonzero((dense > 0).sum(axis=1) == 4)[10])
    found = index.features_at(row)
    order = np.argsort(-dense[row], kind="stable")[:4]
    assert found["feature"].tolist() == order.tolist()
    assert found["rank"].tolist() == [0, 1, 2, 3]
    assert np.array_equal(index.values_on(int(order[0]), row - 5, row + 5), dense[row - 5 : row + 5, order[0]])


def test_activations_in_one_call(built, busy):
    index, store, dense = built
    table = index.activations([busy, 5, 0])
    assert len(table) == np.count_nonzero(dense[:, [busy, 5, 0]])
    assert {"feature", "row", "value", "token", "document", "language"} <= set(table.columns)
    one = table.iloc[0]
    assert one["token"] == store.model.vocabulary_strings([int(store.columns["token_id"][one["row"]])])[0]
    assert (index.activations([busy], limit_per_feature=3)["value"] >= table["value"][2]).all()
    assert index.activations([]).empty


@pytest.mark.parametrize("feature", [-1, 40, 10**9, 1.5, "3", True, None])
def test_feature_ids_out_of_range(built, feature):
    index, _, _ = built
    for method in (
        index.feature,
        index.firings,
        index.top_examples,
        index.histogram,
        index.neighbours,
        index.by_source,
    ):
        with pytest.raises(OutOfRangeError, match="0 to 39"):
            method(feature)


def test_rows_and_documents_out_of_range(built):
    index, _, _ = built
    for call in (
        lambda: index.features_at(-1),
        lambda: index.features_at(index.n_rows),
        lambda: index.features_in(5, 3),
        lambda: index.tokens(0, index.n_rows + 1),
        lambda: index.document_text(10),
        lambda: index.document_rows(-1),
        lambda: index.firings(3, -1),
    ):
        with pytest.raises(OutOfRangeError):
            call()


def test_numpy_ids_are_ids(built, busy):
    index, _, _ = built
    assert index.firings(np.int64(busy)).equals(index.firings(busy))


def test_sort(built):
    index, _, _ = built
    table = index.table
    rows, total = index.query(sort=[("n_firings", False)], start=2, stop=7)
    assert total == 40
    assert rows["n_firings"].tolist() == sorted(table["n_firings"], reverse=True)[2:7]
    two = index.query(sort=[("top_source", True), ("max_value", False)]).rows
    assert two["top_source"].is_monotonic_increasing
    assert all(group["max_value"].is_monotonic_decreasing for _, group in two.groupby("top_source"))
    assert index.query(sort=[("mean_value", True)]).rows["feature"].iloc[-1] == 5  # a missing value comes last
    assert index.query(sort=[("mean_value", False)]).rows["feature"].iloc[-1] == 5
    with pytest.raises(UnknownNameError, match="density"):
        index.query(sort=[("densty", True)])
    with pytest.raises(InvalidInputError, match="lists"):
        index.query(sort=[("top_tokens", True)])


def test_filters(built):
    index, _, _ = built
    table = index.table
    limit = float(table["max_value"].median())

    def found(**filters):
        return set(index.query(filters=filters).rows["feature"])

    def where(condition):
        return set(table["feature"][condition])

    number = {"filterType": "number"}
    assert found(dead=True) == {5}
    assert found(max_value=(limit, None)) == where(table["max_value"] >= limit)
    assert found(max_value={**number, "type": "greaterThan", "filter": limit}) == where(table["max_value"] > limit)
    between = {**number, "type": "inRange", "filter": 1, "filterTo": limit}
    assert found(max_value=between) == where(table["max_value"].between(1, limit))
    either = {**number, "operator": "OR", "conditions": [{"type": "lessThan", "filter": 1}, {"type": "blank"}]}
    assert found(mean_value=either) == where((table["mean_value"] < 1) | table["mean_value"].isna())
    assert found(top_language=["ja", "ar"]) == where(table["top_language"].isin(["ja", "ar"]))
    assert found(top_language={"filterType": "set", "values": ["ja"]}) == where(table["top_language"] == "ja")
    assert found(top_token={"filterType": "text", "type": "contains", "filter": "<0XE3"}) == where(
        table["top_token"].str.contains("<0xE3>")
    )
    assert found(dead=False, top_source="code") == where(~table["dead"] & (table["top_source"] == "code"))
    assert found(dead={"filterType": "boolean", "type": "true"}) == {5}
    for wrong in ({"filterType": "number", "type": "sounds like", "filter": 1}, {"type": "equals"}, (1, 2, 3)):
        with pytest.raises(InvalidInputError):
            index.query(filters={"max_value": wrong})
    with pytest.raises(UnknownNameError):
        index.query(filters={"nothing": 1})


def test_text_search(built):
    index, _, _ = built
    rows, total = index.query(text=" SCRIPT ")
    assert 0 < total < 40
    for row in rows.itertuples():
        shown = [*row.top_tokens, *row.top_logits, *row.bottom_logits]
        assert any("script" in token.casefold() for token in shown)
    assert 17 in index.query(text="17").rows["feature"].tolist()
    assert index.query(text="  ").total == 40
    assert index.query(text="no such token").total == 0


def test_to_pandas_is_a_copy(built):
    index, _, _ = built
    table = index.to_pandas()
    table["density"] = 0
    assert index.table["density"].any()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_panels_escape_everything(built, busy):
    index, _, _ = built
    script = index.query(text="script").rows["feature"].tolist()
    panels = [index._repr_html_(), index.random_examples(busy)[0]._repr_html_()]
    panels += [index.feature(feature)._repr_html_() for feature in [busy, 5, *script]]
    for feature in range(40):
        panels.append(index.top_examples(feature, 12)._repr_html_())
    for panel in panels:
        parser = _Tags()
        parser.feed(panel)
        allowed = {
            "div",
            "span",
            "table",
            "tr",
            "td",
            "th",
            "svg",
            "rect",
            "title",
            "bdi",
            "code",
            "p",
            "details",
            "summary",
        }
        assert set(parser.tags) <= allowed
        assert not [name for name in parser.attributes if name.startswith("on")]
    everything = "".join(panels)
    assert "script" in everything
    assert "&lt;b&gt;markup&lt;/b&gt; &amp; more" in everything
    assert re.search(r'dir="auto"', everything)


def test_reading_from_many_threads(built):
    index, _, _ = built
    fresh = FeatureIndex.open(index.path)
    jobs = list(range(40)) * 2

    def look(feature: int):
        return (
            fresh.top_examples(feature, 5),
            fresh.histogram(feature)[1].tolist(),
            fresh.query(sort=[("density", False)], text="the").total,
            fresh.random_examples(feature, 3, seed=feature),
        )

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(look, jobs))
    assert together == [look(feature) for feature in jobs]
