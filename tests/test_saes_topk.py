"""The TopK SAE against its equation and its sparse kernels against their plain forms."""

import numpy as np
import pytest
import torch

from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.kernels import sparse
from scope.kernels.topk import topk, topk_encode, topk_encode_reference, topk_reference
from scope.saes import registry
from scope.saes.base import SAEMetadata, TrainingContext
from scope.saes.topk import TopKConfig, TopKSAE

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 257, 4), (64, 1000, 10), (700, 515, 2)]


def make(d_in: int = 12, d_sae: int = 40, k: int = 5, seed: int = 0, **config: object) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=d_sae, k=k, **config), generator=generator)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_features_and_reconstruction_follow_the_equation(apply_b_dec_to_input: bool) -> None:
    sae = make(apply_b_dec_to_input=apply_b_dec_to_input)
    x = torch.randn(3, 4, 12)
    W_enc, W_dec, b_enc, b_dec = (t.detach().double().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    pre = (x.double().numpy() - (b_dec if apply_b_dec_to_input else 0)) @ W_enc + b_enc
    kth = np.sort(pre, axis=-1)[..., -5:-4]
    expected = np.maximum(np.where(pre >= kth, pre, 0), 0)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(sae(x).detach().numpy(), expected @ W_dec + b_dec, atol=1e-5)


@torch.no_grad()
def test_sparse_and_dense_agree() -> None:
    sae = make(d_sae=900)
    x = torch.randn(2, 30, 12)
    features = sae.encode_sparse(x)
    dense = torch.zeros(2, 30, 900).scatter_add(-1, features.ids, features.values)
    torch.testing.assert_close(dense, sae.encode(x))
    torch.testing.assert_close(sae.decode_sparse(features), sae.decode(dense))
    default = super(TopKSAE, sae).encode_sparse(x)
    torch.testing.assert_close(sae.decode_sparse(default), sae.decode(dense))
    strengths = sae.strengths(features.values, features.ids)
    torch.testing.assert_close(strengths, features.values * sae.W_dec.norm(dim=-1)[features.ids])


@torch.no_grad()
def test_at_most_k_fire_and_never_below_zero() -> None:
    sae = make()
    x = torch.randn(200, 12)
    f = sae.encode(x)
    assert (f >= 0).all()
    assert int((f > 0).sum(-1).max()) <= 5
    sae.b_enc.fill_(-1e6)
    assert sae.encode(x).count_nonzero() == 0
    assert sae.encode_sparse(x).values.count_nonzero() == 0


@pytest.mark.parametrize("width", [1, 11, 13])
def test_a_width_that_does_not_match_is_refused(width: int) -> None:
    sae = make()
    for call in (sae.encode, sae.encode_sparse, sae):
        with pytest.raises(MismatchError, match="width of 12"):
            call(torch.randn(3, width))
    with pytest.raises(MismatchError, match="40"):
        sae.decode(torch.randn(3, 1))


def test_heads_are_flattened_for_hook_z() -> None:
    sae = make(reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z"))
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(sae.encode(x), sae.encode(x.flatten(-2)))
    assert sae(x).shape == x.shape


@pytest.mark.parametrize("k", [0, -1, 41])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(InvalidInputError, match="k is"):
        TopKConfig(d_in=12, d_sae=40, k=k)


def test_the_fingerprint_follows_weights_and_config() -> None:
    one, same, other_k = make(), make(), make(k=6)
    assert one.fingerprint == same.fingerprint != other_k.fingerprint
    with torch.no_grad():
        same.W_enc[3, 3] += 1e-3
    assert one.fingerprint != same.fingerprint


def test_architectures_are_found_by_name() -> None:
    assert registry.get("topk") is TopKSAE
    assert registry.config_of("topk") is TopKConfig
    with pytest.raises(UnknownNameError, match="topk"):
        registry.get("topkk")


@pytest.mark.parametrize(("batch", "n", "k"), [*SHAPES, (3, 4096, 256)])
@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_topk_equals_its_reference(batch: int, n: int, k: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(batch)
    pre = torch.randn(batch, n, generator=generator)
    if kind == "ties":
        pre = pre.round()
    if kind == "negative":
        pre = -pre.abs() - 1
    values, ids = topk(pre, k)
    torch.testing.assert_close(values.sort().values, topk_reference(pre, k).values.sort().values, rtol=0, atol=0)
    torch.testing.assert_close(pre.gather(1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize(("batch", "d_sae", "k"), SHAPES)
def test_sparse_products_equal_their_references(batch: int, d_sae: int, k: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    W = torch.randn(d_sae, 9, generator=generator)
    g = torch.randn(batch, 9, generator=generator)
    values = torch.randn(batch, k, generator=generator)
    ids = torch.randint(d_sae, (batch, k), generator=generator)
    groups = sparse.group_by_feature(ids, d_sae)
    torch.testing.assert_close(sparse.decode(values, ids, W), sparse.decode_reference(values, ids, W))
    torch.testing.assert_close(sparse.gather_dots(g, W, ids), sparse.gather_dots_reference(g, W, ids))
    torch.testing.assert_close(
        sparse.weighted_row_sums(g, values, groups), sparse.weighted_row_sums_reference(g, values, ids, d_sae)
    )


@pytest.mark.parametrize(("batch", "d_sae", "k"), SHAPES)
def test_the_encoder_and_its_gradients_equal_the_reference(batch: int, d_sae: int, k: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((batch, 9), (d_sae, 9), (d_sae,))
    ]
    results = []
    for encode in (topk_encode, topk_encode_reference):
        x, W, b = (leaf.clone().requires_grad_() for leaf in leaves)
        encoded = encode(x, W, b, k)
        dense = torch.zeros(batch, d_sae, dtype=torch.float64).scatter(1, encoded.ids, encoded.values)
        dense.square().sum().backward()
        results.append((dense.detach(), x.grad, W.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n_dead", [0, 3, 30])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_training_loss_and_its_gradients_equal_the_dense_ones(n_dead: int, apply_b_dec_to_input: bool) -> None:
    sae = make(dtype="float64", apply_b_dec_to_input=apply_b_dec_to_input)
    x = torch.randn(50, 12, dtype=torch.float64)
    dead = torch.arange(40) < n_dead if n_dead else None
    context = TrainingContext(dead=dead, auxk_coefficient=0.25, k_aux=8)
    loss = sae.training_loss(x, context)
    loss.total.backward()
    ours = [parameter.grad for parameter in sae.parameters()]
    sae.zero_grad(set_to_none=True)

    centred = x - sae.b_dec if apply_b_dec_to_input else x
    pre = centred @ sae.W_enc + sae.b_enc
    kept = pre >= pre.topk(5).values[:, -1:]
    residual = x - (torch.where(kept, pre.relu(), 0) @ sae.W_dec + sae.b_dec)
    expected = residual.square().sum(-1).mean()
    if dead is not None:
        acts = torch.where(dead, pre.relu(), 0)
        acts = torch.where(acts >= acts.topk(8).values[:, -1:], acts, 0)
        error = (residual.detach() - acts @ sae.W_dec).square().sum(-1).mean()
        expected = expected + 0.25 * min(1, n_dead / 8) * error
    expected.backward()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.squared_error, residual.square().sum(-1).mean().detach())
    for mine, parameter in zip(ours, sae.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_gradients_with_a_bfloat16_encoder_follow_those_in_float32() -> None:
    """Under autocast the encoder's product is bfloat16 and everything after it float32, as on a GPU. k is d_sae, so
    that rounding changes no feature's place."""
    sae = make(k=40)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sae.training_loss(x, TrainingContext(dead=None, auxk_coefficient=0, k_aux=8)).total.backward()
        gradients.append([parameter.grad for parameter in sae.parameters()])
        assert all(gradient.dtype == torch.float32 for gradient in gradients[-1])
        sae.zero_grad(set_to_none=True)
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact - rounded).norm() <= 0.02 * exact.norm()
