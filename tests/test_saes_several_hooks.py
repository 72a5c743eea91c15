"""Transcoders, crosscoders and cross-layer transcoders: equations, gradients, recovery, files, parity with sae_lens."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers_saes import CONTEXT, shaken, slopes
from helpers_training import mean_max_cosine, one_thread  # noqa: F401  # a fixture
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, NonFiniteError, UnknownNameError
from scope.saes import formats, registry
from scope.saes.base import SAE, Port, Ports, SAEMetadata
from scope.saes.choice import ACTIVATIONS
from scope.training.config import TrainConfig
from scope.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ("transcoder", "skip_transcoder", "crosscoder", "clt")
PORTS = {
    "transcoder": Ports((Port("in", 12),), (Port("out", 9),)),
    "skip_transcoder": Ports((Port("in", 12),), (Port("out", 9),)),
    "crosscoder": Ports((Port("a", 12), Port("b", 7)), ()),
    "clt": Ports((Port("in.0", 6), Port("in.1", 6), Port("in.2", 6)), (Port("o.0", 5), Port("o.1", 5), Port("o.2", 5))),
}
METADATA = {
    "transcoder": SAEMetadata(hook_name="in", hook_name_out="out"),
    "skip_transcoder": SAEMetadata(hook_name="in", hook_name_out="out"),
    "crosscoder": SAEMetadata(hook_names=("a", "b")),
    "clt": SAEMetadata(hook_names=("in.0", "in.1", "in.2"), hook_names_out=("o.0", "o.1", "o.2")),
}
CASES = [(architecture, activation) for architecture in ARCHITECTURES for activation in ACTIVATIONS]


def make(architecture: str, activation: str, d_sae: int = 42, k: int = 5, **options: Any) -> Any:
    config = registry.config_of(architecture)
    shape = {**config.shape_of(PORTS[architecture]), "metadata": METADATA[architecture], **options}
    cfg = config.for_training(d_sae=d_sae, k=k, activation=activation, **shape)
    sae: Any = shaken(registry.get(architecture)(cfg, generator=torch.Generator().manual_seed(0)))
    if architecture == "clt":
        with torch.no_grad():
            sae.W_dec.mul_(mask_of(sae))
    return sae


def mask_of(sae: Any) -> Tensor:
    """1 where a feature of a cross-layer transcoder may write, by brute force."""
    n = sae.cfg.n_layers
    reads = torch.arange(sae.d_sae)[:, None] * n // sae.d_sae
    writes = torch.arange(sae.d_out)[None] * n // sae.d_out
    return (writes >= reads).to(sae.dtype)


def pre_activations(sae: Any, x: Tensor) -> Tensor:
    if not hasattr(sae.cfg, "n_layers"):
        return x @ sae.W_enc + sae.b_enc
    n, per = sae.cfg.n_layers, sae.d_sae // sae.cfg.n_layers
    parts = x.chunk(n, dim=-1)
    return torch.cat([parts[i] @ sae.W_enc[:, i * per : (i + 1) * per] for i in range(n)], dim=-1) + sae.b_enc


def inputs(sae: Any, n: int = 30, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, sae.d_in, generator=generator, dtype=dtype)
    return x, torch.randn(n, sae.d_out, generator=generator, dtype=dtype) if sae.cfg.ports.outputs else None


# Equations and gradients


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "activation"), CASES)
def test_features_and_outputs_follow_the_equations(architecture: str, activation: str) -> None:
    sae = make(architecture, activation)
    x, _ = inputs(sae)
    pre = pre_activations(sae, x)
    floor: Any = {"relu": 0, "topk": pre.topk(5).values[:, -1:]}.get(activation, getattr(sae, "threshold", None))
    f = torch.where((pre >= floor) & (pre > 0), pre, 0)
    y = f @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if architecture == "skip_transcoder" else 0)
    torch.testing.assert_close(sae.encode(x), f)
    torch.testing.assert_close(sae(x), y)
    torch.testing.assert_close(sae.reconstruct(x, sae.encode_sparse(x)), y)
    inference = sae.for_inference()
    torch.testing.assert_close(inference(x), y)
    with pytest.raises(MismatchError, match=f"{sae.d_in}"):
        sae.encode(x[:, 1:])


@pytest.mark.parametrize(("architecture", "activation"), CASES)
def test_gradients_equal_finite_differences(architecture: str, activation: str) -> None:
    sae = make(architecture, activation, dtype="float64")
    x, target = inputs(sae, 20, torch.float64)
    mask = mask_of(sae) if architecture == "clt" else 1
    for name, parameter in sae.named_parameters():
        if name == "threshold":
            continue
        if name == "W_dec" and architecture == "clt":  # along the entries that are weights at all
            gradient = torch.autograd.grad(sae.training_loss(x, CONTEXT, target).total, parameter)[0]
            assert torch.equal(gradient * mask, gradient)
            with torch.no_grad():
                parameter.mul_(mask)
            continue
        for ours, numerical in slopes(lambda: sae.training_loss(x, CONTEXT, target).total, parameter):
            assert ours == pytest.approx(numerical, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_cross_layer_decoder_has_the_gradient_of_its_allowed_entries(activation: str) -> None:
    sae = make("clt", activation, dtype="float64")
    x, target = inputs(sae, 20, torch.float64)
    assert target is not None
    gradient = torch.autograd.grad(sae.training_loss(x, CONTEXT, target).total, sae.W_dec)[0]
    W = sae.W_dec.detach().clone().requires_grad_()
    f = sae.activation.train(sae, x, CONTEXT)
    loss = (f.decode(W * mask_of(sae)) + sae.b_dec - target).square().sum() / 20
    if activation == "relu":
        norms = sum(part.norm(dim=-1) for part in (W * mask_of(sae)).chunk(3, dim=-1))
        loss = loss + 0.3 * (f.values * f.of(norms)).sum() / 20
    expected = torch.nan_to_num(torch.autograd.grad(loss, W)[0])  # a norm of nothing has no slope
    torch.testing.assert_close(gradient, expected)


def test_the_relu_crosscoders_penalty_is_the_papers() -> None:
    sae = make("crosscoder", "relu")
    x, _ = inputs(sae)
    norms = sae.decoder_norms_by_hook()
    assert norms.shape == (42, 2)
    expected = 0.3 * (sae.encode(x) * norms.sum(-1)).sum(-1).mean()
    torch.testing.assert_close(sae.training_loss(x, CONTEXT).parts["sparsity"], expected.detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dead_features_are_revived_by_what_they_may_read_and_write(architecture: str) -> None:
    sae = make(architecture, "topk", dtype="float64")
    x, target = inputs(sae, 20, torch.float64)
    dead = torch.zeros(42, dtype=torch.bool)
    dead[[3, 11, 20, 40]] = True
    loss = sae.training_loss(x, CONTEXT._replace(dead=dead, auxk_coefficient=0.5, k_aux=2), target)
    y = x if target is None else target
    residual = (y - sae(x)).detach()
    pre = torch.where(dead, pre_activations(sae, x).relu(), 0)
    pre = torch.where(pre >= pre.topk(2).values[:, -1:], pre, 0)
    expected = 0.5 * (residual - pre @ sae.W_dec).square().sum(-1).mean()
    torch.testing.assert_close(loss.parts["auxk"], expected.detach())


# Recovery


class Known(NamedTuple):
    """Rows made of known features: what is read, what is to be written, and the features' output directions."""

    x: Tensor
    y: Tensor
    directions: Tensor
    read: Tensor


