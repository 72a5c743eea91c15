"""The feature browser's list: a query in, features out, equal to what pandas says of the same table."""

import base64
import json
from pathlib import Path
from typing import Any

import helpers_dashboards as fakes
import numpy as np
import pytest
from helpers_features import tiny_index
from hypothesis import given
from hypothesis import strategies as st

from dashboards.areas import Area
from dashboards.columns import COLUMNS, available
from dashboards.components.feature_view import python_snippet
from dashboards.documents import DOCUMENT_PART, document_part
from dashboards.listing import FeatureQuery, grid_rows, grid_table, listing, parse_sort, spark
from dashboards.marks import marks_of
from dashboards.queries import effect_words, summary, token_detail
from dashboards.streams import kept_bits, points
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.saes.formats import save
from scope.workspace import Workspace


@pytest.fixture(scope="module")
def index() -> fakes.FakeIndex:
    return fakes.FakeIndex(repeats=3)


def ids(index: fakes.FakeIndex, **query: str) -> list[int]:
    return listing(index, FeatureQuery.of(query)).ids.tolist()


# --- filters and order ----------------------------------------------------------------------------------------------


def test_grid_rows_are_a_slice_and_json(index: fakes.FakeIndex) -> None:
    rows, total = grid_rows(index, FeatureQuery.of({"sort": "density:desc"}), 10, 20)
    assert (len(rows), total) == (10, fakes.FEATURES)
    json.dumps(rows, allow_nan=False)
    wanted = index.table.sort_values("density", ascending=False, kind="stable")["feature"].tolist()
    assert [row["feature"] for row in rows] == wanted[10:20]
    dead, total = grid_rows(index, FeatureQuery.of({"show": "dead"}), 0, 10)
    assert total == 1
    assert (dead[0]["feature"], dead[0]["spark"]) == (fakes.DEAD, [])


@pytest.mark.parametrize("column", [name for name, one in COLUMNS.items() if name not in ("umap_x", "umap_y")])
@pytest.mark.parametrize("ascending", [True, False])
def test_every_column_sorts_as_pandas_does(index: fakes.FakeIndex, column: str, ascending: bool) -> None:
    table = index.table
    if not COLUMNS[column].on(index):
        assert ids(index, sort=f"{column}:asc") == table["feature"].tolist()
        return
    values = table["neighbour_cosines"].str[0] if column == "nearest_cosine" else table[column]
    values = values.replace("", None) if values.dtype.kind not in "iufb" else values
    wanted = values.sort_values(ascending=ascending, kind="stable", na_position="last").index.tolist()
    assert ids(index, sort=f"{column}:{'asc' if ascending else 'desc'}") == wanted


def test_filters_are_those_of_pandas(index: fakes.FakeIndex) -> None:
    table = index.table
    assert ids(index, show="alive") == table.loc[~table["dead"], "feature"].tolist()
    assert ids(index, show="over-dense") == table.loc[table["over_dense"], "feature"].tolist()
    assert ids(index, language="ja", source="handbook") == table.loc[table["top_language"] == "ja", "feature"].tolist()
    assert ids(index, kind="neutral") == table.loc[table["language_neutral"], "feature"].tolist()
    assert ids(index, kind="specific") == table.loc[table["language_specific"] != "", "feature"].tolist()
    assert ids(index, kind="specific", language="ar") == []
    between = table["density"].between(0.01, 0.02)
    assert ids(index, low="0.01", high="0.02") == table.loc[between, "feature"].tolist()
    lists = zip(table["top_tokens"], table["top_logits"], table["bottom_logits"], strict=True)
    has = [any(" sleepy" in tokens for tokens in row) for row in lists]
    assert ids(index, q="SLEEPY") == table.loc[has, "feature"].tolist()
    for query in ({"language": "xx"}, {"source": "xx"}, {"list": "none such"}):
        with pytest.raises(UnknownNameError):
            ids(index, **query)


def test_chats_are_filtered_by_the_role_and_the_kind_that_a_feature_fires_most_in(index: fakes.FakeIndex) -> None:
    chats = fakes.FakeIndex("chats", 2, "template")
    role, content = chats.table["top_role"], chats.table["top_kind"]
    assert ids(chats, role="tool") == chats.table.loc[role == "tool", "feature"].tolist()
    both = (role == "user") & (content == "text")
    assert ids(chats, role="user", content="text") == chats.table.loc[both, "feature"].tolist()
    assert {"top_role", "role_entropy", "top_kind", "kind_entropy"} <= {column.name for column in available(chats)}
    assert set(grid_table(chats, {"role": "tool"})["top_role"]) == {"tool"}
    for of, query in ((chats, {"role": "narrator"}), (chats, {"content": "song"}), (index, {"role": "tool"})):
        with pytest.raises(UnknownNameError):
            ids(of, **query)
    del chats.table["top_role"]
    with pytest.raises(InvalidInputError, match="earlier release"):
        ids(chats, role="assistant")


