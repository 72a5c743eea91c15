"""Features by what they fire on and by what people call them, and by language."""

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scope.errors import InvalidInputError
from scope.features.statistics import wilson

if TYPE_CHECKING:
    from scope.features.grid import FeatureGrid
    from scope.features.reader import IndexReader

__all__ = ["by_label", "by_tokens"]

SHOWN_TOKENS = 5


def by_tokens(reader: "IndexReader", table: pd.DataFrame, text: str, n: int, exact: bool) -> pd.DataFrame:
    """See `FeatureIndex.search_tokens`."""
    if not text:
        raise InvalidInputError("The text to search for is empty.")
    vocabulary = reader.vocabulary
    ids = vocabulary.ids_of(text) if exact else vocabulary.matching(text)
    tokens, counts, strengths = (
        reader.array(f"statistics/{name}").all() for name in ("token_id", "token_firings", "token_strength")
    )
    # One entry more than there are ids, for the -1 of features with fewer tokens.
    wanted = np.zeros(int(vocabulary.token_ids[-1]) + 2, bool)
    wanted[ids] = True
    of, place = np.nonzero(wanted[tokens])
    features, starts = np.unique(of, return_index=True)
    if not len(features):
        return _described(pd.DataFrame(columns=["feature", "share", "n_firings", "mean_value", "tokens"]), table)
    n_firings = np.add.reduceat(counts[of, place].astype(np.int64), starts)
    strength = np.add.reduceat(strengths[of, place].astype(np.float64), starts)
    size = np.add.reduceat(np.abs(strengths[of, place]).astype(np.float64), starts)
    # The table has the share of the strongest token; all of a feature's strength follows from it.
    whole = np.abs(strengths[features, 0]) / table["top_token_share"].to_numpy(float)[features]
    share = np.clip(np.divide(size, whole, out=np.zeros(len(size)), where=whole > 0), 0, 1)
    low, _ = wilson(share * n_firings, n_firings)
    best = np.lexsort((-strength, -low))[:n]
    ends = np.append(starts[1:], len(of))
    shown = [tokens[of[starts[i] : ends[i]], place[starts[i] : ends[i]]][:SHOWN_TOKENS] for i in best]
    found = pd.DataFrame(
        {
            "feature": features[best],
            "share": share[best],
            "n_firings": n_firings[best],
            "mean_value": (strength / n_firings)[best].astype(np.float32),
            "tokens": [vocabulary.strings(own) for own in shown],
        }
    )
    return _described(found, table)


def by_label(grid: "FeatureGrid", text: str, n: int) -> pd.DataFrame:
    """See `FeatureIndex.search_labels`."""
    wanted = text.casefold().split()
    if not wanted:
        raise InvalidInputError("The text to search for is empty.")
    first = wanted[0]
    word = re.compile(rf"(?<!\w){re.escape(first)}")
    labels = grid.labels
    found = [feature for feature, label in enumerate(labels) if label and all(part in label for part in wanted)]
    phrase = " ".join(wanted)

    def rank(feature: int) -> tuple[int, int, int]:
        label = labels[feature]
        kind = 0 if label == phrase else 1 if label.startswith(phrase) else 2 if word.search(label) else 3
        return kind, len(label), feature

    found = sorted(found, key=rank)[:n]
    columns = ["feature", "label", "label_source", "starred", "top_token", "density"]
    return grid.table.iloc[found][columns].reset_index(drop=True)


def _described(found: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    of = found["feature"].to_numpy(np.int64)
    return found.assign(top_token=table["top_token"].to_numpy()[of], density=table["density"].to_numpy()[of])