def known(architecture: str, n: int = 12_000, n_features: int = 48, d: int = 24, active: int = 3) -> Known:
    generator = torch.Generator().manual_seed(0)

    def random_directions() -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n_features, d, generator=generator), dim=-1)

    ids = torch.rand(n, n_features, generator=generator).topk(active, dim=-1).indices
    f = torch.zeros(n, n_features).scatter_(1, ids, 0.5 + torch.rand(n, active, generator=generator))
    read, write, later = random_directions(), random_directions(), random_directions()
    if architecture == "crosscoder":
        x = torch.cat([20 * f @ read + 3, 5 * f @ write - 1], dim=-1)
        return Known(x, x, torch.cat([read, write], dim=-1), read)
    if architecture == "clt":  # the first half is read in the first layer and written in both
        early = torch.arange(n_features) < n_features // 2
        x = torch.cat([20 * (f * early) @ read + 3, 10 * (f * ~early) @ read], dim=-1)
        y = torch.cat([5 * (f * early) @ write, 4 * f @ later + 1], dim=-1)
        return Known(x, y, torch.cat([5 * write * early[:, None], 4 * later], dim=-1), read)
    return Known(20 * f @ read + 3, 5 * f @ write - 1, write, read)


def trained_on(data: Known, architecture: str, config: TrainConfig) -> SAETrainer:
    d, several = 24, architecture in ("crosscoder", "clt")
    reads = tuple(Port(f"in.{i}", d) for i in range(2 if several else 1))
    writes = () if architecture == "crosscoder" else tuple(Port(f"out.{i}", d) for i in range(2 if several else 1))
    trainer = SAETrainer(config, Ports(reads, writes))
    generator = torch.Generator().manual_seed(1)
    trainer.initialise(data.x[:4096], data.y[:4096])
    for _ in range(config.steps):
        rows = torch.randint(len(data.x), (config.batch_size,), generator=generator)
        trainer.step(data.x[rows], target=data.y[rows])
    return trainer