def test_what_cannot_be_read_of_an_address_counts_as_not_given(index: fakes.FakeIndex) -> None:
    query = FeatureQuery.of({"show": "no", "kind": "x", "low": "nan", "high": "-3", "sort": "path:asc,x", "x": "path"})
    assert query == FeatureQuery()
    assert parse_sort("density:desc,feature:asc,,x") == (("density", False), ("feature", True))


def test_labels_stars_and_lists_narrow_the_list_at_once() -> None:
    index = fakes.FakeIndex(repeats=1)
    assert ids(index, starred="1") == []
    index.labels.set(5, text="the colour of <b>hot</b> days", starred=True)
    index.labels.add_to_list(9, "to read")
    assert ids(index, starred="1") == [5]
    assert ids(index, list="to read") == [9]
    assert ids(index, q="HOT</B> DAYS") == [5]
    assert ids(index, sort="label:desc")[:2] == [5, fakes.LONG_LABEL]
    (row,), _ = grid_rows(index, FeatureQuery.of({"starred": "1"}), 0, 10)
    assert (row["label"], row["starred"], row["own"]) == ("the colour of <b>hot</b> days", True, True)
    index.labels.set(5, text="", starred=False)
    assert ids(index, starred="1") == []
    assert 5 not in marks_of(index).labels


def test_fires_on_a_and_not_on_b(index: fakes.FakeIndex) -> None:
    found = listing(index, FeatureQuery.of({"a": "language:ja"}))
    wanted = index.contrast("language:ja", None, n=fakes.FEATURES)
    assert found.ids.tolist() == wanted.table["feature"].tolist()
    assert f"A: {wanted.n_rows_a:,} tokens" in found.note
    rows, _ = grid_rows(index, FeatureQuery.of({"a": "language:ja", "sort": "rate_b:asc"}), 0, 5)
    assert [row["rate_b"] for row in rows] == sorted(wanted.table["rate_b"])[:5]
    table = grid_table(index, {"a": "language:ja", "b": "language:en"})
    assert {"rate_a", "rate_b_high", "z"} <= set(table.columns)
    assert table["z"].is_monotonic_decreasing
    with pytest.raises(InvalidInputError, match="language:de"):
        ids(index, a="nonsense")


def test_what_is_downloaded_is_what_is_listed(index: fakes.FakeIndex) -> None:
    query = {"show": "alive", "sort": "max_value:desc", "low": "0.01"}
    table = grid_table(index, query)
    assert table["feature"].tolist() == ids(index, **query)
    rows, total = grid_rows(index, FeatureQuery.of(query), 0, 10**6)
    assert total == len(table)
    assert [row["label"] for row in rows] == table["label"].tolist()
    assert [row["max_value"] for row in rows] == pytest.approx(table["max_value"].tolist())


def test_a_small_histogram_shows_a_single_firing() -> None:
    assert spark(np.zeros(40)) == []
    heights = spark(np.array([1] + [0] * 38 + [1000]))
    assert heights[-1] == 1
    assert 0 < heights[0] < 0.2


# --- areas of the plot ----------------------------------------------------------------------------------------------

coordinates = st.floats(-10, 10, allow_nan=False).map(lambda value: round(value, 3))


@given(st.tuples(*[coordinates] * 4), st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=30))
def test_a_box_holds_what_lies_between_its_sides(sides: tuple[float, ...], places: list[tuple[float, float]]) -> None:
    x0, x1, y0, y1 = sides
    x, y = np.array(places).T
    found = Area.parse(f"box:{x0},{x1},{y0},{y1}").contains(x, y, False, False)
    inside = (min(x0, x1) < x) & (x < max(x0, x1)) & (min(y0, y1) < y) & (y < max(y0, y1))
    edge = np.isin(x, (x0, x1)) | np.isin(y, (y0, y1))
    assert (found == inside)[~edge].all()


