"""`features.parquet`: one row per feature, put together from what the build gathered."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from activations.media import MODALITIES
from scope.features.languages import language_facts
from scope.features.layout import SPOKEN
from scope.features.statistics import (
    QUANTILES,
    ListStatistics,
    SpreadStatistics,
    TokenStatistics,
    divergence_bits,
    entropy_bits,
    wilson,
)
from scope.features.texts import RowCounts, Texts
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
    spread: SpreadStatistics
    special: np.ndarray
    """float64 `(d_sae,)`: the sum of |strength| over the rows that are left out."""
    texts: Texts
    rows: RowCounts
    weights: dict[str, list[Any]]
    """The columns that the SAE's weights alone make: `weight_columns`."""
    vocabulary: Vocabulary


def feature_table(gathered: Gathered) -> "pd.DataFrame":
    """The feature table. Its columns are described at `FeatureIndex.table`; those that need a definition:

    density_low, density_high: the 95% score interval of firings per indexed row (Wilson 1927).
    special_share: the sum of |strength| over the rows that are left out (BOS and other special tokens), as a share of
        the sum over all rows. Near 1, the feature models sinks, and its firings elsewhere are a side effect.
    top_token_share: the share of the summed |strength| on ordinary rows that one token has.
    token_bits, position_bits: how far the tokens (the places in the window, binned 0, 1, 2, 3, 4-7, 8-15, …) that it
        fires on depart from those of all indexed rows: Kullback-Leibler divergence in bits, without what chance adds
        (`statistics.divergence_bits`). 0: the token, or the place, says nothing about whether it fires.
    token_entropy: bits, of its firings over tokens.
    mean_top_tokens, mean_top_values: the tokens with the largest mean strength, among those that it fires on five
        times or more.
    language_entropy, source_entropy: bits, of rates (not counts) over groups.
    language_neutral, language_specific: see `scope.features.languages`.
    top_role, role_entropy, top_kind, kind_entropy: of chats, as of languages, over the roles and kinds that have rows.
    text_rate, image_rate, audio_rate: firings per indexed row of this modality, where the text has media.
    dead: no firing in this index. over_dense: density above `OVER_DENSE`.
    """
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
        "position_bits": divergence_bits(lists.by_position, gathered.rows.by_position).astype(np.float32),
        "special_share": _special_share(gathered.special, lists.size_sum),
        **_token_columns(gathered),
        **gathered.weights,
        **_group_columns("language", gathered.texts.languages, lists.by_language, gathered.rows.by_language),
        **_group_columns("source", gathered.texts.sources, lists.by_source, gathered.rows.by_source),
        **_language_columns(gathered),
        **_spoken_columns(gathered),
        **_modality_columns(lists, gathered.rows),
        "dead": n == 0,
        "over_dense": density > OVER_DENSE,
    }
    return pd.DataFrame(columns)


def _token_columns(gathered: Gathered) -> dict[str, object]:
    tokens = gathered.tokens
    kept = [min(int(k), TABLE_TOKENS) for k in (tokens.tokens >= 0).sum(axis=1)]
    by_mean = [min(int(k), TABLE_TOKENS) for k in (tokens.mean_tokens >= 0).sum(axis=1)]
    strings = [gathered.vocabulary.strings(row[:k]) for row, k in zip(tokens.tokens, kept, strict=True)]
    means = tokens.strengths / np.maximum(tokens.counts, 1)
    return {
        "top_token": [row[0] if row else "" for row in strings],
        "top_token_share": tokens.top_share.astype(np.float32),
        "token_entropy": tokens.entropy.astype(np.float32),
        "token_bits": tokens.divergence.astype(np.float32),
        "top_tokens": strings,
        "top_token_means": [row[:k].astype(np.float32) for row, k in zip(means, kept, strict=True)],
        "top_token_counts": [row[:k] for row, k in zip(tokens.counts, kept, strict=True)],
        "mean_top_tokens": [
            gathered.vocabulary.strings(row[:k]) for row, k in zip(tokens.mean_tokens, by_mean, strict=True)
        ],
        "mean_top_values": [row[:k].astype(np.float32) for row, k in zip(tokens.means, by_mean, strict=True)],
    }


def _special_share(special: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    total = special + ordinary
    return np.divide(special, total, out=np.full(len(total), np.nan), where=total > 0).astype(np.float32)


def _language_columns(gathered: Gathered) -> dict[str, object]:
    spread, rows = gathered.spread, gathered.rows.by_language
    facts = language_facts(gathered.lists.by_language, spread.windows, spread.documents, rows)
    names = np.array([*gathered.texts.languages, ""], dtype=object)
    return {"language_neutral": facts.neutral, "language_specific": names[facts.specific]}


def _spoken_columns(gathered: Gathered) -> dict[str, object]:
    columns: dict[str, object] = {}
    for group, rows in gathered.rows.by_spoken.items():
        there = np.flatnonzero(rows)
        names = tuple(SPOKEN[group][code] for code in there)
        columns |= _group_columns(group, names, gathered.lists.by_spoken[group], rows[there])
    return columns


def _modality_columns(lists: ListStatistics, rows: RowCounts) -> dict[str, object]:
    """Of a text with media: firings per indexed row of each modality that there is."""
    if "modality" not in rows.by_spoken:
        return {}
    counts = rows.by_spoken["modality"]
    there = np.flatnonzero(counts)
    rates = lists.by_spoken["modality"] / counts[there]
    return {f"{MODALITIES[code]}_rate": rates[:, place].astype(np.float32) for place, code in enumerate(there.tolist())}


def _group_columns(group: str, names: tuple[str, ...], counts: np.ndarray, rows: np.ndarray) -> dict[str, object]:
    """The group that a feature fires most in, by the lower end of its rate's interval (a group with few rows does not
    win by a lucky firing), and the entropy of its rates."""
    low, _ = wilson(counts, rows)
    rates = counts / np.maximum(rows, 1)
    fires = counts.sum(axis=1) > 0
    top = np.array([*names, ""], dtype=object)[np.where(fires, low.argmax(axis=1), len(names))]
    return {f"top_{group}": top, f"{group}_entropy": entropy_bits(rates).astype(np.float32)}
