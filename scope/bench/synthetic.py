"""Rows and weights like those of a trained dictionary, so that a training step meets the densities it meets in use.

Gaussian noise has none of what makes a step hard: no feature that fires on half of the rows, none that fires once in a
million, no dead ones.

1. Densities of the live features fall from 0.9 to 1e-6, as p(u) = 0.9 exp(-a u^b) over their ranks u from 0 to 1,
   with b such that they add up to `FIRING_SHARE` x k. Six in a hundred features are dead.
2. A row is a sum of random unit directions: each feature takes part with its density and a lognormal strength.
3. The encoder reads each live direction, less a bias that grows with the feature's rareness, as a trained one does;
   what other directions add by chance then rarely makes a rare feature fire. A dead feature reads its direction
   faintly: above zero, as AuxK needs it, and below what fires.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["DictionaryLike", "densities", "dictionary_like", "row_maker"]

DENSEST, RAREST = 0.9, 1e-6
FIRING_SHARE = 2.0
"""True features on a row, in multiples of k, so that the k largest are chosen among features that are there."""
DEAD_SHARE = 0.06
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


def row_maker(
    d_in: int, d_sae: int, k: int, device: torch.device, seed: int = 0
) -> Callable[[int], Float[Tensor, "batch d_in"]]:
    """A function that draws so many rows, float32; the same directions and the same rows for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    directions = _directions(d_in, d_sae, device, generator)
    return lambda n: _rows(n, directions, densities(d_sae, k).to(device), generator)


def dictionary_like(
    d_in: int, d_sae: int, k: int, batch_size: int, n_batches: int, device: torch.device, seed: int = 0
) -> DictionaryLike:
    """Make batches, float32, and weights."""
    generator = torch.Generator(device).manual_seed(seed)
    W_dec = _directions(d_in, d_sae, device, generator)
    p = densities(d_sae, k).to(device)
    batches = [_rows(batch_size, W_dec, p, generator) for _ in range(n_batches)]
    # What the other directions add up to along one of them, by chance.
    crosstalk = float(batches[0].norm(dim=-1).mean()) / math.sqrt(d_in)
    rareness = torch.special.ndtri(1 - p.double().clamp(RAREST, DENSEST))
    n_dead = int((p == 0).sum())
    reads = torch.ones(d_sae, 1, device=device)
    reads[d_sae - n_dead :] = DEAD_READS
    b_enc = torch.where(p > 0, -crosstalk * rareness, 0.0).float()
    return DictionaryLike(batches, W_dec, W_dec * reads, b_enc, n_dead)


def _directions(d_in: int, d_sae: int, device: torch.device, generator: torch.Generator) -> Tensor:
    rows = torch.randn(d_sae, d_in, generator=generator, device=device)
    return rows.div_(rows.norm(dim=-1, keepdim=True))


def _rows(n: int, directions: Tensor, p: Tensor, generator: torch.Generator) -> Tensor:
    compute = directions.to(torch.bfloat16) if directions.is_cuda else directions
    parts = []
    for start in range(0, n, ROWS_AT_ONCE):
        size = (min(ROWS_AT_ONCE, n - start), len(p))
        there = torch.rand(size, generator=generator, device=p.device) < p
        strengths = torch.randn(size, generator=generator, device=p.device).mul_(STRENGTH_SPREAD).exp_()
        parts.append((torch.where(there, strengths, 0.0).to(compute.dtype) @ compute).float())
    return torch.cat(parts)
