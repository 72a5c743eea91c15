"""What fires on a token, wherever it stands, and what fires on a document.

Features are listed by how far their rate there is above their rate elsewhere (`contrast.likelihood_z`): a feature that
fires on everything fires here too, and says nothing about the place.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.contrast import likelihood_z, totals
from scope.features.counting import Sums, count_features, sum_strengths
from scope.features.selection import rows_of_tokens
from scope.features.statistics import wilson

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["on_document", "on_token"]

MEAN_ROWS = 2**14
"""Rows that a token's mean strengths are taken over, at most."""


def on_token(reader: "IndexReader", table: pd.DataFrame, token: int | str, n: int) -> pd.DataFrame:
    """See `FeatureIndex.features_on_token`."""
    rows = rows_of_tokens(reader, _token_ids(reader, token))
    if not rows.total:
        raise InvalidInputError(f"No indexed row of this text holds the token {token!r}.")
    few = rows.rows[:: -(-len(rows.rows) // MEAN_ROWS)]
    sums = sum_strengths(reader, few)
    counts = sums.counts if len(few) == len(rows.rows) else count_features(reader, rows.rows)
    found = _listed(reader, table, counts, len(rows.rows), n)
    of = found["feature"].to_numpy()
    found.insert(1, "n_firings", np.rint(counts[of] * (rows.total / len(rows.rows))).astype(np.int64))
    found.insert(5, "mean_value", _mean(sums, of))
    found.attrs.update(n_rows=rows.total, looked_at=len(rows.rows), sampled=rows.sampled)
    return found


def on_document(reader: "IndexReader", table: pd.DataFrame, document: int, n: int) -> pd.DataFrame:
    """See `FeatureIndex.features_on_document`."""
    rows = reader.document_rows(document)
    rows = rows[reader.indexed(reader.row_column("flags").take(rows))]
    sums = sum_strengths(reader, rows)
    found = _listed(reader, table, sums.counts, max(len(rows), 1), n)
    of = found["feature"].to_numpy()
    found.insert(1, "n_firings", sums.counts[of])
    found.insert(5, "max_value", sums.largest[of])
    found.insert(6, "mean_value", _mean(sums, of))
    found.attrs.update(n_rows=len(rows), looked_at=len(rows), sampled=False)
    return found


def _listed(reader: "IndexReader", table: pd.DataFrame, counts: np.ndarray, looked_at: int, n: int) -> pd.DataFrame:
    """The features that fire there, by z."""
    everything = totals(reader)
    elsewhere = np.maximum(everything.firings - counts, 0)
    rest = max(everything.n_rows - looked_at, 1)
    z = likelihood_z(counts, looked_at, np.minimum(elsewhere, rest), rest)
    fires = np.flatnonzero(counts)
    of = fires[np.argsort(-z[fires], kind="stable")[:n]]
    rate = counts[of] / looked_at
    low, high = wilson(counts[of], looked_at)
    density = table["density"].to_numpy()[of]
    return pd.DataFrame(
        {
            "feature": of,
            "rate": rate,
            "rate_low": low,
            "rate_high": high,
            "lift": rate / density,
            "z": z[of],
            "top_token": table["top_token"].to_numpy()[of],
            "density": density,
        }
    )


def _mean(sums: Sums, of: np.ndarray) -> np.ndarray:
    counts = sums.counts[of]
    mean = np.divide(sums.strengths[of], counts, out=np.full(len(of), np.nan), where=counts > 0)
    return mean.astype(np.float32)


def _token_ids(reader: "IndexReader", token: int | str) -> np.ndarray:
    vocabulary = reader.vocabulary
    if isinstance(token, str):
        return vocabulary.ids_of(token)
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise InvalidInputError(f"A token is its id or its text; got {token!r}.")
    place = int(np.searchsorted(vocabulary.token_ids, token))
    if place == len(vocabulary.token_ids) or int(vocabulary.token_ids[place]) != token:
        raise OutOfRangeError(f"This text holds no token with the id {token}.")
    return np.array([token], np.int64)