def test_a_lasso_holds_what_its_corners_turn_around() -> None:
    rng = np.random.default_rng(0)
    turns = np.sort(rng.uniform(0, 2 * np.pi, 17))
    corners = [(10 ** (0.4 * np.cos(t) - 2), 3 * np.sin(t) + 1) for t in turns]
    x, y = rng.uniform(-3, -1, 500), rng.uniform(-3, 5, 500)
    found = Area.parse("lasso:" + ";".join(f"{float(a)!r},{float(b)!r}" for a, b in corners)).contains(
        x, y, True, False
    )
    on_scale = np.array([(np.log10(a), b) for a, b in corners])
    assert found.tolist() == [winding(on_scale, a, b) for a, b in zip(x, y, strict=True)]
    assert 0 < found.sum() < 500


def winding(corners: np.ndarray, x: float, y: float) -> bool:
    """Whether the corners turn around a point: the sum of the angles that they are seen under."""
    angles = np.arctan2(corners[:, 1] - y, corners[:, 0] - x)
    steps = np.diff(np.append(angles, angles[0]))
    return bool(abs(((steps + np.pi) % (2 * np.pi) - np.pi).sum()) > np.pi)


@pytest.mark.parametrize(
    "text", ["", "box:1,2,3", "box:a,b,c,d", "lasso:1,2;3,4", "circle:1,2,3", "lasso:1,nan;2,3;4,5"]
)
def test_an_area_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        Area.parse(text)


def test_an_area_is_a_filter_like_any_other(index: fakes.FakeIndex) -> None:
    density, value = index.table["density"], index.table["max_value"]
    inside = (density > 0.005) & (density < 0.02) & (value > 300) & (value < 700)
    assert ids(index, area="box:0.005,0.02,300,700") == index.table.loc[inside, "feature"].tolist()
    both = inside & (index.table["top_language"] == "ja")
    assert ids(index, area="box:0.005,0.02,300,700", language="ja") == index.table.loc[both, "feature"].tolist()


# --- what the plot fetches ------------------------------------------------------------------------------------------


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_points_are_the_table_on_the_scale_of_its_axes(index: fakes.FakeIndex) -> None:
    found = points(index, "density", "token_entropy", "top_language")
    json.dumps(found)
    features = unpacked(found["feature"], "<u4")
    alive = index.table.loc[~index.table["dead"]]
    assert features.tolist() == alive["feature"].tolist()
    assert unpacked(found["x"], "<f4") == pytest.approx(np.log10(alive["density"].to_numpy()), rel=1e-6)
    assert unpacked(found["y"], "<f4") == pytest.approx(alive["token_entropy"].to_numpy(), rel=1e-6)
    groups = np.array(found["colour"]["groups"])
    assert groups[unpacked(found["colour"]["codes"], "<u1")].tolist() == alive["top_language"].tolist()
    ramp = points(index, "density", "max_value", "mean_value")["colour"]
    assert ramp["ends"] == pytest.approx(np.log10([alive["mean_value"].min(), alive["mean_value"].max()]).tolist())
    for axis in ("path", "top_token", "umap_x"):
        with pytest.raises(UnknownNameError, match="statistic"):
            points(index, axis, "density")


