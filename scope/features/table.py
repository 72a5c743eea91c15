"""`features.parquet`: one row per feature, put together from what the build gathered."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scope.features.decoder import LogitEffects, Neighbours
from scope.features.statistics import QUANTILES, ListStatistics, TokenStatistics, entropy_bits, wilson
from scope.features.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OVER_DENSE", "TABLE_TOKENS", "Gathered", "feature_table"]

OVER_DENSE = 0.1
"""A feature that fires on more than this share of the indexed rows is over-dense."""
TABLE_TOKENS = 20
"""Top tokens that the table lists; the index keeps more."""


class Gathered(NamedTuple):
    """Everything that a build knows about its features."""

    n_firings: np.ndarray
    """int64 `(d_sae,)`."""
    n_indexed: int
    low: np.ndarray
    high: np.ndarray
    lists: ListStatistics
    tokens: TokenStatistics
    languages: tuple[str, ...]
    rows_by_language: np.ndarray
    """Indexed rows of each language."""
    sources: tuple[str, ...]
    rows_by_source: np.ndarray
    neighbours: Neighbours
    cosine: np.ndarray
    """Of encoder and decoder, float32 `(d_sae,)`."""
    logits: LogitEffects | None
    vocabulary: Vocabulary


def feature_table(gathered: Gathered) -> "pd.DataFrame":
    """The feature table; its columns are described at `FeatureIndex.table`."""
    import pandas as pd

    n = gathered.n_firings
    lists = gathered.lists
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = lists.sum / n
        std = np.sqrt(np.maximum(lists.sum_of_squares / n - mean**2, 0))
        position = lists.position_sum / n
    low, high = wilson(n, gathered.n_indexed)
    density = n / max(gathered.n_indexed, 1)
    columns: dict[str, object] = {
        "feature": np.arange(len(n)),
        "n_firings": n,
        "density": density,
        "density_low": low,
        "density_high": high,
        "min_value": gathered.low,
        "max_value": gathered.high,
        "mean_value": mean.astype(np.float32),
        "std_value": std.astype(np.float32),
        **{f"q{round(100 * q)}": lists.quantiles[:, i].astype(np.float32) for i, q in enumerate(QUANTILES)},
        "mean_position": position.astype(np.float32),
        **_token_columns(gathered),
        **_logit_columns(gathered),
        "neighbours": list(gathered.neighbours.features),
        "neighbour_cosines": list(gathered.neighbours.cosines),
        "encoder_decoder_cosine": gathered.cosine,
        **_group_columns("language", gathered.languages, lists.by_language, gathered.rows_by_language),
        **_group_columns("source", gathered.sources, lists.by_source, gathered.rows_by_source),
        "dead": n == 0,
        "over_dense": density > OVER_DENSE,
    }
    return pd.DataFrame(columns)


def _token_columns(gathered: Gathered) -> dict[str, object]:
    tokens = gathered.tokens
    kept = [min(int(k), TABLE_TOKENS) for k in (tokens.tokens >= 0).sum(axis=1)]
    strings = [gathered.vocabulary.strings(row[:k]) for row, k in zip(tokens.tokens, kept, strict=True)]
    means = tokens.strengths / np.maximum(tokens.counts, 1)
    return {
        "top_token": [row[0] if row else "" for row in strings],
        "top_token_share": tokens.top_share.astype(np.float32),
        "token_entropy": tokens.entropy.astype(np.float32),
        "top_tokens": strings,
        "top_token_means": [row[:k].astype(np.float32) for row, k in zip(means, kept, strict=True)],
        "top_token_counts": [row[:k] for row, k in zip(tokens.counts, kept, strict=True)],
    }


def _logit_columns(gathered: Gathered) -> dict[str, object]:
    d_sae = len(gathered.n_firings)
    if gathered.logits is None:
        empty: list[list[str]] = [[] for _ in range(d_sae)]
        none = [np.empty(0, np.float32)] * d_sae
        return {
            "top_logits": empty,
            "top_logit_effects": none,
            "bottom_logits": empty,
            "bottom_logit_effects": none,
        }
    logits = gathered.logits
    return {
        "top_logits": [gathered.vocabulary.strings(row) for row in logits.top_tokens],
        "top_logit_effects": list(logits.top_effects),
        "bottom_logits": [gathered.vocabulary.strings(row) for row in logits.bottom_tokens],
        "bottom_logit_effects": list(logits.bottom_effects),
    }


def _group_columns(group: str, names: tuple[str, ...], counts: np.ndarray, rows: np.ndarray) -> dict[str, object]:
    """The group that a feature fires most in, by the lower end of its rate's interval (a group with few rows does not
    win by a lucky firing), and the entropy of its rates."""
    low, _ = wilson(counts, rows)
    rates = counts / np.maximum(rows, 1)
    fires = counts.sum(axis=1) > 0
    top = np.array([*names, ""], dtype=object)[np.where(fires, low.argmax(axis=1), len(names))]
    return {f"top_{group}": top, f"{group}_entropy": entropy_bits(rates).astype(np.float32)}
