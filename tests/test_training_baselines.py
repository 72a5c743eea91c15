"""What an SAE is compared with: each equals its plain form, and one file beside the SAE tells of all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_training import HOOK, MemorySource, one_thread, synthetic, with_flags  # noqa: F401  # a fixture
from test_cli import scope
from test_cli_train import COMMON, RESID, store  # noqa: F401  # a fixture
from test_training_metrics import ToyModel

from activations.source import RowFlag
from scope.models import LanguageModel
from scope.saes import formats
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE
from scope.training.baselines import baselines_for, training_moments
from scope.training.cross_entropy import SplicedLosses, delta_ce
from scope.training.evaluate import Quality, evaluate, evaluate_several, read_quality
from scope.training.metrics import measure_all, reconstruction_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = synthetic(3000).rows
FLAGS = with_flags(3000, 3, RowFlag.HELD_OUT) | with_flags(3000, 10, RowFlag.BOS)
SOURCE = MemorySource(ROWS, FLAGS)
TRAINED = ROWS[FLAGS == 0].double().numpy()


def dictionary(d_sae: int = 96, k: int = 5) -> TopKSAE:
    config = TopKConfig(d_in=32, d_sae=d_sae, k=k, metadata=SAEMetadata(hook_name=HOOK))
    return TopKSAE(config, generator=torch.Generator().manual_seed(0))


def test_moments_are_those_of_the_training_rows() -> None:
    moments = training_moments(SOURCE, HOOK)
    assert moments.n_rows == len(TRAINED)
    np.testing.assert_allclose(moments.mean, TRAINED.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.covariance, np.cov(TRAINED.T, bias=True), rtol=1e-4, atol=1e-3)


def test_they_lose_no_digits_far_from_the_origin() -> None:
    far = MemorySource(ROWS + 3e4)
    np.testing.assert_allclose(
        training_moments(far, HOOK).covariance, np.cov((ROWS + 3e4).double().numpy().T, bias=True), rtol=1e-2, atol=0.5
    )


def test_each_equals_its_plain_form() -> None:
    sae, moments = dictionary(), training_moments(SOURCE, HOOK)
    found = baselines_for(sae, moments, l0=4.6)
    x = ROWS[:50]
    mean = TRAINED.mean(0)
    values, vectors = np.linalg.eigh(np.cov(TRAINED.T, bias=True))
    leading = vectors[:, -5:]
    centred = x.double().numpy() - mean
    np.testing.assert_allclose(found["pca"](x).detach(), centred @ leading @ leading.T + mean, rtol=1e-3, atol=1e-2)
    assert ((found["pca"].encode(x) > 0).sum(1) == 5).all()  # of each direction the feature of one sign
    np.testing.assert_allclose(found["mean"](x).detach(), np.tile(mean, (50, 1)), rtol=1e-5)
    random = found["random"]
    assert (random.d_sae, random.cfg.to_dict()["k"]) == (96, 5)
    torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(96))
    own = random.W_enc.norm(dim=0)
    torch.testing.assert_close(own, own[:1].expand(96))

    def residual(factor: float) -> float:
        explained = random(moments.sample) - random.b_dec
        return float((moments.sample - random.b_dec - factor * explained).square().sum())

    assert residual(1.0) < min(residual(0.99), residual(1.01))  # its one factor is the best there is
    shares = values[::-1].cumsum() / values.sum()
    measured = measure_all(found, SOURCE)
    assert measured["pca"].fvu == pytest.approx(1 - shares[4], abs=0.05)
    assert measured["mean"].fvu == pytest.approx(1, abs=0.05)
    assert max(measured["pca"].fvu, measured["random"].fvu) < 0.9 * measured["mean"].fvu
    assert measured["random"].l0 == pytest.approx(5)


def test_all_are_measured_by_one_function_in_one_pass() -> None:
    found = baselines_for(dictionary(), training_moments(SOURCE, HOOK), l0=5)
    documents = np.arange(3000) // 50
    together = measure_all(found, SOURCE, documents=documents)
    for name, sae in found.items():
        alone = reconstruction_metrics(sae, SOURCE, documents=documents)
        assert alone.to_dict() == together[name].to_dict()


def test_intervals_of_l0_and_of_all_rows_hold_the_figures() -> None:
    rows = ROWS.clone()
    rows[::200] *= 50
    documents = np.arange(3000) // 50
    config = TopKConfig(d_in=32, d_sae=64, k=4, metadata=SAEMetadata(hook_name=HOOK))
    sae = TopKSAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.fill_(-8)  # some rows have fewer features
    found = reconstruction_metrics(sae, MemorySource(rows), documents=documents, held_out_only=False)
    for name in ("fvu", "fvu_all", "l0"):
        low, high = getattr(found, f"{name}_interval")
        assert low < getattr(found, name) < high
    with torch.no_grad():
        fired = (sae.encode(rows) > 0).sum(1).double().numpy()
    per_document = fired.reshape(60, 50).mean(1)
    width = found.l0_interval[1] - found.l0_interval[0]  # type: ignore[index]
    assert width == pytest.approx(2 * 1.96 * per_document.std() / 60**0.5, rel=0.2)


def test_the_mean_recovers_nothing() -> None:
    model = ToyModel()
    windows = [np.concatenate([[2], np.arange(3, 12)]), np.concatenate([[2], np.arange(20, 40)])]
    source = MemorySource(model.table)
    found = baselines_for(dictionary(), training_moments(source, HOOK), l0=5)
    means = {HOOK: training_moments(source, HOOK).mean}
    seen: list[tuple[int, int | None]] = []
    losses = SplicedLosses(
        model, windows, means, documents=[0, 1], progress=lambda *done: seen.append(done), n_passes=5
    )
    by_name = {name: losses.of(sae) for name, sae in found.items()}
    assert by_name["mean"].ce_recovered == pytest.approx(0, abs=1e-4)
    assert min(by_name["pca"].ce_recovered, by_name["random"].ce_recovered) > 0.1
    assert by_name["pca"] == delta_ce(model, found["pca"], windows, means, documents=[0, 1])
    assert seen == [(number, 5) for number in range(1, 6)]


def test_the_command_measures_and_leaves_one_file(store: Path, tmp_path: Path) -> None:  # noqa: F811
    sizes = ("--hook", RESID, "--d-sae", 32, "--k", 4, "--out", tmp_path / "one")
    trained: dict[str, Any] = scope("train", store, *sizes, *COMMON, "--no-baselines")
    assert "baselines" not in trained
    answer = scope("evaluate", store, tmp_path / "one", "--tokens", 60, "--json")
    kept = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert answer["fvu"] == pytest.approx(trained["fvu"])
    assert answer["delta_ce"] == pytest.approx(trained["delta_ce"], rel=1e-5)
    assert {name: value for name, value in answer.items() if name not in ("sae", "id")} == kept
    assert read_quality(tmp_path / "one") == kept
    assert set(kept["baselines"]) == {"pca", "random", "mean"}
    for figures in (kept, *kept["baselines"].values()):
        for name in ("fvu", "fvu_all", "l0", "delta_ce", "ce_recovered"):
            assert {name, f"{name}_interval"} <= figures.keys()
    assert kept["baselines"]["pca"]["l0"] == pytest.approx(4)
    before = (tmp_path / "one" / "evaluation.json").read_bytes()
    again = scope("evaluate", store, tmp_path / "one", "--tokens", 0, "--no-save", "--json")
    assert "delta_ce" not in again
    assert "delta_ce" not in again["baselines"]["pca"]
    assert (tmp_path / "one" / "evaluation.json").read_bytes() == before


def test_several_are_measured_as_each_alone_in_fewer_passes(
    store: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a sweep's figures lie beside each SAE."""
    from activations.store import ActivationStore
    from scope.cli._steps import load_model_of

    passes = []
    measure = LanguageModel.cross_entropy

    def counted(self: LanguageModel, *arguments: Any) -> Any:
        passes.append(1)
        return measure(self, *arguments)

    monkeypatch.setattr(LanguageModel, "cross_entropy", counted)
    sweep = ("--hook", RESID, "--d-sae", "24,32", "--k", "3,4", "--out", tmp_path / "sweep")
    runs = scope("train", store, *sweep, *COMMON)["runs"]
    assert len(passes) == 2 + 4 + 2 + 4  # plain and mean, the SAEs, PCA of two ranks, four random dictionaries
    opened = ActivationStore.open(store)
    model = load_model_of(opened)
    saes = {run["sae"]: formats.load(run["sae"]) for run in runs}
    for path, sae in saes.items():
        passes.clear()
        alone = json.loads(json.dumps(evaluate(sae, opened, model, ce_tokens=60).to_dict()))
        assert len(passes) == 5
        kept = read_quality(Path(path))
        for name in ("fvu", "fvu_all", "l0", "dead_share", "n_rows"):
            assert kept[name] == pytest.approx(alone[name])
        assert kept["delta_ce"] == pytest.approx(alone["delta_ce"], rel=1e-4, abs=1e-6)
        for which, figures in alone["baselines"].items():
            for name, value in figures.items():
                assert kept["baselines"][which][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (which, name)
        assert kept["baselines"]["mean"]["ce_recovered"] == 0
    seen: list[tuple[int, int | None]] = []
    found = dict(evaluate_several(saes, opened, model, ce_tokens=60, progress=lambda *done: seen.append(done)))
    assert found.keys() == saes.keys()
    assert seen == [(number, seen[-1][0]) for number in range(1, len(seen) + 1)]


def test_figures_of_earlier_versions_are_read(tmp_path: Path) -> None:
    assert read_quality(tmp_path) == {}
    (tmp_path / "quality.json").write_text('{"fvu": 0.2}')
    assert read_quality(tmp_path) == {"fvu": 0.2}
    Quality(reconstruction_metrics(dictionary(), SOURCE), None).save(tmp_path)
    assert read_quality(tmp_path)["fvu"] != 0.2
