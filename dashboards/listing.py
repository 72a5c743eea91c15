"""The feature browser's list: an address's query in, the features that it asks for out, in order.

1. `FeatureQuery.of` reads a query. The grid, the scatter plot and the export all read the same one, so that they show
   the same features.
2. `listing` finds the features: filters on the feature table and the labels, an area of the scatter plot, and
   "fires on A and not on B"; then it sorts. Answers are kept, so that scrolling asks once.
3. `grid_rows` writes the rows that a grid shows, `grid_table` all of them as a table, `points` the scatter plot.

Nothing here is proportional to the rows of the text: all of it reads the feature table.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dashboards.areas import Area
from dashboards.columns import COLUMNS, CONTRAST_COLUMNS, UMAP, Column, sortable
from dashboards.marks import Marks, marks_of
from dashboards.queries import records
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["KINDS", "SHOWS", "FeatureQuery", "Listing", "grid_rows", "grid_table", "listing", "parse_sort", "spark"]

SHOWS: dict[str, str | None] = {"all": None, "alive": "dead", "dead": "dead", "over-dense": "over_dense"}
"""Which features to show, and the column of the table that says so."""
KINDS = ("neutral", "specific")
"""Whether a feature fires alike in all languages or mostly in one."""
KEPT = 32
"""Answers that are kept."""
SPARK_BINS = 24
MAX_TEXT = 400


def parse_sort(text: str, known: Mapping[str, Column] | None = None) -> tuple[tuple[str, bool], ...]:
    """ "density:desc" as (column, ascending) pairs; what cannot be sorted by is left out."""
    pairs = []
    for part in filter(None, text.split(",")):
        column, _, direction = part.partition(":")
        if sortable(column, known):
            pairs.append((column, direction != "desc"))
    return tuple(pairs)


@dataclass(frozen=True)
class FeatureQuery:
    """Which features, in which order."""

    q: str = ""
    """In a token, a promoted or suppressed token, the label; or the feature's id."""
    show: str = "all"
    """A key of `SHOWS`."""
    language: str = ""
    """Where its rate is highest; with the kind "specific", the language that it is specific to."""
    source: str = ""
    kind: str = ""
    """ "" or one of `KINDS`."""
    role: str = ""
    """Of chats: in whose turns its rate is highest."""
    content: str = ""
    """Of chats: the kind of content that its rate is highest on."""
    starred: bool = False
    list: str = ""
    """Of the labels' lists."""
    low: float = 0.0
    high: float = 1.0
    """Density, ends included."""
    a: str = ""
    b: str = ""
    """ "Fires on A and not on B", as `FeatureIndex.contrast` reads them."""
    x: str = "density"
    y: str = "max_value"
    """The scatter plot's columns, which `area` is in."""
    area: str = ""
    """A box or a lasso of the scatter plot; see `dashboards.areas`."""
    sort: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "FeatureQuery":
        """The query of an address; what cannot be read counts as not given."""
        known = {name: str(query.get(name, ""))[:MAX_TEXT] for name in ("q", "list", "a", "b")}
        known["q"] = known["q"].strip()
        show, kind = query.get("show", "all"), query.get("kind", "")
        axes = {name: query[name] for name in ("x", "y") if query.get(name) in COLUMNS}
        if query.get("plot") == "umap":
            axes = dict(zip(("x", "y"), UMAP, strict=True))
        return cls(
            show=show if show in SHOWS else "all",
            language=query.get("language", ""),
            source=query.get("source", ""),
            kind=kind if kind in KINDS else "",
            role=query.get("role", ""),
            content=query.get("content", ""),
            starred=query.get("starred", "") == "1",
            low=_share(query.get("low", ""), 0.0),
            high=_share(query.get("high", ""), 1.0),
            area=query.get("area", ""),
            sort=parse_sort(query.get("sort", "")),
            **known,
            **axes,
        )

    @property
    def contrasts(self) -> bool:
        """Whether it asks what fires on A and not on B."""
        return bool(self.a.strip())


def _share(text: str, default: float) -> float:
    try:
        value = float(text)
    except ValueError:
        return default
    return value if 0 <= value <= 1 else default


class Listing(NamedTuple):
    """The features that a query asks for."""

    ids: np.ndarray
    """int32, in the order asked for."""
    contrast: "pd.DataFrame | None"
    """Rates on A and on B, indexed by feature, where the query asks for them."""
    note: str
    """What the contrast was counted on, in words."""


_kept: OrderedDict[tuple[Any, ...], Listing] = OrderedDict()
_lock = threading.Lock()


