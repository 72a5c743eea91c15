"""The feature table with its labels, sorted, filtered and searched: what the feature browser's grid asks.

What takes long is kept: each feature's searchable text, each column's sort key, and the labels until one of them
changes. Safe across threads.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scope.features.search import is_listed, matches, search_texts, sort_key, sort_order

if TYPE_CHECKING:
    from scope.features.labels import FeatureLabels

__all__ = ["LABEL_COLUMNS", "FeatureGrid", "QueryResult"]

LABEL_COLUMNS = ("label", "label_source", "notes", "starred", "lists")


class QueryResult(NamedTuple):
    """A slice of the feature table."""

    rows: pd.DataFrame
    """The rows from `start` to `stop` of what was asked for, in its order."""
    total: int
    """Rows that match, in all."""


class _Labelled(NamedTuple):
    """The table as it is with one version of the labels."""

    version: int
    table: pd.DataFrame
    labels: list[str]
    """Case folded, by feature."""


class FeatureGrid:
    """Queries over one feature table.

    Args:
        table: one row per feature.
        labels: of the same SAE.
        more: further columns by feature, such as the UMAP's, or None while there are none.
    """

    def __init__(
        self, table: pd.DataFrame, labels: "FeatureLabels", more: Callable[[], pd.DataFrame | None] = lambda: None
    ) -> None:
        self._plain = table
        self._labels = labels
        self._more = more
        self._lock = threading.Lock()
        self._labelled: _Labelled | None = None
        self._keys: dict[tuple[str, int], np.ndarray] = {}

    @property
    def table(self) -> pd.DataFrame:
        """The feature table with columns label, label_source, notes, starred, lists. Shared: not to be changed."""
        return self._current().table

    @property
    def labels(self) -> list[str]:
        """Each feature's label, case folded."""
        return self._current().labels

    def query(
        self,
        sort: Sequence[tuple[str, bool]],
        filters: Mapping[str, Any] | None,
        text: str | None,
        start: int,
        stop: int | None,
    ) -> QueryResult:
        """See `FeatureIndex.query`."""
        current = self._current()
        passes = matches(current.table, filters or {})
        if text and text.strip():
            passes &= self._matches_text(current, text.strip().casefold())
        order = sort_order(current.table, sort, lambda name: self._key(current, name))
        order = order[passes[order]]
        return QueryResult(current.table.iloc[order[start:stop]], len(order))

    def _matches_text(self, current: _Labelled, wanted: str) -> np.ndarray:
        found = np.array([wanted in own for own in self._texts], bool)
        found |= np.array([wanted in own for own in current.labels], bool)
        if wanted.isascii() and wanted.isdigit():
            found |= (self._plain["feature"] == int(wanted)).to_numpy()
        return found

    @cached_property
    def _texts(self) -> list[str]:
        return search_texts(self._plain)

    def _key(self, current: _Labelled, name: str) -> np.ndarray:
        kept = name, current.version if name in LABEL_COLUMNS else -1
        key = self._keys.get(kept)
        if key is None:
            key = sort_key(current.table[name])
            with self._lock:
                for old in [old for old in self._keys if old[0] == name]:
                    del self._keys[old]
                self._keys[kept] = key
        return key

    def _current(self) -> _Labelled:
        version = self._labels.version
        current = self._labelled
        if current is None or current.version != version:
            current = self._join(version)
            self._labelled = current
        return current

    def _join(self, version: int) -> _Labelled:
        n = len(self._plain)
        said = self._labels.table()
        said = said[said["feature"] < n]
        of = said["feature"].to_numpy(np.int64)
        columns: dict[str, Any] = {}
        for name in LABEL_COLUMNS:
            column = np.zeros(n, bool) if name == "starred" else np.full(n, "", object)
            if name == "lists":
                column[:] = [[] for _ in range(n)]
            column[of] = pd.Series(said[name].to_list(), dtype=column.dtype).to_numpy()
            columns[name] = column if is_listed(column) or name == "starred" else pd.Series(column, dtype="str")
        more = self._more()
        if more is not None:
            placed = more.set_index("feature").reindex(range(n))
            columns |= {str(name): placed[name].to_numpy() for name in placed.columns}
        table = pd.concat([self._plain, pd.DataFrame(columns, index=self._plain.index)], axis=1)
        return _Labelled(version, table, [str(label).casefold() for label in columns["label"]])
