"""The command line on a store in an object store, over a real connection."""

import json
from collections.abc import Iterator

import helpers_models
import pytest
from helpers_storage import objects, put, s3_server
from test_cli import HOOK, data, scope

__all__ = ["data"]  # a fixture

PREFIX = "s3://bucket/stores"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def test_the_line_from_an_object_store(data, tmp_path):
    command = (
        *("capture", "--model", helpers_models.tiny_folder("gemma3"), "--data", data, "--hook", HOOK, "--json"),
        *("--context-size", 32, "--rows-per-group", 512, "--storage", PREFIX, "--out", "acts.zarr"),
    )
    store = f"{PREFIX}/acts.zarr"
    captured = scope(*command)
    assert captured["store"] == store
    assert captured["new_rows"] > 1000
    assert scope(*command)["new_rows"] == 0
    facts = scope("info", store, "--json")
    assert (facts["kind"], facts["path"], facts["rows"]) == ("activation-store", store, captured["rows"])
    assert scope("verify", store, "--json")["faults"] == []

    sae, index = tmp_path / "sae", tmp_path / "features.index"
    trained = scope(
        *("train", store, "--hook", HOOK, "--arch", "topk", "--d-sae", 64, "--k", 4, "--tokens", 1024),
        *("--batch-size", 256, "--out", sae, "--evaluate-tokens", 0, "--json"),
    )
    assert 0 < trained["fvu"] < 1.5
    assert scope("index", store, sae, "--out", index, "--json")["n_firings"] > 0
    assert scope("verify", index, "--json")["faults"] == []

    name = f"hooks/{HOOK}/c.0.0"
    content = objects(store)[name]
    put(store, name, bytes([content[0] ^ 1]) + content[1:])
    (fault,) = scope("verify", store, "--json", code=1)["faults"]
    assert (fault["hook"], fault["object"]) == (HOOK, name)


def test_what_is_not_there_is_said(tmp_path):
    for command in ("info", "verify"):
        error = scope(command, f"{PREFIX}/none.zarr", "--json", code=2)["error"]
        assert (error["type"], "none.zarr" in error["message"]) == ("UnknownNameError", True)
    put(f"{PREFIX}/some.index", "manifest.json", json.dumps({"format": "feature-index", "version": 1}).encode())
    assert "in a local folder" in scope("verify", f"{PREFIX}/some.index", "--json", code=2)["error"]["message"]
    assert "expected s3://BUCKET/NAME" in scope("verify", "s3://bucket", "--json", code=2)["error"]["message"]
