"""Intervals and tests by resampling groups of documents, which are what might have been others."""

from math import erfc, sqrt

import numpy as np
from jaxtyping import Float

__all__ = ["RESAMPLES", "middle_95", "paired_z", "two_sided", "weights_of"]

RESAMPLES = 400


def weights_of(n_groups: int, seed: int = 0) -> Float[np.ndarray, "samples groups"]:
    """How often each group is drawn in each resample (Efron & Tibshirani 1993)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), RESAMPLES).astype(np.float64)


def middle_95(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle 95% over the first axis, resamples without a value left out; NaN where none has one."""
    known = np.isfinite(values).any(axis=0)
    filled = np.where(known, values, 0.0)
    low, high = np.nanpercentile(np.where(np.isfinite(filled), filled, np.nan), (2.5, 97.5), axis=0)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def paired_z(
    base: Float[np.ndarray, "groups d_sae"],
    tuned: Float[np.ndarray, "groups d_sae"],
    discordant: Float[np.ndarray, " d_sae"],
    rows: Float[np.ndarray, " groups"],
) -> Float[np.ndarray, " d_sae"]:
    """Standard score of each feature's change of firings on the same rows; 0 where no row's firing changed.

    z = D / sqrt(V) with D the difference of firings. V is the larger of two: the rows on which exactly one of the two
    models fires, which is the variance where rows are independent (McNemar 1947), and G / (G - 1) times the sum over
    the G groups of (D_g - D n_g / n)², where firings come together in documents.
    """
    difference = tuned - base
    total = difference.sum(axis=0)
    n_groups = len(rows)
    spread = difference - np.outer(rows / max(rows.sum(), 1.0), total)
    between = (spread**2).sum(axis=0) * n_groups / max(n_groups - 1, 1)
    variance = np.maximum(discordant, between)
    return np.divide(total, np.sqrt(variance), out=np.zeros_like(total), where=variance > 0)


def two_sided(z: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Probability of a normal score at least so far from 0."""
    return np.array([erfc(abs(float(value)) / sqrt(2)) for value in z])
