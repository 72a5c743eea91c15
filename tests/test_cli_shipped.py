"""The SAE that ships: taken into the demo's workspace, and what lies in the checkout."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from scope.features import FeatureExcerpt, FeatureIndex, make_excerpt
from scope.sample import SAMPLE_SEED, SampleSAE, sample_sae, sample_text
from scope.workspace import Workspace

BUDGET = 32_000_000
"""Bytes of all that ships as data."""


@pytest.mark.real
def test_the_demo_takes_in_an_sae_that_ships(demo_workspace, tmp_path, monkeypatch):
    from activations.store import ActivationStore
    from scope.cli.demo import DemoConfig, make_demo
    from scope.features import build_index
    from scope.saes.config import SAEMetadata
    from scope.saes.formats import save
    from scope.saes.topk import TopKConfig, TopKSAE

    folder = shutil.copytree(demo_workspace, tmp_path / "workspace")
    store = ActivationStore.open(Workspace(folder).stores()[0].path)
    spec, (hook,) = store.spec, store.hooks
    about = SAEMetadata(
        hook_name=hook, model_name=spec.model, weight_hash=spec.weight_hash, tokenizer_hash=spec.tokenizer_hash
    )
    config = TopKConfig(d_in=640, d_sae=48, k=4, metadata=about)
    sae = TopKSAE(config, generator=torch.Generator().manual_seed(0))
    made = SampleSAE(
        "stand-in", save(sae, tmp_path / "sae", companions={"README.md": b"a card"}), tmp_path / "e.excerpt"
    )
    (made.path / "manifest.json").unlink()
    index = build_index(store, sae, tmp_path / "whole.index")
    make_excerpt(index, made.excerpt)
    monkeypatch.setattr("scope.sample.sample_sae", lambda: made)

    config = DemoConfig(max_tokens=16_384, d_sae=1024, passes=8, evaluate_tokens=600)
    outcome = make_demo(folder, config)
    workspace = Workspace(folder)
    assert [entry.name for entry in workspace.saes()] == ["gemma-3-270m-topk", "stand-in"]
    assert workspace.sae("stand-in").fingerprint == sae.fingerprint
    assert (workspace.find("stand-in", "sae").path / "README.md").read_bytes() == b"a card"
    own = FeatureIndex.open(workspace.find("stand-in", "feature-index").path)
    excerpt = workspace.excerpt(workspace.excerpt_of(sae.fingerprint).id)
    for feature in range(excerpt.d_sae):
        shown, expected = excerpt.top_examples(feature), own.top_examples(feature, 10)
        assert [(one.tokens, one.values, one.title) for one in shown] == [
            (one.tokens, one.values, one.title) for one in expected
        ]
    assert outcome.data["shipped"]["features"] == 48
    assert "ships with the workbench" in outcome.text

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    make_demo(folder, config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    make_demo(folder, dataclasses.replace(config, shipped=False))


def test_what_ships_is_small():
    files = [path for path in sample_text().parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BUDGET


@pytest.mark.real
def test_the_sae_that_ships_has_the_excerpt_that_ships(tmp_path):
    """The strengths that the excerpt tells are those that the SAE has on the model's activations there."""
    from activations.text import TextSource
    from scope.models import LanguageModel
    from scope.saes.formats import load

    shipped = sample_sae()
    assert shipped is not None
    sae = load(shipped.path)
    excerpt = FeatureExcerpt.open(shutil.copytree(shipped.excerpt, tmp_path / "shipped.excerpt"))
    excerpt.require_sae(sae.fingerprint)
    assert (sae.d_sae, sae.hook_name) == (8192, "blocks.8.hook_resid_post")
    assert excerpt.n_rows > 8_500_000
    assert (shipped.path / "README.md").is_file()
    model = LanguageModel.load("gemma-3-270m")
    excerpt.read_text(TextSource(sample_text(), shuffle_seed=SAMPLE_SEED), model)
    norms = sae.decoder_norms.detach().float().numpy()
    alive = np.flatnonzero(~excerpt.table["dead"].to_numpy(bool))
    for feature in alive[:: len(alive) // 5].tolist():
        example = excerpt.top_examples(feature)[0]
        first = example.row - example.position + 1
        ids = [model.bos_token_id, *excerpt.text.tokens[first : example.row + 1].tolist()]
        with torch.no_grad():
            found = model.run(torch.tensor(ids), hooks=[sae.hook_name], saes=sae).features[sae.hook_name]
        strength = float(found[-1, feature]) * norms[feature]
        assert strength == pytest.approx(example.value, rel=0.05)
