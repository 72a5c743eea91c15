"""The trainer, a batch at a time: what a step does, what it refuses, and what comes out."""

from dataclasses import replace

import pytest
import torch
from helpers_training import mean_max_cosine, one_thread, synthetic  # noqa: F401  # a fixture

from scope.errors import InvalidInputError, MismatchError, NonFiniteError, UnknownNameError
from scope.saes.base import SAEMetadata
from scope.training.config import TrainConfig
from scope.training.initialisation import expected_norm_scale, geometric_median
from scope.training.schedules import learning_rate_share
from scope.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(d_sae=64, k=4, tokens=150 * 256, batch_size=256, lr=5e-3)


def train_on(rows: torch.Tensor, config: TrainConfig) -> SAETrainer:
    trainer = SAETrainer(config, rows.shape[1])
    generator = torch.Generator().manual_seed(1)
    for _ in range(config.steps):
        trainer.step(rows[torch.randint(len(rows), (config.batch_size,), generator=generator)])
    return trainer


def test_known_features_are_recovered() -> None:
    data = synthetic(20_000)
    trainer = train_on(data.rows, replace(CONFIG, tokens=400 * 256))
    assert mean_max_cosine(trainer.export().W_dec, data.directions) >= 0.9


def test_auxk_revives_dead_features() -> None:
    rows = synthetic(20_000).rows
    dead = {}
    for coefficient in (0.0, 1 / 8):
        config = replace(CONFIG, auxk_coefficient=coefficient, dead_feature_tokens=2048)
        trainer = SAETrainer(config, 32)
        trainer.initialise(rows[:4096])
        with torch.no_grad():
            trainer.sae.b_enc[32:] = -2.5  # half of the features are never among the largest four
        generator = torch.Generator().manual_seed(1)
        for _ in range(config.steps):
            trainer.step(rows[torch.randint(len(rows), (256,), generator=generator)])
        dead[coefficient] = int((trainer.tokens_since_fired >= 2048).sum())
    assert dead[0.0] >= 24
    assert dead[1 / 8] <= 8


def test_the_same_seed_gives_the_same_weights() -> None:
    rows = synthetic(4000).rows
    config = replace(CONFIG, tokens=20 * 256)
    one, same = train_on(rows, config), train_on(rows, config)
    assert one.export().fingerprint == same.export().fingerprint
    assert one.export().fingerprint != train_on(rows, replace(config, seed=1)).export().fingerprint


@torch.no_grad()
def test_the_exported_sae_does_to_raw_rows_what_the_trained_one_does_to_scaled_ones() -> None:
    rows = 500 * synthetic(4000).rows
    trainer = train_on(rows, replace(CONFIG, tokens=20 * 256))
    assert trainer.scale is not None
    sae = trainer.export()
    scaled = trainer.sae.encode(rows * trainer.scale)
    torch.testing.assert_close(sae.encode(rows) * trainer.scale, scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(rows) * trainer.scale, trainer.sae(rows * trainer.scale), rtol=1e-4, atol=1e-4)
    # Rows of norm 1: a value is the feature's contribution to the row, in the model's own units.
    torch.testing.assert_close(sae.decoder_norms, torch.ones(64))


def test_rows_get_the_expected_norm_and_b_dec_their_median() -> None:
    rows = synthetic(4000).rows
    trainer = SAETrainer(CONFIG, 32)
    trainer.initialise(rows)
    scale = expected_norm_scale(rows)
    assert trainer.scale == scale
    assert float((rows * scale).norm(dim=-1).mean()) == pytest.approx(32**0.5, rel=1e-5)
    far = torch.cat([rows, torch.full((40, 32), 1e5)])
    assert (geometric_median(far) - geometric_median(rows)).norm() < 0.1 * (far.mean(0) - rows.mean(0)).norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_weights_are_never_stepped_on_a_non_finite_batch(bad: float) -> None:
    rows = synthetic(512).rows
    trainer = SAETrainer(CONFIG, 32, SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    trainer.step(rows[:256])
    before = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
    batch = rows[256:].clone()
    batch[[7, 9], 3] = bad
    with pytest.raises(NonFiniteError, match=r"2 rows .* blocks.1.hook_resid_post: rows 1007, 1009") as caught:
        trainer.step(batch, rows=range(1000, 1256))
    assert caught.value.rows == [1007, 1009]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_tensors().items())


def test_finite_rows_whose_gradient_overflows_are_not_stepped_on() -> None:
    trainer = SAETrainer(replace(CONFIG, clip_grad_norm=0.0), 32)
    trainer.step(synthetic(256).rows)
    before = trainer.export().fingerprint
    with pytest.raises(NonFiniteError, match="gradient"):
        trainer.step(torch.full((256, 32), 1e30))
    assert trainer.export().fingerprint == before