CONFIG = TrainConfig(arch="transcoder", d_sae=64, k=3, tokens=240 * 256, batch_size=256, lr=1e-2)


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("transcoder", "topk"),
        ("transcoder", "batchtopk"),
        ("transcoder", "jumprelu"),
        ("skip_transcoder", "batchtopk"),
        ("crosscoder", "batchtopk"),
        ("crosscoder", "jumprelu"),
        ("clt", "batchtopk"),
    ],
)
def test_known_features_are_recovered(architecture: str, activation: str) -> None:
    data = known(architecture)
    trainer = trained_on(data, architecture, replace(CONFIG, arch=architecture, activation=activation))
    sae: Any = trainer.export()
    with torch.no_grad():
        y = sae(data.x[:3000])
        target = data.y[:3000]
        fvu = float((y - target).square().sum() / (target - target.mean(0)).square().sum())
        l0 = float((sae.encode(data.x[:3000]) > 0).sum(-1).float().mean())
    directions = torch.nn.functional.normalize(data.directions, dim=-1)
    if architecture == "crosscoder":  # hooks are weighed alike in training, whatever their scale
        directions = torch.cat([20 * data.directions[:, :24], 5 * data.directions[:, 24:]], dim=-1)
        directions = torch.nn.functional.normalize(directions, dim=-1)
    if architecture == "skip_transcoder":  # what a feature adds to the output, by its decoder row or past it
        with torch.no_grad():
            alone = sae(20 * data.read + 3) - sae(torch.full((1, 24), 3.0))
        assert float(torch.cosine_similarity(alone, directions, dim=-1).mean()) >= 0.9
        assert float(sae.W_skip.norm()) > 0
    else:
        assert mean_max_cosine(sae.W_dec, directions) >= 0.9
    assert l0 == pytest.approx(3, rel=0.15)
    assert fvu < 0.25


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_exported_dictionary_takes_raw_rows(architecture: str, tmp_path: Path) -> None:
    data = known(architecture, n=2000)
    config = replace(CONFIG, arch=architecture, activation="relu", tokens=20 * 256)
    trainer = trained_on(data, architecture, config)
    assert trainer.scales is not None
    assert len(set(trainer.scales)) == len(trainer.scales) == {"crosscoder": 2, "clt": 4}.get(architecture, 2)
    sae = trainer.export()
    n = len(trainer.ports.inputs)
    scale_in = torch.tensor(trainer.scales[:n]).repeat_interleave(24)
    scale_out = torch.tensor(trainer.scales[n:] or trainer.scales).repeat_interleave(24)
    expected = trainer.sae(data.x[:100] * scale_in) / scale_out
    torch.testing.assert_close(sae(data.x[:100]), expected, rtol=1e-3, atol=1e-3)
    loaded = formats.load(formats.save(sae, tmp_path / "one"))
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded(data.x[:100]), sae(data.x[:100]))


