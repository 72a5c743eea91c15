"""A real model: the index over it as it runs is that of the store which a capture makes, and grows as that does."""

import json
from pathlib import Path
from typing import Any

import helpers_models
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_activations import write_text
from helpers_models import one_thread, tiny_model  # noqa: F401  # a fixture
from test_cli import scope
from test_features_grow import contents, same

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InterruptedRunError, InvalidInputError, UnknownNameError
from scope.features import FeatureIndex, build_index, build_indexes
from scope.saes import formats
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE

FIRST, SECOND = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
SETTINGS: dict[str, Any] = {"context_size": 24, "batch_size": 200, "rows_per_group": 128}
OPTIONS: dict[str, Any] = {"batch_size": 64, "segment_firings": 500}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    return TextSource(write_text(tmp_path_factory.mktemp("text") / "text.jsonl", n_documents=30))


def sae_of(hook: str, d_sae: int = 48) -> TopKSAE:
    model = tiny_model("gemma3")
    known = {"hook_name": hook, "model_name": model.name, "weight_hash": model.identity.weight_hash}
    metadata = SAEMetadata(**known, tokenizer_hash=model.identity.tokenizer_hash)
    config = TopKConfig(d_in=model.hook_shape(hook)[0], d_sae=d_sae, k=4, metadata=metadata)
    return TopKSAE(config, generator=torch.Generator().manual_seed(d_sae))


def alike(live: FeatureIndex, stored: FeatureIndex) -> None:
    """All files have the same bytes; the manifests differ only in which source they name."""
    one, other = contents(live), contents(stored)
    a, b = one.pop("manifest"), other.pop("manifest")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    assert {name for name in a if a[name] != b[name]} <= {"fingerprint", "parents"}


@pytest.mark.parametrize("max_tokens", [500])
def test_an_index_without_a_store(text: TextSource, tmp_path: Path, max_tokens: int | None) -> None:
    model, saes = tiny_model("gemma3"), [sae_of(FIRST), sae_of(SECOND), sae_of(FIRST, 60)]
    settings = {**SETTINGS, "max_tokens": max_tokens}
    store = capture(model, text, [FIRST, SECOND], tmp_path / "s.zarr", **settings).store
    outs = [tmp_path / f"live-{number}.index" for number in range(3)]
    live = build_indexes(model.source(text, [FIRST, SECOND], **settings), saes, outs, model=model, **OPTIONS)
    for number, (index, sae) in enumerate(zip(live, saes, strict=True)):
        stored = build_index(store, sae, tmp_path / f"stored-{number}.index", model=model, **OPTIONS)
        alike(index, stored)
        alone = model.source(text, sae.hook_name, **settings)
        same(index, build_index(alone, sae, tmp_path / f"alone-{number}.index", model=model, **OPTIONS))
        assert index.document_text(3) == stored.document_text(3)


def test_an_interrupted_live_index_goes_on(text: TextSource, tmp_path: Path) -> None:
    model, sae = tiny_model("gemma3"), sae_of(SECOND)
    whole = build_index(model.source(text, SECOND, **SETTINGS), sae, tmp_path / "whole.index", model=model, **OPTIONS)
    source = model.source(text, SECOND, **SETTINGS)
    for stop in (64, 256, 300):
        batches = model.source(text, SECOND, **SETTINGS).batches
        source.batches = lambda *given, batches=batches, stop=stop: _until(batches(*given), stop)  # type: ignore[method-assign]
        with pytest.raises(InterruptedRunError):
            build_index(source, sae, tmp_path / "again.index", model=model, **OPTIONS)
    del source.batches
    same(build_index(source, sae, tmp_path / "again.index", model=model, **OPTIONS), whole)


def _until(batches: Any, stop: int) -> Any:
    for batch in batches:
        if batch.rows[0] >= stop:
            raise KeyboardInterrupt
        yield batch


