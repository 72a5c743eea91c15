"""The step without autograd against the step with it, and what it does when the host looks two steps late."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers_training import one_thread, synthetic  # noqa: F401  # a fixture
from torch import Tensor

from scope.errors import NonFiniteError
from scope.saes.base import Port, Ports, SAEMetadata
from scope.training import selection
from scope.training.config import TrainConfig
from scope.training.fast import FastStep
from scope.training.selection import next_width
from scope.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(
    d_sae=64, k=4, tokens=40 * 128, batch_size=128, lr=5e-3, dead_feature_tokens=400, clip_grad_norm=0.05
)
ROWS = synthetic(2048).rows


def trainer_for(config: TrainConfig = CONFIG, lag: int | None = 0) -> SAETrainer:
    """A trainer half of whose features never fire; `lag` None takes autograd's step."""
    trainer = SAETrainer(config, 32, SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    trainer.fast = None if lag is None else FastStep(trainer, lag)
    trainer.initialise(ROWS)
    with torch.no_grad():
        trainer.sae.b_enc[40:] = -2.5
    return trainer


def batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return ROWS[torch.randint(len(ROWS), (128,), generator=generator)]


@pytest.mark.parametrize("auxk_coefficient", [0.0, 1 / 8])
@pytest.mark.parametrize("clip_grad_norm", [0.0, 0.05])
def test_it_equals_the_step_through_autograd(auxk_coefficient: float, clip_grad_norm: float) -> None:
    config = replace(CONFIG, auxk_coefficient=auxk_coefficient, clip_grad_norm=clip_grad_norm)
    plain, fast = trainer_for(config, lag=None), trainer_for(config)
    revived = 0
    for number in range(20):
        expected, got = plain.step(batch(number)), fast.step(batch(number))
        assert got.parts.keys() == expected.parts.keys()
        revived += len(got.parts)
        for name in ("loss", "grad_norm", "fvu", "l0", "dead"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
        assert got.learning_rate == expected.learning_rate
    assert (revived > 5) == (auxk_coefficient > 0)
    expected_state, state = plain.state_tensors(), fast.state_tensors()
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)
    assert torch.equal(fast.tokens_since_fired, plain.tokens_since_fired)


@pytest.mark.parametrize("lag", [0, 2])
def test_batchtopk_equals_its_step_through_autograd(lag: int) -> None:
    config = replace(CONFIG, arch="batchtopk", k=4)
    plain, fast = trainer_for(config, lag=None), trainer_for(config, lag)
    for number in range(12):
        expected, got = plain.step(batch(number)), fast.step(batch(number))
        if lag == 0:
            for name in ("loss", "grad_norm", "fvu", "l0", "dead"):
                torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-5)
    if lag == 0:
        torch.testing.assert_close(fast.sae.threshold, plain.sae.threshold, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(fast.sae.W_dec, plain.sae.W_dec, rtol=1e-2, atol=1e-4)
    assert float(fast.sae.threshold) > 0


JUMPING = replace(CONFIG, arch="jumprelu", k=8, bandwidth=0.5)


@pytest.mark.parametrize("sparsity_loss", ["step", "quadratic", "tanh"])
@pytest.mark.parametrize("clip_grad_norm", [0.0, 0.02])
def test_jumprelu_equals_its_step_through_autograd(sparsity_loss: str, clip_grad_norm: float) -> None:
    config = replace(JUMPING, sparsity_loss=sparsity_loss, clip_grad_norm=clip_grad_norm)
    plain, fast = trainer_for(config, lag=None), trainer_for(config)
    for number in range(15):
        expected, got = plain.step(batch(number)), fast.step(batch(number))
        assert got.parts.keys() == expected.parts.keys()
        for name in ("loss", "grad_norm", "fvu", "l0", "dead", "coefficient", "over_dense"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert "auxk" in got.parts
    expected_state, state = plain.state_tensors(), fast.state_tensors()
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sparsity_loss", ["step", "quadratic", "tanh"])
@pytest.mark.parametrize("ste_to_input", [False, True])
def test_jumprelu_gradients_where_it_counts(sparsity_loss: str, ste_to_input: bool) -> None:
    """Pre-activations that equal thresholds and window edges exactly, rows on which nothing fires or is near to."""
    settings = {"scale_inputs": False, "b_dec_init": "zeros", "sparsity_loss": sparsity_loss, "clip_grad_norm": 0.0}
    config = replace(JUMPING, **settings, dead_feature_tokens=10**6, sparsity_coefficient=0.3, sparsity_warmup=0.0)
    plain, fast = SAETrainer(config, 32), SAETrainer(config, 32)
    plain.fast, fast.fast = None, FastStep(fast, 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 6, (128, 32), generator=generator) / 4  # sums of quarters: nothing is rounded
    rows[::5] = -8.0
    for trainer in (plain, fast):
        trainer.initialise(rows)
        trainer.sae.cfg = replace(trainer.sae.cfg, ste_to_input=ste_to_input)
        with torch.no_grad():
            trainer.sae.W_enc.copy_(torch.eye(32).repeat(1, 2))
            trainer.sae.threshold.copy_(torch.tensor([0.25, 0.5, 0.75, 1.0]).repeat(16))
    pre = rows.repeat(1, 2)
    assert ((pre == plain.sae.threshold).any(), (pre == plain.sae.threshold - 0.25).any()) == (True, True)
    expected, got = plain.step(rows), fast.step(rows)
    torch.testing.assert_close(got.l0, expected.l0)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, weight in plain._rows.items():
        gradients = [trainer.optimiser.state[trainer._rows[name]]["exp_avg"] for trainer in (fast, plain)]
        assert float(gradients[1].abs().max()) > 0, name
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(fast._rows[name], weight, rtol=1e-5, atol=1e-5)


WRITTEN = torch.relu(ROWS @ torch.randn(32, 24, generator=torch.Generator().manual_seed(5))) + 0.3


def transcoder_for(config: TrainConfig, lag: int | None) -> SAETrainer:
    """Reads rows of width 32 and writes rows of width 24."""
    trainer = SAETrainer(config, Ports((Port("blocks.1.ln2", 32),), (Port("blocks.1.mlp", 24),)))
    assert trainer.fast is not None
    trainer.fast = None if lag is None else FastStep(trainer, lag)
    trainer.initialise(ROWS, WRITTEN)
    with torch.no_grad():
        trainer.sae.b_enc[40:] = -2.5
    return trainer


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("clip_grad_norm", [0.0, 0.02])
def test_a_transcoder_equals_its_step_through_autograd(activation: str, clip_grad_norm: float) -> None:
    settings = {"arch": "transcoder", "activation": activation, "clip_grad_norm": clip_grad_norm}
    config = replace(JUMPING if activation == "jumprelu" else CONFIG, **settings)
    plain, fast, late = (transcoder_for(config, lag) for lag in (None, 0, 2))
    assert plain.scales is not None
    assert plain.scales[0] != plain.scales[1]
    revived, fvus = 0, []
    for number in range(15):
        chosen = torch.randint(len(ROWS), (128,), generator=torch.Generator().manual_seed(number))
        x, y = ROWS[chosen], WRITTEN[chosen]
        expected, got = plain.step(x, target=y), fast.step(x, target=y)
        fvus.append((float(expected.fvu), float(late.step(x, target=y).fvu)))
        assert got.parts.keys() == expected.parts.keys()
        revived += "auxk" in got.parts
        for name in ("loss", "grad_norm", "fvu", "l0", "dead"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-6)
    assert revived > 3
    assert all(last < first for first, last in zip(fvus[0], fvus[-1], strict=True))
    for name, tensor in plain.state_tensors().items():
        torch.testing.assert_close(fast.state_tensors()[name], tensor, rtol=2e-3, atol=2e-5, msg=name)
    with pytest.raises(NonFiniteError, match="hold a NaN"):
        fast.step(x, target=y.index_fill(0, torch.tensor([3]), torch.nan))


def test_a_gpu_leaves_out_nothing_of_a_batchtopk_at_a_small_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's selection, run by plain kernels: some rows of this batch want eight times k."""
    config = replace(CONFIG, arch="transcoder", activation="batchtopk", d_sae=512, auxk_coefficient=0.0)
    ports = Ports((Port("in", 32),), (Port("out", 24),))
    plain, fast = SAETrainer(config, ports), SAETrainer(config, ports)
    plain.fast = None
    for trainer in (plain, fast):
        trainer.initialise(ROWS, WRITTEN)
    monkeypatch.setattr(selection, "uses_triton", lambda _: True)
    for number in range(5):
        chosen = torch.randint(len(ROWS), (128,), generator=torch.Generator().manual_seed(number))
        expected, got = (trainer.step(ROWS[chosen], target=WRITTEN[chosen]) for trainer in (plain, fast))
        for name in ("loss", "grad_norm", "l0"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert [selection.batchtopk_width(k, 1000) for k in (4, 64, 500)] == [64, 256, 1000]


def test_a_batch_on_which_nothing_fires_moves_what_is_dead() -> None:
    plain, fast = trainer_for(JUMPING, lag=None), trainer_for(JUMPING)
    for trainer in (plain, fast):
        with torch.no_grad():
            trainer.sae.threshold.fill_(1e4)
            trainer.tokens_since_fired.fill_(10**6)
    expected, got = plain.step(batch(0)), fast.step(batch(0))
    assert float(got.l0) == float(expected.l0) == 0
    assert "auxk" in got.parts
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(fast.sae.W_dec, plain.sae.W_dec, rtol=1e-4, atol=1e-5)


def test_a_row_has_room_for_what_the_fullest_one_needed() -> None:
    assert next_width(None, 64, 65_536) == 256
    assert next_width(100, 64, 65_536) == 128
    assert next_width(128, 64, 65_536) == 256  # it may have wanted more
    assert next_width(500, 64, 65_536) == 512
    assert next_width(None, 64, 100) == 100
    assert next_width(None, 600, 65_536) == 600


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_the_default_trainer_takes_it(arch: str) -> None:
    config = replace(CONFIG, arch=arch)
    assert SAETrainer(config, 32).fast is not None
    for further in ({"k_anneal": 0.1}, {"resample_steps": 5}, {"frequency_coefficient": 0.1}):
        assert SAETrainer(replace(config, **further), 32).fast is None


@pytest.mark.parametrize("settings", [CONFIG, JUMPING])
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: rows.index_fill(0, torch.tensor([5]), torch.nan),
            r"1 rows .* blocks.1.hook_resid_post: rows 405",
        ),
        (lambda rows: torch.full_like(rows, 1e30), "gradient of step 5"),
    ],
)
def test_nothing_moves_from_a_bad_batch_on(
    settings: TrainConfig, lag: int, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    trainer, alone = (trainer_for(replace(settings, clip_grad_norm=0.0), lag) for _ in range(2))
    for number in range(4):
        trainer.step(batch(number))
        alone.step(batch(number))
    expected = {name: tensor.clone() for name, tensor in alone.state_tensors().items()}

    def go_on() -> None:
        for number in range(4, 8):
            rows = batch(number)
            trainer.step(spoil(rows) if number == 4 else rows, rows=range(100 * number, 100 * number + 128))

    with pytest.raises(NonFiniteError, match=message):
        go_on()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.state_tensors().items())
    assert trainer.counters() == alone.counters()
    trainer.step(batch(5))  # and it goes on from there
    assert trainer.steps_done == 5