# Files


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "activation"), CASES)
def test_saving_and_loading_gives_the_same_dictionary(architecture: str, activation: str, tmp_path: Path) -> None:
    sae = make(architecture, activation).for_inference()
    loaded = formats.load(formats.save(sae, tmp_path / "one"))
    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    assert loaded.fingerprint == sae.fingerprint
    x, _ = inputs(sae)
    assert torch.equal(loaded(x), sae(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
def test_sae_lens_loads_our_transcoders_and_we_load_theirs(activation: str, skip: bool, tmp_path: Path) -> None:
    import sae_lens

    sae = make("skip_transcoder" if skip else "transcoder", activation).for_inference()
    theirs = sae_lens.SAE.load_from_disk(str(formats.save(sae, tmp_path / "one")))
    x, _ = inputs(sae)
    for ours, their in ((sae.encode(x), theirs.encode(x)), (sae(x), theirs(x))):
        assert float(((ours - their).norm(dim=-1) / x.norm(dim=-1)).max()) <= 1e-5
    theirs.save_model(tmp_path / "theirs")
    again = formats.load(tmp_path / "theirs")
    assert type(again) is type(sae)
    torch.testing.assert_close(again(x), sae(x))


@pytest.mark.filterwarnings("ignore")
def test_sae_lens_refuses_what_it_would_misread(tmp_path: Path) -> None:
    import sae_lens

    for case in (("transcoder", "topk"), ("crosscoder", "relu"), ("clt", "jumprelu")):
        path = formats.save(make(*case), tmp_path / case[0])
        with pytest.raises(KeyError, match="|".join(("topk_transcoder", "crosscoder", "clt"))):
            sae_lens.SAE.load_from_disk(str(path))


# What is refused


@pytest.mark.parametrize(
    ("architecture", "n_in", "n_out", "message"),
    [
        ("topk", 2, 0, "one hook"),
        ("topk", 1, 1, "transcoder"),
        ("transcoder", 1, 0, "hook_out"),
        ("skip_transcoder", 2, 1, "reads one hook"),
        ("crosscoder", 1, 0, "several hooks"),
        ("crosscoder", 2, 1, "no hook_out"),
        ("clt", 2, 1, "order of the layers"),
        ("clt", 1, 1, "two or more layers"),
    ],
)
def test_hooks_that_an_architecture_does_not_take_are_refused(
    architecture: str, n_in: int, n_out: int, message: str
) -> None:
    ports = Ports(tuple(Port(None, 8) for _ in range(n_in)), tuple(Port(None, 8) for _ in range(n_out)))
    with pytest.raises(InvalidInputError, match=message):
        SAETrainer(replace(CONFIG, arch=architecture), ports)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="jumprelu"):
        make("transcoder", "jumprellu")
    with pytest.raises(InvalidInputError, match="b_dec is the output's"):
        make("transcoder", "topk", apply_b_dec_to_input=True)
    with pytest.raises(InvalidInputError, match="needs k"):
        replace(make("crosscoder", "topk").cfg, k=None)
    with pytest.raises(InvalidInputError, match="multiple of n_layers"):
        make("clt", "topk", d_sae=40)
    with pytest.raises(InvalidInputError, match="one width"):
        SAETrainer(replace(CONFIG, arch="clt"), Ports((Port(None, 8), Port(None, 9)), (Port(None, 8), Port(None, 8))))


def test_targets_are_checked_before_the_weights_move() -> None:
    trainer = SAETrainer(CONFIG, PORTS["transcoder"])
    x = torch.randn(256, 12)
    before = trainer.export().fingerprint
    with pytest.raises(MismatchError, match="width 9"):
        trainer.step(x)
    with pytest.raises(MismatchError, match="width 9"):
        trainer.step(x, target=torch.randn(256, 8))
    with pytest.raises(NonFiniteError):
        trainer.step(x, target=torch.full((256, 9), torch.nan))
    assert trainer.export().fingerprint == before
    assert isinstance(trainer.sae, SAE)