def listing(index: "FeatureIndex", query: FeatureQuery) -> Listing:
    """The features that a query asks for.

    Raises:
        InvalidInputError: a condition or an area cannot be read, or the index lacks what a filter needs.
        UnknownNameError: a language, source, role, kind of content or list that does not exist.
    """
    marks = marks_of(index)
    key = (index.fingerprint, str(index.path), marks.version, query)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    found = _find(index, query, marks)
    with _lock:
        _kept[key] = found
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return found


def _find(index: "FeatureIndex", query: FeatureQuery, marks: Marks) -> Listing:
    passes = _passing(index, query, marks)
    contrast, note = None, ""
    if query.contrasts:
        contrast, note = _contrast(index, query)
        of_contrast = np.zeros(index.d_sae, bool)
        of_contrast[contrast.index.to_numpy(np.int64)] = True
        passes &= of_contrast
    ids = np.flatnonzero(passes).astype(np.int32)
    order = query.sort or ((("z", False),) if contrast is not None else ())
    for name, ascending in reversed(order):
        ids = _sorted(ids, _values(index, name, marks, contrast), ascending)
    return Listing(ids, contrast, note)


def _passing(index: "FeatureIndex", query: FeatureQuery, marks: Marks) -> np.ndarray:
    """bool `(d_sae,)`."""
    table = index.table
    passes = _matching_text(index, query.q, marks) if query.q else np.ones(index.d_sae, bool)
    column = SHOWS[query.show]
    if column is not None:
        passes &= table[column].to_numpy(bool) == (query.show != "alive")
    if query.kind:
        passes &= _of_kind(index, query)
    elif query.language:
        _check_known("language", query.language, index.languages)
        passes &= (table["top_language"] == query.language).to_numpy(bool)
    if query.source:
        _check_known("source", query.source, index.sources)
        passes &= (table["top_source"] == query.source).to_numpy(bool)
    if query.role:
        passes &= _mostly(index, "role", query.role, index.roles)
    if query.content:
        passes &= _mostly(index, "kind", query.content, index.kinds)
    if query.low > 0 or query.high < 1:
        density = table["density"].to_numpy(float)
        passes &= (density >= query.low) & (density <= query.high)
    if query.starred:
        passes &= _chosen(index.d_sae, marks.starred)
    if query.list:
        _check_known("list", query.list, list(marks.lists))
        passes &= _chosen(index.d_sae, marks.lists[query.list])
    if query.area:
        passes &= _in_area(index, query)
    return passes


def _matching_text(index: "FeatureIndex", text: str, marks: Marks) -> np.ndarray:
    found = index.query(text=text).rows["feature"].to_numpy(np.int64)
    wanted = text.casefold()
    labelled = [feature for feature, label in marks.labels.items() if wanted in label.casefold()]
    return _chosen(index.d_sae, [*found.tolist(), *labelled])


def _chosen(d_sae: int, features: Sequence[int]) -> np.ndarray:
    passes = np.zeros(d_sae, bool)
    passes[np.asarray(features, dtype=np.int64)] = True
    return passes


def _of_kind(index: "FeatureIndex", query: FeatureQuery) -> np.ndarray:
    if "language_neutral" not in index.table:
        raise InvalidInputError(
            "This index was built by an earlier release and does not say which features are neutral to the language. "
            "Build it again to know."
        )
    if query.kind == "neutral":
        return index.table["language_neutral"].to_numpy(bool)
    language = index.table["language_specific"]
    if query.language:
        _check_known("language", query.language, index.languages)
        return (language == query.language).to_numpy(bool)
    return (language.fillna("") != "").to_numpy(bool)


def _mostly(index: "FeatureIndex", group: str, name: str, known: Sequence[str]) -> np.ndarray:
    """Which features have their highest rate in a role's turns, or on a kind of content."""
    _check_known(group, name, known)
    if f"top_{group}" not in index.table:
        raise InvalidInputError(
            f"This index was built by an earlier release and does not say which {group} a feature fires most in. "
            "Build it again to know."
        )
    return (index.table[f"top_{group}"] == name).to_numpy(bool)


def _in_area(index: "FeatureIndex", query: FeatureQuery) -> np.ndarray:
    x, y = (COLUMNS[name] for name in (query.x, query.y))
    area = Area.parse(query.area)
    return area.contains(x.scaled(x.values(index)), y.scaled(y.values(index)), x.log, y.log)


