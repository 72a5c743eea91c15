"""The metrics against brute force, from their definitions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers_training import HOOK, MemorySource, one_thread, synthetic, with_flags  # noqa: F401  # a fixture

from activations.source import RowFlag
from scope.errors import InvalidInputError, MismatchError, UnknownNameError
from scope.models.edits import EditContext
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE
from scope.training.metrics import bootstrap, delta_ce, mean_activation, reconstruction_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
METADATA = SAEMetadata(hook_name=HOOK)


@pytest.fixture
def sae() -> TopKSAE:
    config = TopKConfig(d_in=32, d_sae=64, k=4, metadata=METADATA)
    sae = TopKSAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.fill_(3.0)
        sae.b_enc[:10] = 50
        sae.b_enc[60:] = -1e6
    return sae


def test_reconstruction_metrics_equal_brute_force(sae: TopKSAE) -> None:
    rows = synthetic(4000).rows
    rows[::200] *= 50
    flags = with_flags(4000, 2, RowFlag.HELD_OUT) | with_flags(4000, 6, RowFlag.BOS)
    documents = np.arange(4000) // 100
    found = reconstruction_metrics(sae, MemorySource(rows, flags), documents=documents, batch_size=333)

    used = np.flatnonzero((flags & RowFlag.HELD_OUT > 0) & (flags & RowFlag.BOS == 0))
    x = rows[used].double().numpy()
    with torch.no_grad():
        f = sae.encode(rows[used]).double().numpy()
        x_hat = sae(rows[used]).double().numpy()
    norms = np.linalg.norm(x, axis=1)
    within = norms <= 10 * np.sort(norms)[(len(norms) - 1) // 2]
    assert (~within).sum() > 0

    def fvu(mask: np.ndarray) -> float:
        return float(((x - x_hat)[mask] ** 2).sum() / ((x[mask] - x[mask].mean(0)) ** 2).sum())

    assert found.fvu == pytest.approx(fvu(within), rel=1e-5)
    assert found.fvu_all == pytest.approx(fvu(np.ones_like(within)), rel=1e-5)
    assert found.fvu != pytest.approx(found.fvu_all, rel=1e-2)
    assert (found.n_rows, found.n_within_norm) == (len(used), within.sum())
    assert found.l0 == pytest.approx((f > 0).sum(1).mean())
    np.testing.assert_allclose(found.density, (f > 0).mean(0))
    assert found.dead_share == ((f > 0).sum(0) == 0).mean() > 0
    assert found.over_dense_share == ((f > 0).mean(0) > 0.1).mean() > 0
    cosine = (x * x_hat).sum(1) / norms / np.linalg.norm(x_hat, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-5)
    assert found.fvu_interval is not None
    assert found.fvu_interval[0] < found.fvu < found.fvu_interval[1]
    assert "density" not in found.to_dict()


def test_a_sample_of_rows_gives_nearly_the_same(sae: TopKSAE) -> None:
    source = MemorySource(synthetic(4000).rows)
    whole = reconstruction_metrics(sae, source, held_out_only=False)
    sample = reconstruction_metrics(sae, source, held_out_only=False, max_rows=1000)
    assert sample.n_rows == 1000
    assert sample.fvu == pytest.approx(whole.fvu, rel=0.1)
    assert sample.fvu_interval is None


def test_what_cannot_be_measured_is_refused(sae: TopKSAE) -> None:
    source = MemorySource(synthetic(100).rows)
    with pytest.raises(InvalidInputError):
        reconstruction_metrics(sae, source)
    with pytest.raises(UnknownNameError, match=HOOK):
        reconstruction_metrics(sae, source, "blocks.9.hook_resid_post")
    with pytest.raises(MismatchError, match="width of 1"):
        reconstruction_metrics(sae, MemorySource(torch.ones(100, 1)))


def test_the_mean_is_that_of_the_training_rows() -> None:
    rows = synthetic(2000).rows
    flags = with_flags(2000, 3, RowFlag.HELD_OUT)
    rows[1] *= 1000
    used = np.setdiff1d(np.flatnonzero(flags == 0), [1])
    torch.testing.assert_close(mean_activation(MemorySource(rows, flags), HOOK), rows[used].mean(0))


def test_the_bootstrap_resamples_documents() -> None:
    generator = np.random.default_rng(0)
    per_document = generator.normal(5, 1, size=400)
    tokens_each = 50
    sums = np.stack([tokens_each * per_document, np.full(400, tokens_each)], axis=1)
    low, high = bootstrap(lambda total: total[:, 0] / total[:, 1], sums)
    # Tokens of a document are copies: the standard error is that of 400 values, not of 20,000.
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert low < 5 < high


class ToyModel:
    """Activations are rows of a table; a token's loss is the squared distance of its activation from what it was."""

    bos_token_id = 2
    special_token_ids = frozenset({2})

    def __init__(self) -> None:
        self.table = synthetic(50).rows

    def cross_entropy(self, windows: Sequence[np.ndarray], edits: Mapping[str, Any] | None = None) -> list[np.ndarray]:
        losses = []
        for window in windows:
            tokens = torch.from_numpy(window)[None].long()
            value = self.table[tokens].clone()
            for name, edit in (edits or {}).items():
                value = edit(value, EditContext(name, tokens, tokens == self.bos_token_id))
            losses.append(1 + (value - self.table[tokens]).square().sum(-1)[0, :-1].detach().numpy())
        return losses


