"""Grids as CSV and parquet: complete, with labels, and no cell that a spreadsheet would run."""

import csv
import io
import json

import pandas as pd
import pytest
from helpers_features import tiny_index

from scope.errors import InvalidInputError
from scope.features.grids import csv_parts, feature_grid, firings_grid, parquet_bytes, safe_cells, write_grid

HARD = [
    "=cmd|'/C calc'!A0",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\tx",
    "<script>alert(1)</script>",
    "قط",
    'a "quoted", cell',
    "x" * 200,
]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    built, _, _ = tiny_index(tmp_path_factory.mktemp("grids"))
    for feature, text in enumerate(HARD):
        built.labels.set(feature, text=text, notes=text)
        built.labels.add_to_list(feature, "=list")
    return built


def read_csv(table):
    text = b"".join(csv_parts(table)).decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_no_cell_of_a_csv_begins_as_a_formula_and_every_text_is_there(index):
    table = feature_grid(index)
    rows = read_csv(table)
    assert len(rows) == index.d_sae
    for cells, row in zip(rows, table.to_dict("records"), strict=True):
        assert set(cells) == set(table.columns)
        for name, cell in cells.items():
            value = row[name]
            if isinstance(value, str):
                assert cell.lstrip("'") == value.lstrip("'")
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
            elif isinstance(value, (float, int)) and not isinstance(value, bool):
                assert float(cell or "nan") == pytest.approx(float(value), nan_ok=True)
    assert json.loads(rows[0]["lists"]) == ["=list"]


def test_negative_numbers_stay_numbers(index):
    table = pd.DataFrame({"feature": [1], "cosine": [-0.5], "=name": ["-x"]})
    assert read_csv(table) == [{"feature": "1", "cosine": "-0.5", "'=name": "'-x"}]
    assert safe_cells(table)["cosine"].dtype == "float64"


def test_parquet_has_every_text_as_it_is(index):
    table = pd.read_parquet(io.BytesIO(parquet_bytes(feature_grid(index))))
    assert table["label"].tolist()[: len(HARD)] == [" ".join(text.split()) for text in HARD]
    assert table["lists"][0].tolist() == ["=list"]


def test_some_features_in_the_order_that_was_asked_for(index):
    table = feature_grid(index, [7, 2])
    assert table["feature"].tolist() == [7, 2]
    assert table["label"].tolist() == [HARD[7], HARD[2]]


def test_firings_have_tokens_and_provenance(index):
    table = firings_grid(index, [3], 5)
    assert len(read_csv(table)) == min(5, index.table["n_firings"][3])
    assert {"feature", "row", "value", "token", "document", "title"} <= set(table.columns)


def test_a_large_table_comes_in_parts_with_one_header():
    table = pd.DataFrame({"feature": range(12_000)})
    parts = list(csv_parts(table))
    assert len(parts) == 4
    assert [row["feature"] for row in read_csv(table)] == [str(number) for number in range(12_000)]
    assert read_csv(table.iloc[:0]) == []


def test_an_unknown_ending_is_refused(index, tmp_path):
    with pytest.raises(InvalidInputError, match="expected csv or parquet"):
        write_grid(index.table, tmp_path / "x.xlsx")