def _contrast(index: "FeatureIndex", query: FeatureQuery) -> "tuple[pd.DataFrame, str]":
    found = index.contrast(query.a, query.b if query.b.strip() else None, n=index.d_sae)
    sides = (("A", found.n_rows_a, found.looked_at_a), ("B", found.n_rows_b, found.looked_at_b))
    words = [f"{name}: {f'a sample of {looked:,} of ' if looked < n else ''}{n:,} tokens" for name, n, looked in sides]
    return found.table.set_index("feature"), ", ".join(words)


def _values(index: "FeatureIndex", name: str, marks: Marks, contrast: "pd.DataFrame | None") -> np.ndarray:
    if name == "label":
        own = np.full(index.d_sae, None, dtype=object)
        for feature, label in marks.labels.items():
            own[feature] = label
        return own
    if name == "starred":
        return _chosen(index.d_sae, marks.starred).astype(float)
    if name in CONTRAST_COLUMNS:
        values = np.full(index.d_sae, np.nan)
        if contrast is not None:
            values[contrast.index.to_numpy(np.int64)] = contrast[name].to_numpy(float)
        return values
    return COLUMNS[name].values(index)


def _sorted(ids: np.ndarray, values: np.ndarray, ascending: bool) -> np.ndarray:
    """Stable in both directions; missing values last."""
    own = values[ids]
    if own.dtype == object:
        missing = np.array([value is None or value == "" for value in own.tolist()], bool)
        texts = np.where(missing, "", own).astype(str)
        _, rank = np.unique(texts, return_inverse=True)
    else:
        rank = own.astype(float)
        missing = np.isnan(rank)
    key = np.where(missing, np.inf, rank if ascending else -rank)
    return ids[np.argsort(key, kind="stable")]


def _check_known(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UnknownNameError(kind, name, known)


# --- rows of the grid -----------------------------------------------------------------------------------------------


def grid_rows(index: "FeatureIndex", query: FeatureQuery, start: int, stop: int) -> tuple[list[dict[str, Any]], int]:
    """Rows `start` to `stop` of the browser's grid, JSON-able, and how many match in all."""
    found = listing(index, query)
    marks = marks_of(index)
    ids = found.ids[max(start, 0) : max(stop, 0)]
    columns = [column for column in COLUMNS.values() if column.name not in UMAP and column.on(index)]
    rates = [{}] * len(ids) if found.contrast is None else records(found.contrast.loc[ids, list(CONTRAST_COLUMNS)])
    rows = [
        {**_grid_row(index, row, marks, columns), **{name: _finite(rate[name]) for name in rate}}
        for row, rate in zip(records(index.table.iloc[ids]), rates, strict=True)
    ]
    return rows, len(found.ids)


def _grid_row(index: "FeatureIndex", row: Mapping[str, Any], marks: Marks, columns: Sequence[Column]) -> dict[str, Any]:
    feature, dead = int(row["feature"]), bool(row["dead"])
    return {
        **{column.name: column.cell(row) for column in columns},
        "id": str(feature),
        "feature": feature,
        "label": marks.labels.get(feature, ""),
        "own": feature in marks.own,
        "starred": feature in marks.starred,
        "tokens": [str(token) for token in row["top_tokens"][:6]],
        "logits": [str(token) for token in row["top_logits"][:4]],
        "dead": dead,
        "over_dense": bool(row["over_dense"]),
        "spark": [] if dead else spark(index.histogram(feature)[1]),
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def spark(counts: np.ndarray) -> list[float]:
    """Heights from 0 to 1 of a small histogram, on a logarithmic scale (a single firing is still seen)."""
    merged = np.array([part.sum() for part in np.array_split(np.asarray(counts, dtype=np.int64), SPARK_BINS)])
    heights = np.log1p(merged)
    largest = heights.max(initial=0)
    return [round(float(h), 3) for h in heights / largest] if largest > 0 else []


def grid_table(index: "FeatureIndex", query: "FeatureQuery | Mapping[str, str]") -> "pd.DataFrame":
    """Everything that is known of the features that a query lists, all of them, in its order: what is downloaded.

    Columns: those of `scope.features.grids.feature_grid` (the feature table and what people wrote), and the rates on A
    and on B with their intervals where the query asks for them.
    """
    from scope.features.grids import with_labels

    found = listing(index, query if isinstance(query, FeatureQuery) else FeatureQuery.of(query))
    table = with_labels(index, index.table.iloc[found.ids])
    if found.contrast is None:
        return table
    rates = found.contrast.reindex(found.ids).reset_index(drop=True)
    return table.assign(**{str(name): rates[name] for name in rates.columns if name not in table})
