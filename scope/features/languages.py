"""Which features are of one language, and which of all alike: rates are compared, never counts.

The firings of a feature are not independent: a text that has one has more. So they are counted as so many observations
as there are windows that they lie in. With k firings in w windows of a language that has n indexed rows, the rate k/n
has the interval of w observations in n w/k; where a feature does not fire, the firings per window are those that it has
elsewhere. Intervals are Wilson's at 99%, since thousands of features are asked.

- *specific* to a language: the lower end of its rate there is at least `SPECIFIC` times the upper end of its rate in
  all other languages together, and it fires in `DOCUMENTS` documents of the language or more.
- *neutral*: in every language with at least `ROWS` indexed rows, two or more, the interval of its rate lies within a
  factor of `NEUTRAL` of the mean of their rates. A feature that fires too rarely to tell is not neutral.
"""

from typing import NamedTuple

import numpy as np

from scope.features.statistics import wilson

__all__ = ["DOCUMENTS", "NEUTRAL", "ROWS", "SPECIFIC", "LanguageFacts", "language_facts"]

SPECIFIC = 4.0
DOCUMENTS = 3
NEUTRAL = 3.0
ROWS = 1000
Z_99 = 2.5758293035489004


class LanguageFacts(NamedTuple):
    """By feature, `(d_sae,)`."""

    neutral: np.ndarray
    """bool."""
    specific: np.ndarray
    """Number of the language, -1 where it is of none."""


def language_facts(firings: np.ndarray, windows: np.ndarray, documents: np.ndarray, rows: np.ndarray) -> LanguageFacts:
    """Which features are neutral and which specific.

    Args:
        firings, windows, documents: `(d_sae, n_languages)`, counts of what a feature fires on.
        rows: indexed rows of each language.
    """
    d_sae, n_languages = firings.shape
    if n_languages < 2:
        return LanguageFacts(np.zeros(d_sae, bool), np.full(d_sae, -1))
    low, high = _interval(firings, windows, rows, firings, windows)
    elsewhere, windows_elsewhere = (counts.sum(axis=1, keepdims=True) - counts for counts in (firings, windows))
    _, high_elsewhere = _interval(elsewhere, windows_elsewhere, rows.sum() - rows, firings, windows)
    shown = (low >= SPECIFIC * high_elsewhere) & (documents >= DOCUMENTS)
    specific = np.where(shown.any(axis=1), np.where(shown, low, -1).argmax(axis=1), -1)
    large = rows >= ROWS
    mean = (firings[:, large] / np.maximum(rows[large], 1)).mean(axis=1, keepdims=True) if large.any() else np.nan
    within = (low[:, large] >= mean / NEUTRAL) & (high[:, large] <= mean * NEUTRAL)
    neutral = within.all(axis=1) & (firings.sum(axis=1) > 0) & (int(large.sum()) >= 2)
    return LanguageFacts(neutral, specific)


def _interval(
    firings: np.ndarray, windows: np.ndarray, rows: np.ndarray, all_firings: np.ndarray, all_windows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    overall = all_firings.sum(axis=1, keepdims=True) / np.maximum(all_windows.sum(axis=1, keepdims=True), 1)
    per_window = np.where(firings > 0, firings / np.maximum(windows, 1), np.maximum(overall, 1))
    return wilson(firings / per_window, rows / per_window, Z_99)
