"""Downloads: what is in them, that it is text, and that an address names ids and nothing else."""

import csv
import gzip
import io
import json
import zipfile

import pandas as pd
import pytest
from flask import Flask
from helpers_features import tiny_index

from dashboards import exports
from dashboards.context import Context
from scope.features.neuronpedia_export import feature_json
from scope.workspace import Workspace

HARD = ["<script>alert(1)</script>", "=cmd()", "قط يجلس", "x" * 200]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    built, _, _ = tiny_index(folder)
    opened = Workspace(folder / "w")
    opened.add(built.path)
    labels = opened.labels(built.id)
    for feature, text in enumerate(HARD):
        labels.set(feature, text=text, notes=text, starred=True)
    return opened


@pytest.fixture(scope="module")
def index(workspace):
    return workspace.index("tiny")


@pytest.fixture(scope="module")
def client(workspace):
    server = Flask(__name__)
    exports.register(server, Context(workspace))
    return server.test_client()


def get(client, address, status=200):
    response = client.get(address)
    assert response.status_code == status, response.text
    if status == 200:
        assert response.headers["Content-Disposition"].startswith("attachment; ")
        assert "html" not in response.content_type
    return response


def rows(response):
    text = response.data.decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_feature_is_neuronpedias_json(client, index):
    response = get(client, f"/export/{index.id}/feature/3/neuronpedia.json")
    assert response.json == json.loads(json.dumps(feature_json(index, 3)))
    assert [one["description"] for one in response.json["explanations"]] == [HARD[3]]


@pytest.mark.parametrize("part", [exports.PART_FIRINGS, 7])
def test_every_firing_of_a_feature_is_in_the_csv(client, index, monkeypatch, part):
    monkeypatch.setattr(exports, "PART_FIRINGS", part)
    wanted = index.activations([3])
    assert len(wanted) > 7
    found = rows(get(client, f"/export/{index.id}/feature/3/activations.csv"))
    assert [(int(one["row"]), float(one["value"])) for one in found] == list(
        zip(wanted["row"], wanted["value"], strict=True)
    )
    assert [one["token"].lstrip("'") for one in found] == [token.lstrip("'") for token in wanted["token"]]
    parquet = get(client, f"/export/{index.id}/feature/3/activations.parquet").data
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(parquet)), wanted, check_dtype=False)


def test_a_feature_that_never_fires_has_a_head_and_no_rows(client, index):
    assert rows(get(client, f"/export/{index.id}/feature/5/activations.csv")) == []


def test_the_list_of_features_is_the_one_that_the_address_asks_for(client, index):
    found = rows(get(client, f"/export/{index.id}/features.csv?show=alive&sort=max_value:desc"))
    alive = index.table[~index.table["dead"]].sort_values("max_value", ascending=False, kind="stable")
    assert [int(one["feature"]) for one in found] == alive["feature"].tolist()
    starred = pd.read_parquet(io.BytesIO(get(client, f"/export/{index.id}/features.parquet?starred=1").data))
    assert starred["label"].tolist() == HARD


def test_no_cell_of_any_csv_begins_as_a_formula(client, index):
    for name in ("features.csv", "labels.csv", "feature/1/activations.csv"):
        for row in rows(get(client, f"/export/{index.id}/{name}")):
            assert not [cell for cell in row.values() if cell.startswith(("=", "+", "@", "\t"))]
            assert not [cell for cell in row.values() if cell.startswith("-") and not _is_number(cell)]
    assert "'=cmd()" in get(client, f"/export/{index.id}/labels.csv").text


def _is_number(cell):
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_labels_as_lines_are_what_is_said(client, index):
    lines = get(client, f"/export/{index.id}/labels.jsonl").text.splitlines()
    assert [json.loads(line)["label"] for line in lines] == HARD


def test_a_whole_sae_is_a_zip_of_the_folder_that_neuronpedia_imports(client, index):
    archive = zipfile.ZipFile(io.BytesIO(get(client, f"/export/{index.id}/neuronpedia.zip?starred=1").data))
    assert archive.testzip() is None
    assert {"model.jsonl", "source.jsonl", "features/batch-0.jsonl.gz"} <= set(archive.namelist())
    lines = gzip.decompress(archive.read("explanations/batch-0.jsonl.gz")).decode().splitlines()
    assert [json.loads(line)["description"] for line in lines] == HARD


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("{id}/feature/40/neuronpedia.json", 400),
        ("{id}/feature/-1/neuronpedia.json", 400),
        ("{id}/feature/" + "9" * 6000 + "/neuronpedia.json", 400),
        ("{id}/feature/<script>/activations.csv", 400),
        ("{id}/features.xlsx", 404),
        ("{id}/features.csv?language=xx", 404),
        ("nothing/features.csv", 404),
        ("..%2F..%2Fetc%2Fpasswd/features.csv", 404),
        ("../../etc/passwd", 404),
    ],
)
def test_what_does_not_exist_is_said_in_plain_text_and_no_path_is_followed(client, index, address, status):
    response = get(client, "/export/" + address.format(id=index.id), status)
    assert "root:" not in response.text
    if response.content_type.startswith("text/plain"):
        assert "There is no" in response.text