def test_a_late_look_is_made_up_for_before_the_state_is_read() -> None:
    trainer = trainer_for(lag=2)
    trainer.step(batch(0))
    trainer.step(torch.full((128, 32), torch.nan))
    for read in (trainer.state_tensors, trainer.counters, trainer.export):
        with pytest.raises(NonFiniteError):
            read()
        trainer.step(torch.full((128, 32), torch.nan))


@pytest.mark.parametrize("config", [CONFIG, JUMPING])
@pytest.mark.parametrize("lag", [0, 2])
def test_a_restored_trainer_goes_on_to_the_same_weights(config: TrainConfig, lag: int) -> None:
    whole, first, second = (trainer_for(config, lag=lag) for _ in range(3))
    for number in range(20):
        whole.step(batch(number))
    for number in range(9):
        first.step(batch(number))
    assert int((first.tokens_since_fired >= 400).sum()) > 5
    second.restore({name: tensor.clone() for name, tensor in first.state_tensors().items()}, first.counters())
    for number in range(9, 20):
        second.step(batch(number))
    assert all(torch.equal(tensor, second.state_tensors()[name]) for name, tensor in whole.state_tensors().items())
    assert whole.counters() == second.counters()


def test_late_counts_of_dead_features_size_auxk() -> None:
    trainer = trainer_for(lag=2)
    parts = [bool(trainer.step(batch(number)).parts) for number in range(12)]
    now = trainer_for(lag=0)
    at_once = [bool(now.step(batch(number)).parts) for number in range(12)]
    assert parts.index(True) == at_once.index(True) + 2


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_on_a_gpu_a_transcoder_follows_autograd(activation: str) -> None:
    """Strictly at first; then what rounding chose differently goes its own way."""
    settings = {"arch": "transcoder", "activation": activation, "device": "cuda", "d_sae": 512}
    config = replace(CONFIG, **settings, clip_grad_norm=1.0, auxk_coefficient=0.0)
    ports = Ports((Port("in", 32),), (Port("out", 24),))
    plain, fast = SAETrainer(config, ports), SAETrainer(config, ports)
    assert fast.fast is not None
    plain.fast = None
    for trainer in (plain, fast):
        trainer.initialise(ROWS, WRITTEN)
    for number in range(20):
        chosen = torch.randint(len(ROWS), (128,), generator=torch.Generator().manual_seed(number))
        expected, got = (trainer.step(ROWS[chosen], target=WRITTEN[chosen]) for trainer in (plain, fast))
        for name in ("loss", "fvu", "l0", "grad_norm"):
            torch.testing.assert_close(
                getattr(got, name), getattr(expected, name), rtol=0.1 if number else 0.02, atol=1e-3
            )


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["topk", "jumprelu"])
def test_on_a_gpu_it_follows_autograd(arch: str) -> None:
    config = replace(CONFIG, arch=arch, device="cuda", d_sae=512, clip_grad_norm=1.0, auxk_coefficient=0.0)
    plain, fast = SAETrainer(config, 32), SAETrainer(config, 32)
    assert fast.fast is not None
    plain.fast = None
    for trainer in (plain, fast):
        trainer.initialise(ROWS)
    for number in range(20):
        expected, got = plain.step(batch(number)), fast.step(batch(number))
        for name in ("loss", "fvu", "l0", "grad_norm"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0.05, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_on_a_gpu_a_step_waits_for_nothing(arch: str) -> None:
    trainer = SAETrainer(replace(CONFIG, arch=arch, device="cuda", d_sae=512), 32)
    batches = [batch(number).cuda() for number in range(15)]
    for rows in batches[:12]:
        report = trainer.step(rows)
    assert "auxk" in report.parts
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in batches[12:]:
            trainer.step(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_on_a_gpu_the_same_batches_give_the_same_bits(arch: str) -> None:
    config = replace(CONFIG, arch=arch, device="cuda", d_sae=512)
    prints = []
    for _ in range(2):
        trainer = SAETrainer(config, 32)
        for number in range(12):
            trainer.step(batch(number))
        prints.append(trainer.export().fingerprint)
    assert prints[0] == prints[1]
