"""Features that fire on A and not on B, as rates.

1. Count, for every feature, on how many of A's rows and on how many of B's it fires. A language, a source, a role or a
   kind of content alone is counted when the index is built; any other condition's rows are looked at (`selection`), and
   of more than 250,000 a sample. "Everything that is not A" is what A leaves of all firings, or a sample of the other
   rows where A is a sample itself.
2. Rates are firings per row, with Wilson's 95% interval.
3. `log_ratio` is log2 of A's rate over B's, each smoothed with rows at the rate p of both together, as many as hold
   half a firing but no more than there are rows:  r = (k + m p) / (n + m),  m = min(1 / 2p, n).
4. `z` is the signed root of the likelihood ratio of "two rates" against "one rate" (Dunning 1993, "Accurate methods
   for the statistics of surprise and coincidence"), about normal where the rates are equal. Unlike the logarithm of a
   ratio it holds where B has no firing at all. Features are listed by it: a feature comes first that fires on much of A
   and hardly on B, before one whose rates are high in both and one that is rare in both.

An interval says how well the rate is known for rows drawn one by one; tokens of a document depend on each other, so
for languages `scope.features.parallel` draws whole titles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scope.errors import InvalidInputError
from scope.features.beside import both
from scope.features.conditions import Condition
from scope.features.counting import count_features
from scope.features.layout import listed_as
from scope.features.profile import described
from scope.features.selection import Rows, rows_of, rows_without
from scope.features.statistics import wilson

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["Contrast", "Counted", "contrast", "count_condition", "likelihood_z", "log_ratio", "totals"]


class Counted(NamedTuple):
    """On how many of some rows each feature fires."""

    firings: np.ndarray
    """int64 `(d_sae,)`, on the rows that were looked at."""
    looked_at: int
    n_rows: int
    """Rows that were meant: more than were looked at where they are a sample."""

    @property
    def sampled(self) -> bool:
        return self.looked_at < self.n_rows


@dataclass(frozen=True, eq=False)
class Contrast:
    """What fires on A and not on B."""

    a: Condition
    b: Condition | None
    """None: everything that is not A."""
    table: pd.DataFrame
    """feature, rate_a, rate_a_low, rate_a_high, rate_b, rate_b_low, rate_b_high, log_ratio (log2), z, top_token,
    density: the features that fire more often on A, by z. Features that A or B name are left out."""
    n_rows_a: int
    """Rows of A on which features may fire."""
    n_rows_b: int
    looked_at_a: int
    """Rows of A that were looked at; fewer than there are where A is a sample."""
    looked_at_b: int

    @property
    def sampled(self) -> bool:
        """Whether the rates of A or of B are estimates from a sample of its rows."""
        return self.looked_at_a < self.n_rows_a or self.looked_at_b < self.n_rows_b

    def __str__(self) -> str:
        b = "everything else" if self.b is None else str(self.b)
        parts = [
            f"{name} ({looked:,} of {n:,} rows)" if looked < n else f"{name} ({n:,} rows)"
            for name, looked, n in (
                (str(self.a), self.looked_at_a, self.n_rows_a),
                (b, self.looked_at_b, self.n_rows_b),
            )
        ]
        return " and not ".join(parts)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>Fires on {escape(str(self))}</p>{self.table.to_html(index=False, escape=True)}"


def contrast(
    reader: "IndexReader",
    table: pd.DataFrame,
    a: Condition,
    b: Condition | None,
    n: int,
    count: Callable[[Condition], Counted],
) -> Contrast:
    """See `FeatureIndex.contrast`.

    Args:
        reader: the index.
        table: its feature table.
        a, b: the conditions.
        n: how many features to list, at most.
        count: `count_condition` of the index, kept or not.
    Raises:
        InvalidInputError: no row meets A, or none meets B.
    """
    if b is None:
        on_a = count(a)
        on_b = _count_rest(reader, a, on_a)
    else:
        on_a, on_b = both(partial(count, a), partial(count, b))
    for name, counted in ((str(a), on_a), ("not " + str(a) if b is None else str(b), on_b)):
        if not counted.n_rows:
            raise InvalidInputError(f"No row of this index is {name}, so there is nothing to compare.")
    found = compare(on_a.firings, on_a.looked_at, on_b.firings, on_b.looked_at)
    named = set(a.features) | set(() if b is None else b.features)
    found = found[(found["rate_a"] > found["rate_b"]) & ~found["feature"].isin(named)]
    found = found.sort_values("z", ascending=False, kind="stable", ignore_index=True).head(n)
    return Contrast(a, b, described(found, table), on_a.n_rows, on_b.n_rows, on_a.looked_at, on_b.looked_at)


def compare(k_a: np.ndarray, n_a: int, k_b: np.ndarray, n_b: int) -> pd.DataFrame:
    """Rates, their intervals, `log_ratio` and `z` of every feature, given its firings k on n rows of A and B."""
    low_a, high_a = wilson(k_a, n_a)
    low_b, high_b = wilson(k_b, n_b)
    return pd.DataFrame(
        {
            "feature": np.arange(len(k_a)),
            "rate_a": k_a / max(n_a, 1),
            "rate_a_low": low_a,
            "rate_a_high": high_a,
            "rate_b": k_b / max(n_b, 1),
            "rate_b_low": low_b,
            "rate_b_high": high_b,
            "log_ratio": log_ratio(k_a, n_a, k_b, n_b),
            "z": likelihood_z(k_a, n_a, k_b, n_b),
        }
    )


def log_ratio(k_a: np.ndarray, n_a: float, k_b: np.ndarray, n_b: float) -> np.ndarray:
    """log2 of the smoothed rate of A over that of B; 0 where neither has a firing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = (k_a + k_b) / (n_a + n_b)
        smoothed = []
        for k, n in ((k_a, n_a), (k_b, n_b)):
            m = np.minimum(1 / (2 * p), n)
            smoothed.append((k + m * p) / (n + m))
        ratio = np.log2(smoothed[0] / smoothed[1])
    return np.where(p > 0, ratio, 0.0)