@pytest.mark.parametrize("shape", [(256, 1), (256, 31), (256,)])
def test_a_batch_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="32"):
        SAETrainer(CONFIG, 32).step(torch.zeros(shape))


def test_a_step_reports_what_it_did() -> None:
    rows = synthetic(1024).rows
    trainer = SAETrainer(replace(CONFIG, dead_feature_tokens=1), 32)
    trainer.step(rows[:256])
    with torch.no_grad():
        trainer.sae.b_enc[:8] = -20
    trainer.step(rows[:256])
    report = trainer.step(rows[256:512])
    assert (report.step, report.tokens) == (3, 768)
    assert 0 < float(report.l0) <= 4
    assert 0 < float(report.fvu) < 2
    assert float(report.dead) >= 8
    assert "auxk" in report.parts
    assert trainer.density.sum() == 0  # counted during the decay only


def test_large_gradients_are_clipped() -> None:
    rows = synthetic(256).rows
    free, clipped = (SAETrainer(replace(CONFIG, clip_grad_norm=norm), 32) for norm in (0.0, 1e-3))
    assert float(free.step(rows).grad_norm) == pytest.approx(float(clipped.step(rows).grad_norm))
    # Adam's mean gradient after one step is (1 - beta1) of it.
    norm = torch.stack([clipped.optimiser.state[row]["exp_avg"].norm() for row in clipped._rows.values()]).norm()
    assert float(norm) / 32 == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    shares = [learning_rate_share(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:80] == [1.0] * 71
    assert shares[90] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(0.05)
    assert [learning_rate_share(step, 10, 0, 0) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_sae": 0}, "d_sae"),
        ({"k": 65}, "k is 65"),
        ({"k": 0}, "k is 0"),
        ({"tokens": 255}, "less than a batch"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"warmup": 0.9}, "together"),
        ({"decay": 1.5}, "decay"),
        ({"beta2": 1.0}, "beta2"),
        ({"checkpoint_steps": 0}, "checkpoint_steps"),
        ({"compute_dtype": "bfloat16"}, "CUDA"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(CONFIG, **wrong)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="topk"):
        SAETrainer(replace(CONFIG, arch="top"), 32)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidInputError, match=device):
        SAETrainer(replace(CONFIG, device=device), 32)


def test_products_are_bfloat16_on_a_gpu_by_default() -> None:
    assert CONFIG.product_dtype == "float32"
    assert replace(CONFIG, device="cuda").product_dtype == "bfloat16"
    assert replace(CONFIG, device="cuda", compute_dtype="float32").product_dtype == "float32"


def test_the_default_learning_rate_follows_width_and_batch() -> None:
    at = replace(CONFIG, lr=None, d_sae=2**14, batch_size=2048, tokens=10_000)
    assert at.peak_lr == pytest.approx(1e-3)
    assert replace(at, d_sae=2**12).peak_lr == pytest.approx(2e-3)
    assert replace(at, batch_size=512).peak_lr == pytest.approx(5e-4)


@pytest.mark.filterwarnings("ignore")
def test_one_step_equals_sae_lens() -> None:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = replace(CONFIG, warmup=0.0, decay=0.0, clip_grad_norm=0.0, auxk_coefficient=0.0)
    trainer = SAETrainer(config, 32)
    rows = synthetic(512).rows
    trainer.initialise(rows)
    theirs = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4, decoder_init_norm=None, rescale_acts_by_decoder_norm=False)
    )
    theirs.load_state_dict(trainer.sae.weights())
    x = rows[:256] * trainer.scale
    output = theirs.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    )
    optimiser = torch.optim.Adam(theirs.parameters(), lr=5e-3, betas=(0.9, 0.999))
    output.loss.backward()
    # We take out of the gradient what would only change a decoder row's norm, and bring the rows back to 1.
    with torch.no_grad():
        along = (theirs.W_dec.grad * theirs.W_dec).sum(dim=-1, keepdim=True)
        theirs.W_dec.grad -= along * theirs.W_dec
    optimiser.step()
    report = trainer.step(rows[:256])
    assert float(report.loss) * 32 == pytest.approx(float(output.loss), rel=1e-5)
    expected = dict(theirs.named_parameters())
    expected["W_dec"] = expected["W_dec"] / expected["W_dec"].norm(dim=-1, keepdim=True)
    for name, parameter in trainer.sae.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-4)
