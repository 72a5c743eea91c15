"""The command line on images and sounds: from files to a store, an export, a dictionary and an index."""

import json
from pathlib import Path

import pandas as pd
from helpers_media import media_folder
from helpers_models import one_thread  # noqa: F401
from test_activations_media import HOOK, written
from test_cli_stores import scope

from scope.features.index import FeatureIndex


def test_from_files_to_features_by_modality(tmp_path: Path) -> None:
    model, data = media_folder("gemma4"), written(tmp_path / "text", sounds=True)
    options = ("capture", "--model", model, "--data", data, "--hook", HOOK, "--media-column", "media")
    store = tmp_path / "s.zarr"
    said = scope(*options, "--context-size", 32, "--out", store, code=2)
    assert "An image takes up to 72 tokens" in said
    assert not store.exists()
    rows = scope(*options, "--context-size", 96, "--out", store)["rows"]
    by_modality = scope("info", store)["by_modality"]
    assert sum(counts["rows"] for counts in by_modality.values()) == rows
    assert by_modality["image"]["media"] == 6
    assert by_modality["audio"]["media"] == 2
    scope("export", store, "--format", "hf-dataset", "--out", tmp_path / "out")
    exported = pd.read_parquet(next((tmp_path / "out/data").glob("*.parquet")))
    assert exported["x0"].notna().sum() == by_modality["image"]["rows"]
    assert exported["start_s"].notna().sum() == by_modality["audio"]["rows"]
    train = ("train", store, "--hook", HOOK, "--d-sae", 40, "--k", 4, "--tokens", 256, "--batch-size", 16)
    scope(*train, "--balance", "modality", "--evaluate-tokens", 0, "--no-baselines", "--out", tmp_path / "sae")
    settings = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert settings["metadata"]["training"]["balance"] == "modality"
    assert "Did you mean modality" in scope(*train, "--balance", "modalty", "--out", tmp_path / "x", code=2)
    scope("index", store, tmp_path / "sae", "--model", model, "--out", tmp_path / "i.index")
    index = FeatureIndex.open(tmp_path / "i.index")
    assert index.modalities == ("text", "image", "audio")
    assert scope("verify", tmp_path / "i.index")["faults"] == []
    assert scope("info", tmp_path / "i.index")["modalities"]["image"] == by_modality["image"]["rows"]
