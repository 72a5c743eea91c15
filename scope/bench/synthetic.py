"""Rows and weights like those of a trained dictionary, so that a training step meets the densities it meets in use.

Gaussian noise has none of what makes a step hard: no feature that fires on half of the rows, none that fires once in a
million, no dead ones.

1. Densities of the live features fall from 0.5 to 1e-6, as p(u) = 0.5 exp(-a u^b) over their ranks u from 0 to 1,
   with b such that they add up to `FIRING_SHARE` x k. A tenth of the features is dead.
2. A row is a sum of random unit directions: each feature takes part with its density and a lognormal strength.
3. The encoder reads each live direction, less a bias that grows with the feature's rareness, as a trained one does;
   what other directions add by chance then rarely makes a rare feature fire. A dead feature reads its direction
   faintly: above zero, as AuxK needs it, and below what fires.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["DictionaryLike", "densities", "dictionary_like"]

DENSEST, RAREST = 0.5, 1e-6
FIRING_SHARE = 1.25
"""True features on a row, in multiples of k, so that the k largest are chosen among features that are there."""
DEAD_SHARE = 0.1
DEAD_READS = 0.02
STRENGTH_SPREAD = 0.3
ROWS_AT_ONCE = 512


class DictionaryLike(NamedTuple):
    """Batches of raw rows and the weights of a dictionary that fits them."""

    batches: list[Float[Tensor, "batch d_in"]]
    W_dec: Float[Tensor, "d_sae d_in"]
    """Unit rows."""
    W_enc: Float[Tensor, "d_sae d_in"]
    """By feature, as the encoder reads them."""
    b_enc: Float[Tensor, " d_sae"]
    """For raw rows."""
    n_dead: int
    """The last so many features are dead."""


def densities(d_sae: int, k: int) -> Float[Tensor, " d_sae"]:
    """Share of rows that each feature takes part in, densest first; dead ones last, 0."""
    n_live = d_sae - int(DEAD_SHARE * d_sae)
    u = torch.linspace(0, 1, n_live, dtype=torch.float64)
    a = math.log(DENSEST / RAREST)
    low, high = 1e-3, 1e3
    for _ in range(100):
        b = math.sqrt(low * high)
        total = float((DENSEST * (-a * u**b).exp()).sum())
        low, high = (b, high) if total < FIRING_SHARE * k else (low, b)
    live = DENSEST * (-a * u**b).exp()
    return torch.cat([live, torch.zeros(d_sae - n_live, dtype=torch.float64)]).float()


def dictionary_like(
    d_in: int,
    d_sae: int,
    k: int,
    batch_size: int,
    n_batches: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DictionaryLike:
    """Make batches and weights; `dtype` is that of the batches."""
    generator = torch.Generator(device).manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator, device=device)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    p = densities(d_sae, k).to(device)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    directions = W_dec.to(compute)

    def rows(n: int) -> Tensor:
        there = torch.rand(n, d_sae, generator=generator, device=device) < p
        strengths = torch.randn(n, d_sae, generator=generator, device=device).mul_(STRENGTH_SPREAD).exp_()
        return (torch.where(there, strengths, 0.0).to(compute) @ directions).to(dtype)

    batches = [
        torch.cat([rows(min(ROWS_AT_ONCE, batch_size - at)) for at in range(0, batch_size, ROWS_AT_ONCE)])
        for _ in range(n_batches)
    ]
    # What the other directions add up to along one of them, by chance.
    crosstalk = float(batches[0].float().norm(dim=-1).mean()) / math.sqrt(d_in)
    rareness = torch.special.ndtri((1 - p.double().clamp(RAREST, DENSEST)))
    n_dead = int((p == 0).sum())
    reads = torch.ones(d_sae, 1, device=device)
    reads[d_sae - n_dead :] = DEAD_READS
    b_enc = torch.where(p > 0, -crosstalk * rareness, 0.0).float()
    return DictionaryLike(batches, W_dec, W_dec * reads, b_enc, n_dead)
