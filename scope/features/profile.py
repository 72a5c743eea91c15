"""What an index knows of one feature beside its firings, as tables."""

import numpy as np
import pandas as pd

from scope.features.layout import listed_as
from scope.features.reader import IndexReader
from scope.features.statistics import wilson

__all__ = ["by_group", "cofiring", "described", "neighbours", "top_tokens"]


def by_group(reader: IndexReader, group: str, feature: int) -> pd.DataFrame:
    """Firings by language, source, role, kind or modality; see `FeatureIndex.by_language`."""
    listed = reader.manifest[listed_as(group)]
    names, rows = [name for name, _ in listed], np.array([n for _, n in listed], np.int64)
    firings = reader.array(f"statistics/{group}_firings").slice(feature, feature + 1)[0].astype(np.int64)
    strength = reader.array(f"statistics/{group}_strength").slice(feature, feature + 1)[0]
    low, high = wilson(firings, rows)
    table = pd.DataFrame(
        {
            group: names,
            "n_firings": firings,
            "share": firings / max(int(firings.sum()), 1),
            "n_rows": rows,
            "rate": firings / np.maximum(rows, 1),
            "rate_low": low,
            "rate_high": high,
            "mean_value": _mean(strength, firings),
        }
    )
    return table.sort_values(["rate", "n_rows"], ascending=False, kind="stable", ignore_index=True)


def top_tokens(reader: IndexReader, table: pd.DataFrame, feature: int, n: int) -> pd.DataFrame:
    """The tokens that a feature fires on most; see `FeatureIndex.top_tokens`."""
    tokens, counts, strengths = (
        reader.array(f"statistics/{name}").slice(feature, feature + 1)[0][:n]
        for name in ("token_id", "token_firings", "token_strength")
    )
    kept = tokens >= 0
    tokens, counts, strengths = tokens[kept].astype(np.int64), counts[kept].astype(np.int64), strengths[kept]
    row = table.iloc[feature]
    first = abs(float(strengths[0])) if len(strengths) else 1.0
    # The table has the share of the first; the others follow from their strengths.
    share = np.abs(strengths) / first * float(row["top_token_share"]) if first else np.zeros(len(strengths))
    return pd.DataFrame(
        {
            "token": reader.vocabulary.strings(tokens),
            "token_id": tokens,
            "mean_value": _mean(strengths, counts),
            "count": counts,
            "share": share,
            "rate": counts / np.maximum(reader.vocabulary.rows_of(tokens), 1),
        }
    )


def neighbours(reader: IndexReader, table: pd.DataFrame, feature: int, n: int) -> pd.DataFrame:
    """The nearest decoder rows; see `FeatureIndex.neighbours`."""
    row = table.iloc[feature]
    others = np.asarray(row["neighbours"], np.int64)[:n]
    cosines = np.asarray(row["neighbour_cosines"], np.float32)[:n]
    return described(pd.DataFrame({"feature": others, "cosine": cosines}), table)


def cofiring(reader: IndexReader, table: pd.DataFrame, feature: int, n: int, n_indexed: int) -> pd.DataFrame:
    """The features that fire on the same rows; see `FeatureIndex.cofiring`."""
    others, both = (
        reader.array(f"statistics/{name}").slice(feature, feature + 1)[0][:n]
        for name in ("cofiring_feature", "cofiring_both")
    )
    kept = others >= 0
    others, both = others[kept].astype(np.int64), both[kept].astype(np.float64)
    own, theirs = int(table["n_firings"].iloc[feature]), table["n_firings"].to_numpy()[others]
    found = pd.DataFrame(
        {
            "feature": others,
            "n_both": both,
            "jaccard": both / np.maximum(own + theirs - both, 1),
            "pmi": np.log2(both * n_indexed / np.maximum(own * theirs.astype(float), 1)),
            "p_other_given_this": both / max(own, 1),
            "p_this_given_other": np.minimum(both / np.maximum(theirs, 1), 1),
        }
    )
    return described(found, table)


def described(found: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """With top_token and density of each feature that is found."""
    own = table[["top_token", "density"]].iloc[found["feature"].to_numpy(np.int64)]
    return found.assign(top_token=own["top_token"].to_numpy(), density=own["density"].to_numpy())


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0).astype(np.float32)
