"""The tricks of training, one by one: what each field does, and that a run with them resumes exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import HOOK, MemorySource, mean_max_cosine, one_thread, synthetic  # noqa: F401  # a fixture

from scope.errors import InvalidInputError, UnknownNameError
from scope.training import TrainConfig, train
from scope.training.initialisation import geometric_median
from scope.training.resampling import resample
from scope.training.schedules import annealed_k
from scope.training.sparsity import FrequencyPenalty, SparsityController
from scope.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = synthetic(20_000)
CONFIG = TrainConfig(d_sae=64, k=4, tokens=400 * 256, batch_size=256, lr=5e-3)


def train_on(rows: torch.Tensor, config: TrainConfig, steps: int | None = None) -> tuple[SAETrainer, list[Any]]:
    trainer = SAETrainer(config, rows.shape[1])
    trainer.initialise(rows[:4096])
    generator = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(steps or config.steps):
        batch = rows[torch.randint(len(rows), (config.batch_size,), generator=generator)]
        reports.append(trainer.step(batch))
    return trainer, reports


# Sparsity


@pytest.mark.parametrize(
    ("architecture", "k", "options"),
    [
        ("standard", 4, {}),
        ("gated", 6, {}),
        ("jumprelu", 6, {"sparsity_loss": "tanh"}),
        ("jumprelu", 4, {"sparsity_loss": "quadratic"}),
        ("jumprelu", 4, {"sparsity_coefficient": 1.0}),
    ],
)
def test_the_controller_reaches_the_target_l0(architecture: str, k: int, options: dict[str, Any]) -> None:
    config = replace(CONFIG, arch=architecture, k=k, tokens=500 * 128, batch_size=128, **options)
    _, reports = train_on(DATA.rows, config)
    l0 = float(torch.stack([report.l0 for report in reports[-40:]]).mean())
    assert l0 == pytest.approx(k, rel=0.05)


def test_without_the_controller_the_coefficient_stays() -> None:
    config = replace(CONFIG, arch="standard", l0_controller=False, sparsity_coefficient=0.5, sparsity_warmup=0.1)
    _, reports = train_on(DATA.rows, config, 60)
    coefficients = [float(report.coefficient) for report in reports]
    assert coefficients[0] == pytest.approx(0.5 / 40)
    assert coefficients[19] == pytest.approx(0.25)
    assert coefficients[39:] == pytest.approx([0.5] * 21)
    assert float(reports[0].parts["sparsity"]) < float(reports[39].parts["sparsity"])


def test_the_controller_pushes_towards_the_target_and_no_further_than_it_may() -> None:
    controller = SparsityController(1.0, steps=1000, warmup=0.0, steer=True, device="cpu")
    before = float(controller.coefficient(0))
    for step in range(20):
        controller.observe(step, torch.tensor(1e9), 10)
    high = float(controller.coefficient(20))
    assert before < high < before * 5
    for step in range(200):
        controller.observe(step, torch.tensor(1.0), 10)
    assert float(controller.coefficient(221)) < before
    waiting = SparsityController(1.0, steps=1000, warmup=0.5, steer=True, device="cpu")
    waiting.observe(10, torch.tensor(1e9), 10)
    assert float(waiting.coefficient(399)) == pytest.approx(0.8)


def test_k_falls_to_its_value() -> None:
    ks = [annealed_k(step, 100, 4, 16, 0.5) for step in range(100)]
    assert ks[0] == 16
    assert ks[25] == 10
    assert ks[50:] == [4] * 50
    assert ks == sorted(ks, reverse=True)
    _, reports = train_on(DATA.rows, replace(CONFIG, k_anneal=0.5, k_start=16, tokens=20 * 256))
    assert float(reports[0].l0) > 12
    assert float(reports[-1].l0) <= 4
    default = replace(CONFIG, k_anneal=0.5)
    assert default.k_start_for() == 16
    assert not default.is_plain
    assert CONFIG.is_plain


def test_thresholds_have_a_learning_rate_of_their_own() -> None:
    moved = []
    for factor in (1.0, 10.0):
        trainer = SAETrainer(replace(CONFIG, arch="jumprelu", threshold_lr=factor, sparsity_warmup=0.0), 32)
        trainer.initialise(DATA.rows[:2000])
        before = trainer.sae.threshold.detach().clone(), trainer.sae.W_enc.detach().clone()
        trainer.step(DATA.rows[:256])
        moved.append([trainer.sae.threshold.detach() - before[0], trainer.sae.W_enc.detach() - before[1]])
    torch.testing.assert_close(moved[1][0], 10 * moved[0][0], rtol=1e-3, atol=1e-6)
    assert float(moved[0][0].abs().max()) > 0
    torch.testing.assert_close(moved[1][1], moved[0][1])


# Over-dense and dead features


def test_features_that_fire_too_often_are_penalised() -> None:
    penalty = FrequencyPenalty(2.0, 0.1, 3, "cpu")
    for _ in range(2000):
        penalty.observe(torch.tensor([5, 10, 40]), 100)
    torch.testing.assert_close(penalty.weights(), torch.tensor([0.0, 0.0, 6.0]), rtol=1e-3, atol=1e-3)
    rows = (
        DATA.rows + 20 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(2)).abs() * DATA.directions[0]
    )
    densest = []
    for coefficient in (0.0, 30.0):
        config = replace(CONFIG, arch="batchtopk", frequency_coefficient=coefficient, frequency_cap=0.2)
        trainer, _ = train_on(rows, replace(config, tokens=200 * 256))
        densest.append(float(trainer.density.max()))
    assert densest[1] < 0.26 < 0.35 < densest[0]


def test_dead_features_start_anew_at_badly_explained_rows() -> None:
    trainer, _ = train_on(DATA.rows, replace(CONFIG, auxk_coefficient=0.0), 20)
    sae = trainer.sae
    x = DATA.rows[:512] * trainer.scale
    x[7] = sae.b_dec + 50 * torch.nn.functional.normalize(torch.ones(32), dim=0)
    with torch.no_grad():
        sae.b_enc[[3, 9]] = -100.0
    before = sae.W_dec.detach().clone()
    started = resample(sae, torch.tensor([3, 9]), x, x, torch.Generator().manual_seed(0))
    assert started.tolist() == [3, 9]
    unchanged = torch.ones(64, dtype=torch.bool)
    unchanged[started] = False
    assert torch.equal(sae.W_dec[unchanged], before[unchanged])
    along = torch.nn.functional.normalize(x[7] - x.mean(0), dim=0)
    assert float((sae.W_dec[started] @ along).max()) == pytest.approx(1, abs=1e-4)
    alive_norm = float(sae.W_enc[:, unchanged].norm(dim=0).mean())
    assert float(sae.W_enc[:, 3].norm()) == pytest.approx(alive_norm, rel=1e-4)
    assert float(sae.b_enc[3]) > -10
    assert resample(sae, torch.arange(64), x, x, torch.Generator()).numel() == 0


def test_resampling_leaves_few_dead_features() -> None:
    dead = {}
    for every in (0, 40):
        config = replace(CONFIG, auxk_coefficient=0.0, dead_feature_tokens=2048, resample_steps=every, tokens=240 * 256)
        trainer = SAETrainer(config, 32)
        trainer.initialise(DATA.rows[:4096])
        with torch.no_grad():
            trainer.sae.b_enc[32:] = -2.5
        generator = torch.Generator().manual_seed(1)
        for _ in range(config.steps):
            trainer.step(DATA.rows[torch.randint(20_000, (256,), generator=generator)])
        dead[every] = int((trainer.tokens_since_fired >= 2048).sum())
    assert dead[0] >= 24
    assert dead[40] <= 8


# Start, scale, norms


def test_where_weights_and_biases_start() -> None:
    rows = DATA.rows[:2000]
    tied, untied = (SAETrainer(replace(CONFIG, tied_init=kind), 32).sae for kind in (True, False))
    torch.testing.assert_close(tied.W_enc, 0.5 * tied.W_dec.T)
    assert float((untied.W_enc - 0.5 * untied.W_dec.T).norm()) > 1
    torch.testing.assert_close(untied.W_enc.norm(dim=0), torch.full((64,), 0.5))
    for kind, expected in (
        ("geometric_median", geometric_median(rows)),
        ("mean", rows.mean(0)),
        ("zeros", 0 * rows[0]),
    ):
        trainer = SAETrainer(replace(CONFIG, b_dec_init=kind, scale_inputs=False), 32)
        trainer.initialise(rows)
        assert trainer.scales == (1.0,)
        torch.testing.assert_close(trainer.sae.b_dec.detach(), expected)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_free_decoder_norms_are_folded_into_the_encoder(architecture: str) -> None:
    options = {"sparsity_loss": "tanh"} if architecture == "jumprelu" else {}
    config = replace(CONFIG, arch=architecture, decoder_norm="free", tokens=60 * 256, **options)
    with torch.enable_grad():
        trainer, _ = train_on(DATA.rows, config)
    assert float((trainer.sae.decoder_norms - 1).abs().max()) > 0.01
    sae = trainer.export()
    torch.testing.assert_close(sae.decoder_norms, torch.ones(64))
    rows = DATA.rows[:200]
    assert trainer.scale is not None
    torch.testing.assert_close(sae(rows) * trainer.scale, trainer.sae(rows * trainer.scale), rtol=1e-4, atol=1e-3)


def test_known_features_are_recovered_with_all_tricks_at_once() -> None:
    config = replace(CONFIG, arch="jumprelu", resample_steps=100, frequency_coefficient=0.1, tied_init=False)
    trainer, _ = train_on(DATA.rows, config)
    assert mean_max_cosine(trainer.export().W_dec, DATA.directions) >= 0.9


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "jumprelu", "frequency_coefficient": 1.0, "resample_steps": 6},
        {"arch": "batchtopk", "k_anneal": 0.6, "resample_steps": 7},
        {"arch": "matryoshka"},
        {"arch": "gated", "decoder_norm": "free"},
    ],
)
def test_a_run_with_tricks_resumes_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    source = MemorySource(DATA.rows[:3000])
    config = replace(
        CONFIG, d_sae=48, tokens=30 * 128, batch_size=128, checkpoint_steps=8, dead_feature_tokens=256, **options
    )
    whole = train(source, HOOK, config)

    def die(done: int, total: int | None) -> None:
        if done == 19 * 128:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(source, HOOK, config, tmp_path / "one", progress=die)
    resumed = train(source, HOOK, config, tmp_path / "one")
    assert resumed.resumed_at == 16
    assert resumed.sae.fingerprint == whole.sae.fingerprint
    lines = [[{**line, "tokens_per_s": 0, "data_wait_share": 0} for line in report.log] for report in (resumed, whole)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"decoder_norm": "uniit"}, UnknownNameError, "unit"),
        ({"b_dec_init": "geometric_mean"}, UnknownNameError, "geometric_median"),
        ({"k_start": 2, "k_anneal": 0.5}, InvalidInputError, "k_start"),
        ({"k_start": 20}, InvalidInputError, "k_anneal is 0"),
        ({"frequency_cap": 0.0}, InvalidInputError, "frequency_cap"),
        ({"sparsity_coefficient": -1.0}, InvalidInputError, "sparsity_coefficient"),
        ({"sparsity_warmup": 1.5}, InvalidInputError, "sparsity_warmup"),
        ({"resample_steps": -1}, InvalidInputError, "resample_steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(CONFIG, **wrong)
