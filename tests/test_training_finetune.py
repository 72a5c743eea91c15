"""End-to-end fine-tuning: the KL and its gradient against plain autograd, and what it does to an SAE."""

import json
from pathlib import Path
from typing import Any

import helpers_models
import numpy as np
import pytest
import torch
from helpers_training import one_thread  # noqa: F401  # a fixture
from test_cli import scope
from test_training_several_hooks import dictionary

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.errors import InvalidInputError, OccupiedError
from scope.interventions import splice_edits
from scope.models import LanguageModel
from scope.models.divergence import kl_divergence
from scope.saes import formats
from scope.training import FinetuneConfig, TrainConfig, finetune_kl, train

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"
CONFIG = FinetuneConfig(tokens=2500, batch_tokens=120, lr=3e-3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return helpers_models.tiny_model("gemma3")


@pytest.fixture(scope="module")
def store(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("finetune")
    with open(folder / "text.jsonl", "w") as file:
        for number in range(30):
            text = "the quick brown fox jumps over the lazy dog. " * (1 + number % 3)
            file.write(json.dumps({"text": text, "title": f"page-{number}"}) + "\n")
    text = TextSource([folder / "text.jsonl"])
    capture(model, text, [HOOK, MLP_IN, MLP_OUT], folder / "a.zarr", context_size=24, dtype="float32")
    return ActivationStore.open(folder / "a.zarr")


def test_the_divergence_and_its_gradient_equal_plain_autograd(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scope.models.divergence.CHUNK_BYTES", 4 * 6 * model.d_vocab * 3)  # three tokens at a time
    windows = [np.array([2, 17, 5, 40, 9], np.int32), np.array([2, 7, 30], np.int32)]
    sae = dictionary("transcoder", "relu", [1])
    found = kl_divergence(model, windows, splice_edits(sae))
    ours = torch.autograd.grad(found.slope, list(sae.parameters()))
    sums = []
    for window in windows:
        tokens = torch.from_numpy(window).long()
        plain = model.run(tokens).logits.detach()
        spliced = model.run(tokens, edits=splice_edits(sae), grad=True).logits
        p, q = plain.log_softmax(-1), spliced.log_softmax(-1)
        sums.append((p.exp() * (p - q)).sum())
        assert float((plain[0] - spliced[0]).abs().max()) < 1e-5  # BOS is left alone
    expected = sum(sums) / 8
    assert float(found.kl) == pytest.approx(float(expected), rel=1e-4)
    assert found.n_tokens == 8
    for mine, plain_gradient in zip(ours, torch.autograd.grad(expected, list(sae.parameters())), strict=True):
        torch.testing.assert_close(mine, plain_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "transcoder"])
def test_the_predictions_come_nearer_to_the_models(
    model: LanguageModel, store: ActivationStore, tmp_path: Path, architecture: str
) -> None:
    several = architecture == "transcoder"
    config = TrainConfig(arch=architecture, d_sae=48, k=4, tokens=40 * 64, batch_size=64)
    sae = train(store, MLP_IN if several else HOOK, config, hook_out=MLP_OUT if several else None).sae
    before = sae.fingerprint
    needing = [parameter.requires_grad for parameter in model.hf.parameters()]
    report = finetune_kl(sae, model, store, CONFIG, tmp_path / "tuned")
    assert report.kl_after < 0.8 * report.kl_before
    assert report.tokens >= 2500
    assert sae.fingerprint == before != report.sae.fingerprint
    loaded = formats.load(tmp_path / "tuned")
    assert loaded.fingerprint == report.sae.fingerprint
    training = loaded.cfg.metadata.training
    assert training is not None
    assert training["finetune_kl"]["tokens"] == 2500
    assert training["k"] == 4
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == needing
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    if architecture == "batchtopk":
        assert torch.equal(report.sae.threshold, sae.threshold)
    with pytest.raises(OccupiedError):
        finetune_kl(sae, model, store, CONFIG, tmp_path / "tuned")


def test_held_out_documents_are_never_seen(
    model: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = train(store, HOOK, TrainConfig(d_sae=48, k=4, tokens=640, batch_size=64)).sae
    seen: list[tuple[int, int]] = []
    rows = ActivationStore.rows

    def noted(self: ActivationStore, start: int, stop: int) -> Any:
        seen.append((start, stop))
        return rows(self, start, stop)

    monkeypatch.setattr(ActivationStore, "rows", noted)
    finetune_kl(sae, model, store, FinetuneConfig(tokens=store.n_rows, batch_tokens=400))
    documents, sequences = store.documents(), store.sequences()
    held_out = sequences[sequences["document"].isin(documents[documents["held_out"]]["document"])]
    starts = set(held_out["start_row"])
    assert starts
    assert not starts & {start for start, _ in seen}
    assert len({start for start, _ in seen}) == len(sequences) - len(starts)


def test_what_cannot_be_fine_tuned_is_refused(model: LanguageModel, store: ActivationStore) -> None:
    with pytest.raises(InvalidInputError, match="crosscoder"):
        finetune_kl(dictionary("crosscoder", "topk", [0, 1]), model, store, CONFIG)
    for wrong in ({"tokens": 0}, {"lr": -1.0}, {"warmup": 1.0}, {"mse_weight": -1.0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            FinetuneConfig(**wrong)  # type: ignore[arg-type]


def test_the_command_says_what_it_gained(store: ActivationStore, tmp_path: Path) -> None:
    train(store, HOOK, TrainConfig(d_sae=48, k=4, tokens=640, batch_size=64), tmp_path / "sae")
    model = helpers_models.tiny_folder("gemma3")
    answer = scope(
        *("finetune", store.path, tmp_path / "sae", "--out", tmp_path / "tuned", "--tokens", 500),
        *("--batch-tokens", 100, "--lr", "3e-3", "--evaluate-tokens", 60, "--model", model, "--json"),
    )
    assert {"kl_before", "kl_after", "delta_ce", "fvu"} <= answer.keys()
    assert formats.load(tmp_path / "tuned").fingerprint[:12] == answer["id"]
