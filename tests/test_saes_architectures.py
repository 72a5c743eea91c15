"""Every one-hook architecture: equations, gradients, recovery of known features, files, and parity with sae_lens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_saes import CONTEXT, make, slopes
from helpers_training import mean_max_cosine, one_thread, synthetic  # noqa: F401  # a fixture

from scope.errors import InvalidInputError, UnknownNameError
from scope.kernels import entries
from scope.saes import formats, registry
from scope.saes.active import Dense, Listed
from scope.saes.base import SAE, SAEMetadata
from scope.saes.jumprelu import JumpReLUSAE, jumprelu, step
from scope.training.config import TrainConfig
from scope.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_HOOK = ("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")
DATA = synthetic(20_000)
CONFIG = TrainConfig(d_sae=64, k=4, tokens=300 * 256, batch_size=256, lr=5e-3)


def train_on(rows: torch.Tensor, config: TrainConfig) -> SAETrainer:
    trainer = SAETrainer(config, rows.shape[1], SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    trainer.initialise(rows[:4096])
    generator = torch.Generator().manual_seed(1)
    for _ in range(config.steps):
        trainer.step(rows[torch.randint(len(rows), (config.batch_size,), generator=generator)])
    return trainer


def test_every_architecture_is_found_by_name() -> None:
    assert set(ONE_HOOK) <= set(registry.architectures())
    with pytest.raises(UnknownNameError, match="jumprelu"):
        registry.get("jumprelo")


# Equations


@torch.no_grad()
def test_features_follow_the_equations() -> None:
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(3))
    for name in ONE_HOOK:
        sae: Any = make(name)
        proj = (x - sae.b_dec) @ sae.W_enc
        if name == "gated":
            expected = (proj + sae.b_gate > 0) * (sae.r_mag.exp() * proj + sae.b_mag).relu()
        else:
            pre = proj + sae.b_enc
            floor: Any = {"standard": 0, "topk": pre.topk(5).values[:, -1:]}.get(name, getattr(sae, "threshold", None))
            expected = torch.where((pre >= floor) & (pre > 0), pre, 0)
        torch.testing.assert_close(sae.encode(x), expected)
        torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)
        features = sae.encode_sparse(x)
        torch.testing.assert_close(sae.decode_sparse(features), sae(x))
        torch.testing.assert_close(sae.reconstruct(x, features), sae(x))
        assert sae.fingerprint == make(name).fingerprint
        assert name in sae._repr_html_()


@torch.no_grad()
def test_batchtopk_keeps_the_largest_of_the_batch_and_learns_a_threshold() -> None:
    sae: Any = make("batchtopk")
    sae.threshold.zero_()
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = pre.flatten().topk(250).values
    active = sae.activation.train(sae, x - sae.b_dec, CONTEXT)
    assert int(active.counts().sum()) == 250
    torch.testing.assert_close(active.values.flatten()[active.values.flatten() > 0].sort().values, kept.sort().values)
    torch.testing.assert_close(sae.threshold, kept.min())
    sae.activation.train(sae, 2 * x, CONTEXT)
    assert float(sae.threshold) > float(kept.min())


def test_a_matryoshka_sums_the_losses_of_its_prefixes() -> None:
    sae: Any = make("matryoshka", prefixes=(5, 20))
    assert sae.cfg.prefixes == (5, 20, 40)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    loss = sae.training_loss(x, CONTEXT)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = torch.where(pre >= pre.flatten().topk(250).values[-1], pre, 0)
    errors = [(f[:, :m] @ sae.W_dec[:m] + sae.b_dec - x).square().sum(-1).mean() for m in (5, 20, 40)]
    torch.testing.assert_close(loss.total, sum(errors))
    torch.testing.assert_close(loss.squared_error, errors[-1])


# Gradients


@pytest.mark.parametrize("architecture", ONE_HOOK)
@pytest.mark.parametrize("d_sae", [40, 400])
def test_gradients_equal_finite_differences(architecture: str, d_sae: int) -> None:
    options: dict[str, Any] = {"freeze_decoder_for_gate": False} if architecture == "gated" else {}
    sae = make(architecture, d_sae=d_sae, dtype="float64", **options)
    x = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for parameter_name, parameter in sae.named_parameters():
        if parameter_name == "threshold":  # its gradient is no derivative; see below
            continue
        for ours, numerical in slopes(lambda: sae.training_loss(x, CONTEXT).total, parameter):
            assert ours == pytest.approx(numerical, rel=1e-4, abs=1e-6), parameter_name


def test_the_gate_of_a_gated_sae_leaves_the_decoder_alone() -> None:
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    gradients = []
    for frozen in (True, False):
        sae: Any = make("gated", freeze_decoder_for_gate=frozen)
        loss = sae.training_loss(x, CONTEXT._replace(sparsity_coefficient=0.0))
        gradients.append(torch.autograd.grad(loss.total, [sae.W_dec, sae.b_dec, sae.b_gate]))
        error = (sae(x) - x).square().sum(-1).mean()
        assert float(loss.parts["gate"]) > 0
        if frozen:
            torch.testing.assert_close(gradients[0][0], torch.autograd.grad(error, sae.W_dec)[0])
    assert not torch.allclose(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][2], gradients[1][2])


@pytest.mark.parametrize("ste_to_input", [False, True])
def test_straight_through_estimators_have_their_defining_derivatives(ste_to_input: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(200, 7, dtype=torch.float64, generator=generator).requires_grad_()
    threshold = torch.rand(7, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(200, 7, dtype=torch.float64, generator=generator)
    bandwidth = 0.4
    window = ((pre - threshold).abs() / bandwidth < 0.5).double().detach()
    fires = (pre > threshold).double().detach()
    for function, slope, through in (
        (jumprelu, fires, threshold.detach() / bandwidth),
        (step, 0 * fires, 1 / bandwidth),
    ):
        value = function(pre, threshold.expand_as(pre), bandwidth, ste_to_input)
        torch.testing.assert_close(value, fires * (pre if function is jumprelu else 1))
        grad_pre, grad_threshold = torch.autograd.grad((weights * value).sum(), [pre, threshold], allow_unused=True)
        torch.testing.assert_close(grad_threshold, -(weights * through * window).sum(0))
        expected = weights * (slope + through * window * ste_to_input)
        torch.testing.assert_close(torch.zeros_like(pre) if grad_pre is None else grad_pre, expected)


@pytest.mark.parametrize("sparsity_loss", ["step", "quadratic", "tanh"])
def test_jumprelu_penalties_and_the_thresholds_gradient(sparsity_loss: str) -> None:
    sae: Any = make("jumprelu", dtype="float64", sparsity_loss=sparsity_loss, bandwidth=0.6)
    x = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loss = sae.training_loss(x, CONTEXT)
    f, norms = sae.encode(x), sae.W_dec.norm(dim=-1)
    l0 = (f > 0).double().sum(-1)
    expected = {"step": l0, "quadratic": (l0 / 5 - 1) ** 2, "tanh": torch.tanh(4 * f * norms).sum(-1)}[sparsity_loss]
    torch.testing.assert_close(loss.parts["sparsity"], 0.3 * expected.mean().detach())
    # The chain rule by hand, from the gradient of the loss with respect to features and L0.
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    window = ((pre - sae.threshold).abs() < 0.3).double().detach() / 0.6
    leaf = f.detach().requires_grad_()
    inner = (leaf @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean()
    if sparsity_loss == "tanh":
        inner = inner + 0.3 * torch.tanh(4 * leaf * norms).sum(-1).mean()
    by_feature = torch.autograd.grad(inner, leaf)[0]
    by_l0 = {"step": 0.3 / 20, "quadratic": (0.3 / 20 * 2 * (l0 / 5 - 1) / 5)[:, None], "tanh": 0.0}[sparsity_loss]
    by_threshold = -(window * (by_feature * sae.threshold + by_l0)).sum(0)
    torch.testing.assert_close(torch.autograd.grad(loss.total, sae.threshold)[0], by_threshold.detach())


# The listed layout


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 5), (64, 500, 300), (40, 300, 0)])
@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_the_largest_entries_of_a_batch_are_found(shape: tuple[int, int, int], kind: str) -> None:
    batch, d_sae, n = shape
    pre = torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(batch))
    pre = pre.round() if kind == "ties" else -pre.abs() if kind == "negative" else pre
    index = entries.largest(pre, n)
    positive = pre.flatten()[pre.flatten() > 0].sort(descending=True).values
    torch.testing.assert_close(pre.flatten()[index].sort(descending=True).values, positive[:n], rtol=0, atol=0)
    assert index.tolist() == sorted(set(index.tolist()))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_products_of_listed_entries_equal_their_references(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, b, V = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((30, 9), (70, 9), (70,), (70, 5)))
    mask = torch.rand(30, 70, generator=generator) < share
    mask[3] = False
    places = entries.places_of(mask.flatten().nonzero().flatten(), 30, 70)
    found = []
    for encode, decode in (
        (lambda *a: entries.encode_at(*a, x @ W.T + b), entries.decode_entries),
        (entries.encode_at_reference, entries.decode_entries_reference),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, V)]
        values = encode(*leaves[:3], places)
        out = decode(values.relu(), places, leaves[3])
        found.append([out, values, *torch.autograd.grad(out.square().sum() + values.sum(), leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("architecture", ["standard", "batchtopk", "jumprelu", "matryoshka"])
def test_the_listed_and_the_dense_layout_give_the_same_loss(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    found = []
    for share, layout in ((1.0, Listed), (-1.0, Dense)):
        monkeypatch.setattr("scope.saes.activation.LISTED_SHARE", share)
        sae = make(architecture)
        context = CONTEXT._replace(frequency_weights=torch.linspace(0, 1, 40))
        assert isinstance(sae.activation.train(sae, x, context), layout)
        loss = sae.training_loss(x, context)
        found.append([loss.total, loss.counts, *torch.autograd.grad(loss.total, list(sae.parameters()))])
    for listed, dense in zip(*found, strict=True):
        torch.testing.assert_close(listed, dense, rtol=1e-4, atol=1e-5)


# Training and files


@pytest.fixture(scope="module")
def trained() -> dict[str, SAETrainer]:
    torch.set_num_threads(1)
    return {name: train_on(DATA.rows, replace(CONFIG, arch=name)) for name in ONE_HOOK}


@pytest.mark.parametrize("architecture", ONE_HOOK)
def test_known_features_are_recovered_at_the_target_l0(trained: dict[str, SAETrainer], architecture: str) -> None:
    sae = trained[architecture].export()
    assert mean_max_cosine(sae.W_dec, DATA.directions) >= 0.9
    l0 = float((sae.encode(DATA.rows[:4000]) > 0).sum(-1).float().mean())
    assert l0 == pytest.approx(4, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ONE_HOOK)
def test_export_and_files_keep_what_was_trained(
    trained: dict[str, SAETrainer], architecture: str, tmp_path: Path
) -> None:
    trainer = trained[architecture]
    sae = trainer.export()
    assert trainer.scale is not None
    rows = DATA.rows[:500]
    scaled = trainer.sae.encode(rows * trainer.scale)
    torch.testing.assert_close(sae.encode(rows) * trainer.scale, scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(rows) * trainer.scale, trainer.sae(rows * trainer.scale), rtol=1e-4, atol=1e-4)
    loaded = formats.load(formats.save(sae, tmp_path / "one"))
    assert loaded.cfg == sae.cfg
    assert loaded.fingerprint == sae.fingerprint
    assert torch.equal(loaded(rows), sae(rows))
    if architecture in ("batchtopk", "matryoshka"):
        assert isinstance(loaded, JumpReLUSAE)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ONE_HOOK)
def test_sae_lens_loads_every_architecture(architecture: str, tmp_path: Path) -> None:
    import sae_lens

    sae = make(architecture)
    theirs = sae_lens.SAE.load_from_disk(str(formats.save(sae, tmp_path / "one")))
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(3))
    for ours, their in ((sae.encode(x), theirs.encode(x)), (sae(x), theirs(x))):
        assert float(((ours - their).norm(dim=-1) / x.norm(dim=-1)).max()) <= 1e-5
    theirs.save_model(tmp_path / "theirs")
    torch.testing.assert_close(formats.load(tmp_path / "theirs")(x), sae(x))


THEIRS: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "standard": ("Standard", {"l1_coefficient": 0.7}, {"l1": 0.7}),
    "gated": ("Gated", {"l1_coefficient": 0.7}, {"l1": 0.7}),
    "jumprelu": ("JumpReLU", {"l0_coefficient": 0.7, "jumprelu_bandwidth": 0.5}, {"l0": 0.7}),
    "jumprelu-quadratic": (
        "JumpReLU",
        {"jumprelu_bandwidth": 0.5, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0},
        {"l0": 0.7 / 8},
    ),
    "batchtopk": ("BatchTopK", {"k": 4.0, "rescale_acts_by_decoder_norm": False}, {}),
    "matryoshka": (
        "MatryoshkaBatchTopK",
        {"k": 4.0, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [4, 8, 16, 32, 64]},
        {},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(THEIRS))
def test_one_step_equals_sae_lens(case: str) -> None:
    from sae_lens.saes.sae import TrainStepInput

    name, _, loss = case.partition("-")
    prefix, options, coefficients = THEIRS[case]
    plain: dict[str, Any] = {"warmup": 0.0, "decay": 0.0, "clip_grad_norm": 0.0, "auxk_coefficient": 0.0}
    if coefficients:
        plain |= {"threshold_lr": 1.0, "sparsity_coefficient": 0.7, "l0_controller": False, "sparsity_warmup": 0.0}
    trainer = SAETrainer(replace(CONFIG, arch=name, sparsity_loss=loss or None, **plain), 32)
    trainer.initialise(DATA.rows[:1000])
    if name == "gated":
        trainer.sae.cfg = replace(trainer.sae.cfg, freeze_decoder_for_gate=False)  # type: ignore[call-arg]
    module = __import__(f"sae_lens.saes.{_module_of(prefix)}", fromlist=["x"])
    config = getattr(module, f"{prefix}TrainingSAEConfig")(d_in=32, d_sae=64, decoder_init_norm=None, **options)
    theirs = getattr(module, f"{prefix}TrainingSAE")(config)
    weights = trainer.sae.weights()
    if "topk_threshold" in theirs.state_dict():
        weights["topk_threshold"] = weights.pop("threshold").double()
    theirs.load_state_dict(weights)
    x = DATA.rows[:256] * trainer.scale
    output = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
    )
    optimiser = torch.optim.Adam(theirs.parameters(), lr=5e-3)
    output.loss.backward()
    with torch.no_grad():  # what would only change a decoder row's norm is taken out, and the norm is brought back
        along = (theirs.W_dec.grad * theirs.W_dec).sum(dim=-1, keepdim=True)
        theirs.W_dec.grad -= along * theirs.W_dec
    optimiser.step()
    report = trainer.step(DATA.rows[:256])
    assert float(report.loss) * 32 == pytest.approx(float(output.loss), rel=1e-5)
    expected = dict(theirs.named_parameters())
    expected["W_dec"] = expected["W_dec"] / expected["W_dec"].norm(dim=-1, keepdim=True)
    if "threshold" in expected:
        expected["threshold"] = expected["threshold"].clamp_min(0)
    for parameter_name, parameter in trainer.sae.named_parameters():
        torch.testing.assert_close(parameter, expected[parameter_name], rtol=1e-4, atol=1e-4)


def _module_of(prefix: str) -> str:
    return {"JumpReLU": "jumprelu_sae", "BatchTopK": "batchtopk_sae"}.get(
        prefix, {"MatryoshkaBatchTopK": "matryoshka_batchtopk_sae"}.get(prefix, f"{prefix.lower()}_sae")
    )


# Settings


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("batchtopk", {"k": 41}, "k is 41"),
        ("jumprelu", {"bandwidth": 0.0}, "bandwidth"),
        ("jumprelu", {"sparsity_loss": "quadratik"}, "quadratic"),
        ("jumprelu", {"sparsity_loss": "quadratic", "target_l0": None}, "target_l0"),
        ("matryoshka", {"prefixes": (20, 10)}, "ascending"),
        ("matryoshka", {"prefixes": (41,)}, "ascending"),
    ],
)
def test_settings_that_make_no_sense_are_refused(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(architecture, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandwidth": 0.1}, "bandwidth was given.*topk does not have"),
        ({"arch": "standard", "prefixes": (8,)}, "prefixes"),
        ({"sparsity_coefficient": 1.0}, "k says how many"),
        ({"decoder_norm": "free"}, "growing"),
        ({"arch": "batchtopk", "sparsity_loss": "step"}, "sparsity_loss"),
    ],
)
def test_settings_that_an_architecture_does_not_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        SAETrainer(replace(CONFIG, **changes), 32)


def test_a_bfloat16_product_is_close_to_float32_for_all() -> None:
    """Under autocast the encoder's product is bfloat16 and everything after it float32, as on a GPU."""
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    for name in ONE_HOOK:
        sae: SAE = make(name)
        exact = sae.training_loss(x, CONTEXT)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = sae.training_loss(x, CONTEXT)
        rounded.total.backward()
        assert float(rounded.total) == pytest.approx(float(exact.total), rel=0.05), name
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in sae.parameters())