def test_a_live_source_is_checked_before_it_runs(text: TextSource, tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    with pytest.raises(UnknownNameError, match=SECOND):
        build_index(model.source(text, FIRST, **SETTINGS), sae_of(SECOND), tmp_path / "a.index")
    assert not (tmp_path / "a.index").exists()


def test_an_index_grows_as_its_store_is_appended_to(text: TextSource, tmp_path: Path) -> None:
    model, sae, out = tiny_model("gemma3"), sae_of(SECOND), tmp_path / "grown.index"
    store_path, settings = tmp_path / "s.zarr", SETTINGS
    capture(model, text, [SECOND], store_path, **settings)
    old = build_index(ActivationStore.open(store_path), sae, out, model=model, **OPTIONS)
    more = write_text(tmp_path / "more.jsonl", n_documents=17)
    with more.open("a") as file:
        file.write(json.dumps({"text": "naïve zebras, quite unheard of", "title": "new", "language": "xx"}) + "\n")
    capture(model, TextSource(more), [SECOND], store_path, append=True, **settings)
    store = ActivationStore.open(store_path)
    assert old.n_rows < store.n_rows
    assert old.n_rows % 64 != 0
    grown = build_index(store, sae, out, model=model, **OPTIONS)
    same(grown, build_index(store, sae, tmp_path / "fresh.index", model=model, **OPTIONS))
    assert "xx" in grown.languages


def test_the_command(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.jsonl", n_documents=20)
    folder = helpers_models.tiny_folder("gemma3")
    saes = [tmp_path / "saes" / "a" / "sae", tmp_path / "saes" / "b" / "sae"]
    for path, hook in zip(saes, (FIRST, SECOND), strict=True):
        formats.save(sae_of(hook), path)
    common = ("--model", folder, "--data", data, "--max-tokens", 400, "--context-size", 24, "--json")
    made = scope("index", *saes, "--out", tmp_path / "indexes", *common)["indexes"]
    assert [Path(one["index"]).name for one in made] == ["a-sae.index", "b-sae.index"]
    assert [one["hook_name"] for one in made] == [FIRST, SECOND]
    assert [one["n_rows"] for one in made] == [400, 400]
    assert scope("verify", made[1]["index"], "--json")["faults"] == []
    one = scope("index", saes[0], "--out", tmp_path / "one.index", *common)
    assert one["id"] == made[0]["id"]
    pd.testing.assert_frame_equal(
        FeatureIndex.open(one["index"]).table, FeatureIndex.open(made[0]["index"]).table, check_exact=True
    )
    scope("capture", *common[:4], "--hook", SECOND, "--hook", FIRST, "--out", tmp_path / "s.zarr", "--context-size", 24)
    outs = ("--out", tmp_path / "c.index", "--out", tmp_path / "d.index")
    stored = scope("index", tmp_path / "s.zarr", *saes, *outs, "--json")["indexes"]
    assert [one["index"] for one in stored] == [str(tmp_path / "c.index"), str(tmp_path / "d.index")]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("store.zarr", "--out", "a.index"), "Give a store and an SAE"),
        (("s.zarr", "a", "b", "c", "--out", "a.index", "--out", "b.index"), "one for each SAE, or one folder"),
        (("s.zarr", "x/a", "x/a", "--out", "o"), "given twice"),
        (("s.zarr", "a", "b", "--out", "o", "--hook", "blocks.0.hook_resid_post"), "--hook is of one SAE"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, given: tuple[str, ...], problem: str) -> None:
    assert problem in scope("index", *given, "--json", code=2)["error"]["message"]


def test_what_the_command_refuses_of_a_text(tmp_path: Path) -> None:
    formats.save(sae_of(FIRST), tmp_path / "sae")
    data = write_text(tmp_path / "text.jsonl", n_documents=3)
    error = scope("index", tmp_path / "sae", "--data", data, "--out", tmp_path / "a.index", "--json", code=2)["error"]
    assert "--model" in error["message"]
    given = ("index", "s.zarr", tmp_path / "sae", "--max-tokens", 9, "--out", tmp_path / "a.index", "--json")
    assert "--max-tokens" in scope(*given, code=2)["error"]["message"]
    assert not (tmp_path / "a.index").exists()


def test_names_of_indexes() -> None:
    from scope.cli.index import index_folders

    def names(*saes: str) -> list[str]:
        return [path.as_posix() for path in index_folders(saes, [Path("o")])]

    assert names("saes/a", "saes/b/") == ["o/a.index", "o/b.index"]
    assert names("x/k32", "y/k32") == ["o/x-k32.index", "o/y-k32.index"]
    assert names("hf://o/r/f@main", "hf://o/r/g") == ["o/f-main.index", "o/g.index"]
    assert index_folders(["saes/a"], [Path("mine.index")]) == [Path("mine.index")]
    with pytest.raises(InvalidInputError, match="twice"):
        names("a", "a")
    assert np.unique(names("a", "b", "c")).size == 3