def test_points_past_the_limit_are_a_sample_that_says_so(
    index: fakes.FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboards.streams.MAX_POINTS", 20)
    found = points(index, "density", "max_value")
    features = unpacked(found["feature"], "<u4")
    assert (found["n"], found["n_drawable"], len(set(features.tolist()))) == (20, fakes.FEATURES - 1, 20)
    assert (np.diff(features.astype(int)) > 0).all()
    assert found == points(index, "density", "max_value")


def test_kept_bits_are_the_list(index: fakes.FakeIndex) -> None:
    found = kept_bits(index, FeatureQuery.of({"language": "ja"}))
    bits = np.unpackbits(unpacked(found["bits"], "u1"), bitorder="little")[: fakes.FEATURES]
    assert np.flatnonzero(bits).tolist() == ids(index, language="ja")
    assert found["n"] == bits.sum()


def test_columns_that_an_index_lacks_are_not_offered(index: fakes.FakeIndex) -> None:
    names = {column.name for column in available(index)}
    assert "density" in names
    assert not {"umap_x", "position_bits"} & names
    assert "top_token" not in {column.name for column in available(index, numbers=True)}


# --- one feature ----------------------------------------------------------------------------------------------------


def test_a_document_in_parts_is_the_document(index: fakes.FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashboards.documents.DOCUMENT_PART", 7)
    rows = index.document_rows(3)
    tokens, values, start = [], [], 0
    while start < len(rows):
        part = document_part(index, 20, 3, start=start)
        assert (part.start, part.n_tokens) == (start, len(rows))
        for run in part.runs:
            assert run.position == start + run.start_row - int(rows[start])
            tokens += run.tokens
            values += run.values
        start = part.stop
    assert tokens == list(index._tokens[rows])
    assert values == pytest.approx(index._values[rows, 20].tolist(), rel=1e-4)
    around = document_part(index, 20, 3, around=int(rows[10]))
    assert around.start <= 10 < around.stop
    before = document_part(index, 20, 3, before=around.start)
    assert before.stop == around.start
    for wrong in ({"start": len(rows)}, {"before": 0}, {"before": len(rows) + 1}, {"around": 0}):
        with pytest.raises(OutOfRangeError):
            document_part(index, 20, 3, **wrong)
    with pytest.raises(OutOfRangeError):
        document_part(index, 20, 10**6)
    assert DOCUMENT_PART > 7


def test_the_card_under_the_pointer_says_how_the_next_token_is_pushed(index: fakes.FakeIndex) -> None:
    row, value = index.firings(2, 0, 1).iloc[0]
    row = int(row)
    effects = np.arange(len(index._vocabulary), dtype=np.float32)
    after = index.tokens(row + 1, row + 2).iloc[0]
    detail = token_detail(index, row, feature=2, effects=effects)
    if after["sequence"] == index.tokens(row, row + 1)["sequence"].iloc[0]:
        assert detail.push == {"token": after["token"], "effect": pytest.approx(value * after["token_id"])}
    last = int(index.sequences["start_row"].iloc[1]) - 1
    assert token_detail(index, last, feature=2).push is None
    silent = next(row for row in range(1, 50) if not index._values[row, 2])
    assert token_detail(index, silent, feature=2, effects=effects).push is None


def test_a_stored_logit_effect_is_known_without_the_model(index: fakes.FakeIndex) -> None:
    for feature in range(20):
        effect_of = dict(index.top_logits(feature).values.tolist()) | dict(index.bottom_logits(feature).values.tolist())
        effect_of |= dict(index.top_logits(feature).values.tolist())
        for row, value in index.firings(feature, 0, 5).itertuples(index=False):
            push = token_detail(index, int(row), feature=feature).push
            if push is not None:
                known = effect_of.get(push["token"])
                assert push["effect"] == (None if known is None else pytest.approx(value * known))


def test_a_feature_is_said_in_words(index: fakes.FakeIndex) -> None:
    assert effect_words(summary(index, 2)).startswith("Fires on 1 in ")
    assert effect_words(summary(index, fakes.DEAD)).startswith("Would make ")


def test_the_lines_that_load_a_feature_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, _, sae = tiny_index(tmp_path)
    workspace = Workspace(tmp_path / "w")
    workspace.add(built.path)
    save(sae, workspace.path_for("sae", "own"))
    monkeypatch.chdir("/")
    made: dict[str, Any] = {}
    exec(python_snippet(workspace, workspace.index(built.id), 3), made)  # what is tested is that these lines run
    assert made["feature"].id == 3
    assert len(made["firings"]) == int(built.table["n_firings"].iloc[3])
    assert [one.feature for one in made["examples"]] == [3] * len(made["examples"])
    assert made["direction"].tolist() == sae.W_dec[3].tolist()


def test_an_index_on_disk_lists_what_its_table_says(tmp_path: Path) -> None:
    index, _, _ = tiny_index(tmp_path)
    rows, total = grid_rows(index, FeatureQuery.of({"sort": "density:desc"}), 0, 100)
    json.dumps(rows, allow_nan=False)
    wanted = index.table.sort_values("density", ascending=False, kind="stable")["feature"].tolist()
    assert [row["feature"] for row in rows] == wanted
    assert total == index.d_sae
    language = index.languages[0]
    found = listing(index, FeatureQuery.of({"a": f"language:{language}"})).ids.tolist()
    assert found == index.contrast(f"language:{language}", n=index.d_sae).table["feature"].tolist()
    row, value = index.firings(int(wanted[0]), 0, 1).iloc[0]
    document = index.top_examples(int(wanted[0]), 1)[0].document
    part = document_part(index, int(wanted[0]), document, around=int(row))
    (run,) = (run for run in part.runs if run.start_row <= row < run.start_row + len(run.tokens))
    assert run.values[int(row) - run.start_row] == pytest.approx(value, rel=1e-4)
    example = index.top_examples(int(wanted[0]), 1)[0]
    assert run.position + example.row - run.start_row == example.document_position
