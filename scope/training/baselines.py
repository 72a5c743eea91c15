"""What a reader compares an SAE with, each as an SAE itself, so that the same functions measure it on the same rows.

    pca      the leading directions of the training rows, as many as features fire on a row: x_hat = V Vᵀ(x - m) + m.
             Each direction is two features, one for each sign, of which one fires: L0 is the rank.
    random   a TopK dictionary of the same number of features in random directions, with the SAE's L0 as its k. It reads
             and writes the same directions, times the one factor that fits the training rows best.
    mean     the mean of the training rows for every row: what is left without any feature.

An SAE that does not beat PCA of the same rank explains less than as many fixed directions; one that does not beat the
random dictionary has learned nothing about which directions there are.

`training_moments` is what they are made of: mean and covariance of the rows that an SAE is trained on, in one pass and
in memory for one d_in x d_in matrix. Sums are about the first batch's mean, so that they lose no digits.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationSource
from scope.kernels.tensors import as_tensor
from scope.saes.base import SAE, SAEMetadata
from scope.saes.standard import StandardConfig, StandardSAE
from scope.saes.topk import TopKConfig, TopKSAE
from scope.training.data import EXCLUDED, resolve_hook, width_of

__all__ = ["BASELINES", "Moments", "baselines_for", "mean_only", "pca", "random_dictionary", "training_moments"]

BASELINES = ("pca", "random", "mean")
SAMPLE_ROWS = 4096
MEMORY_BYTES = 2**26
BATCH_ROWS = 8192


class Moments(NamedTuple):
    """Of the rows that an SAE is trained on."""

    mean: Float[Tensor, " d_in"]
    """float32."""
    covariance: Float[Tensor, "d_in d_in"]
    """float64."""
    sample: Float[Tensor, "rows d_in"]
    """A few of them, float32."""
    n_rows: int


@torch.no_grad()
def training_moments(
    source: ActivationSource,
    hook: str,
    *,
    max_norm_ratio: float | None = 10.0,
    max_rows: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Moments:
    """Mean and covariance of a hook's training rows: no BOS, special, held-out or outlier rows.

    Args:
        source: a store, or anything else that satisfies `ActivationSource`.
        hook: the hook's name.
        max_norm_ratio: rows with a norm of more than so many times the median are left out; None keeps them.
        max_rows: so many rows, drawn at random; None for all.
        device: where the products are computed.
        seed: of the draw.
    """
    name = resolve_hook(source, hook)
    width = width_of(source, name)[0]
    selection = Selection(exclude_flags=EXCLUDED, max_norm_ratio=max_norm_ratio)
    batches = ShuffledBatches(
        source, [name], BATCH_ROWS, seed, passes=1, tokens=max_rows, select=selection, memory_bytes=MEMORY_BYTES
    )
    total = torch.zeros(width, dtype=torch.float64, device=device)
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    n_rows, shift, sample = 0, None, None
    for _, values in batches:
        x = as_tensor(values[name], source.dtype).to(device).float().flatten(1)
        if shift is None or sample is None:
            shift, sample = x.mean(dim=0), x[:SAMPLE_ROWS].clone()
        x = x - shift
        total += x.sum(dim=0, dtype=torch.float64)
        products += (x.T @ x).double()
        n_rows += len(x)
    assert shift is not None
    assert sample is not None
    off = total / n_rows
    return Moments((shift.double() + off).float(), products / n_rows - torch.outer(off, off), sample, n_rows)


def baselines_for(sae: SAE, moments: Moments, l0: float, seed: int = 0) -> dict[str, SAE]:
    """The baselines of an SAE that reads and writes one hook, by name.

    Args:
        sae: the SAE.
        moments: of its hook.
        l0: features that fire on a row, of the SAE as it was measured; rounded.
        seed: of the random directions.
    """
    k = max(1, round(l0))
    return {
        "pca": pca(sae, moments, min(k, sae.d_in)),
        "random": random_dictionary(sae, moments, min(k, sae.d_sae), seed),
        "mean": mean_only(sae, moments),
    }


@torch.no_grad()
def pca(sae: SAE, moments: Moments, rank: int) -> StandardSAE:
    """Projection on the `rank` leading directions of the training rows, at the hook of an SAE."""
    directions = torch.linalg.eigh(moments.covariance).eigenvectors[:, -rank:].T.float()
    baseline = StandardSAE(StandardConfig(d_sae=2 * rank, **_shared(sae)), initialise=False, device=sae.device)
    both = torch.cat([directions, -directions])
    return _filled(baseline, both, both, moments.mean)


@torch.no_grad()
def random_dictionary(sae: SAE, moments: Moments, k: int, seed: int = 0) -> TopKSAE:
    """As many random directions as an SAE has features, of which k fire on a row."""
    config = TopKConfig(d_sae=sae.d_sae, k=k, **_shared(sae))
    baseline = TopKSAE(config, generator=torch.Generator().manual_seed(seed), device=sae.device)
    _filled(baseline, baseline.W_dec, baseline.W_dec, moments.mean)
    x = (moments.sample - moments.mean).to(sae.device)
    explained = baseline(moments.sample.to(sae.device)) - baseline.b_dec
    baseline.W_enc.mul_((x * explained).sum() / explained.square().sum())
    return baseline


@torch.no_grad()
def mean_only(sae: SAE, moments: Moments) -> StandardSAE:
    """The mean of the training rows, whatever the row: one feature that never fires."""
    baseline = StandardSAE(StandardConfig(d_sae=1, **_shared(sae)), initialise=False, device=sae.device)
    nothing = torch.zeros(1, sae.d_in, device=sae.device)
    return _filled(baseline, nothing, nothing, moments.mean)


def _shared(sae: SAE) -> dict[str, Any]:
    return {
        "d_in": sae.d_in,
        "metadata": SAEMetadata(hook_name=sae.hook_name),
        "reshape_activations": sae.cfg.reshape_activations,
    }


def _filled(baseline: Any, W_enc: Tensor, W_dec: Tensor, centre: Tensor) -> Any:
    baseline.W_enc.copy_(W_enc.T)
    baseline.W_dec.copy_(W_dec)
    baseline.b_enc.zero_()
    baseline.b_dec.copy_(centre)
    return baseline