def test_delta_ce_follows_its_definition_and_leaves_bos_alone(sae: TopKSAE) -> None:
    model = ToyModel()
    generator = np.random.default_rng(0)
    windows = [np.concatenate([[2], generator.integers(3, 50, size=n)]) for n in (9, 5, 7, 7, 12)]
    mean = model.table.mean(0)
    found = delta_ce(model, sae, windows, mean, documents=[0, 0, 1, 2, 3])

    predicting = torch.cat([torch.from_numpy(window[:-1]).long() for window in windows])
    x = model.table[predicting]
    changed = (predicting != 2)[:, None]
    with torch.no_grad():
        with_sae = 1 + float((torch.where(changed, sae(x), x) - x).square().sum(-1).mean())
    with_mean = 1 + float((torch.where(changed, mean, x) - x).square().sum(-1).mean())
    assert found.ce == pytest.approx(1)
    assert found.ce_sae == pytest.approx(with_sae, rel=1e-5)
    assert found.ce_mean == pytest.approx(with_mean, rel=1e-5)
    assert found.delta_ce == pytest.approx(with_sae - 1, rel=1e-5)
    assert found.ce_recovered == pytest.approx((with_mean - with_sae) / (with_mean - 1), rel=1e-5)
    assert found.covered_share == pytest.approx(40 / 45)
    assert found.n_tokens == 40
    assert found.delta_ce_interval is not None
    assert found.delta_ce_interval[0] <= found.delta_ce <= found.delta_ce_interval[1]
    assert delta_ce(model, sae, windows, mean).delta_ce_interval is None


def test_special_tokens_take_no_part_in_any_figure(sae: TopKSAE) -> None:
    """As they take none in training: rows of theirs are not measured, and pass through a splice."""
    model = ToyModel()
    model.special_token_ids = frozenset({2, 7, 11})
    windows = [np.array([2, 5, 7, 9, 30]), np.array([2, 7, 11, 40, 41, 6])]
    mean = model.table.mean(0)
    found = delta_ce(model, sae, windows, mean)
    predicting = torch.cat([torch.from_numpy(window[:-1]).long() for window in windows])
    x = model.table[predicting]
    changed = ~torch.isin(predicting, torch.tensor([2, 7, 11]))[:, None]
    with torch.no_grad():
        with_sae = 1 + float((torch.where(changed, sae(x), x) - x).square().sum(-1).mean())
    with_mean = 1 + float((torch.where(changed, mean, x) - x).square().sum(-1).mean())
    assert (found.ce_sae, found.ce_mean) == (pytest.approx(with_sae, rel=1e-5), pytest.approx(with_mean, rel=1e-5))
    assert found.covered_share == pytest.approx(6 / 11)

    rows = synthetic(1000).rows
    flags = with_flags(1000, 1, RowFlag.HELD_OUT) | with_flags(1000, 5, RowFlag.SPECIAL)
    ordinary = reconstruction_metrics(sae, MemorySource(rows[flags == RowFlag.HELD_OUT]), held_out_only=False)
    rows[::5] = 1e3 * torch.rand(200, 32)
    marked = reconstruction_metrics(sae, MemorySource(rows, flags))
    assert marked.n_rows == ordinary.n_rows == 800
    for name in ("fvu", "fvu_all", "l0"):
        assert getattr(marked, name) == pytest.approx(getattr(ordinary, name), rel=1e-6)


def test_delta_ce_without_windows_or_hook_is_refused(sae: TopKSAE) -> None:
    with pytest.raises(InvalidInputError, match="windows"):
        delta_ce(ToyModel(), sae, [], torch.zeros(32))
    nameless = TopKSAE(TopKConfig(d_in=32, d_sae=64, k=4))
    with pytest.raises(InvalidInputError, match="hook"):
        delta_ce(ToyModel(), nameless, [np.array([2, 3])], torch.zeros(32))