def likelihood_z(k_a: np.ndarray, n_a: float, k_b: np.ndarray, n_b: float) -> np.ndarray:
    """Signed root of the likelihood ratio statistic of two binomial rates; positive where A's is the higher."""
    p_a, p_b = k_a / n_a, k_b / n_b
    p = (k_a + k_b) / (n_a + n_b)
    gain = sum(
        _times_log(k, own, p) + _times_log(n - k, 1 - own, 1 - p) for k, n, own in ((k_a, n_a, p_a), (k_b, n_b, p_b))
    )
    z: np.ndarray = np.sign(p_a - p_b) * np.sqrt(2 * np.maximum(gain, 0))
    return z


def _times_log(k: np.ndarray, own: np.ndarray, common: np.ndarray) -> np.ndarray:
    """k ln(own / common), 0 where k is 0."""
    ratio = np.divide(own, common, out=np.ones(len(k)), where=(k > 0) & (common > 0))
    product: np.ndarray = k * np.log(np.where(ratio > 0, ratio, 1))
    return product


def totals(reader: "IndexReader") -> Counted:
    """All firings on all rows."""
    n = int(reader.manifest["n_indexed_rows"])
    return Counted(np.diff(reader.array("by_feature/indptr").all()), n, n)


def count_condition(reader: "IndexReader", condition: Condition) -> Counted:
    """On how many of a condition's rows each feature fires.

    Raises:
        UnknownNameError, OutOfRangeError, InvalidInputError: the condition names what is not there.
    """
    terms = condition.terms
    if len(terms) == 1 and terms[0].kind in ("language", "source", *reader.spoken):
        known = dict(reader.manifest[listed_as(terms[0].kind)])
        if terms[0].value in known:
            counts = reader.array(f"statistics/{terms[0].kind}_firings").all()
            n = int(known[terms[0].value])
            return Counted(counts[:, list(known).index(terms[0].value)].astype(np.int64), n, n)
    return _count(reader, rows_of(reader, condition))


def _count_rest(reader: "IndexReader", condition: Condition, counted: Counted) -> Counted:
    """The same of the rows that the condition does not hold on."""
    if counted.sampled:
        return _count(reader, rows_without(reader, condition, counted.n_rows))
    all_firings = totals(reader)
    n = all_firings.n_rows - counted.n_rows
    return Counted(all_firings.firings - counted.firings, n, n)


def _count(reader: "IndexReader", rows: Rows) -> Counted:
    return Counted(count_features(reader, rows.rows), len(rows.rows), rows.total)
