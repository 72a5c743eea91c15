"""Many tests at once: which of thousands of features are taken as found, and a test for counts that are small."""

import numpy as np
from jaxtyping import Float, Int

__all__ = ["discoveries", "overlap_by_chance"]


def discoveries(p: Float[np.ndarray, " n"], rate: float = 0.05) -> np.ndarray:
    """Which of many tests are taken as found, bool, so that about `rate` of those found are false (Benjamini and
    Hochberg 1995)."""
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    found = np.zeros(len(p), bool)
    if len(below):
        found[order[: below[-1] + 1]] = True
    return found


def overlap_by_chance(
    both: Int[np.ndarray, " d_sae"], n_a: Int[np.ndarray, " d_sae"], n_b: Int[np.ndarray, " d_sae"], n: int
) -> Float[np.ndarray, " d_sae"]:
    """Probability that of n things n_a and n_b, each drawn without a look at the other, have `both` or more in common:
    the upper tail of the hypergeometric distribution, exact for any counts (Fisher 1935)."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])

    def log_choose(m: np.ndarray, k: np.ndarray) -> np.ndarray:
        ways: np.ndarray = log_factorial[m] - log_factorial[k] - log_factorial[m - k]
        return ways

    all_ways = log_choose(np.full_like(n_b, n), n_b)
    tail = np.zeros(len(both))
    for k in range(n + 1):
        possible = (k >= both) & (k <= np.minimum(n_a, n_b)) & (n_b - k <= n - n_a)
        own_a, own_b = n_a[possible], n_b[possible]
        common = np.full_like(own_a, k)
        ways = log_choose(own_a, common) + log_choose(n - own_a, own_b - k)
        tail[possible] += np.exp(ways - all_ways[possible])
    return np.minimum(tail, 1.0)
