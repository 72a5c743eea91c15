"""Sort, filter and search in the feature table: what the feature browser's grid asks.

A filter is what AG Grid sends for a column (`filterModel`), or something shorter to type in a notebook:

    {"density": (1e-4, 1e-2)}                a range; None leaves an end open
    {"top_language": ["ja", "ko"]}           one of some values
    {"lists": "to look at"}                  of a column of lists: one that holds it
    {"dead": False}                          a value
    {"max_value": {"filterType": "number", "type": "greaterThan", "filter": 100}}
    {"top_token": {"filterType": "text", "operator": "OR", "conditions": [{"type": "contains", "filter": "the"}, …]}}
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SEARCHED", "is_listed", "matches", "search_texts", "sort_key", "sort_order"]

SEARCHED = ("top_tokens", "top_logits", "bottom_logits")
"""List columns that a text search looks in."""


def sort_order(
    table: "pd.DataFrame", sort: Sequence[tuple[str, bool]], key: Callable[[str], np.ndarray] | None = None
) -> np.ndarray:
    """Row numbers of the table in the order asked for; ties stay in feature order, missing values come last.

    Args:
        table: the feature table.
        sort: (column, ascending) pairs, the most important first.
        key: gives a column's `sort_key`, where it is kept.
    Raises:
        UnknownNameError: a column that does not exist.
        InvalidInputError: a column of lists.
    """
    order = np.arange(len(table))
    for column, ascending in reversed(sort):
        own = _column(table, column)
        if is_listed(own.to_numpy()):
            raise InvalidInputError(f"The table can't be sorted by {column!r}, a column of lists.")
        values = sort_key(own) if key is None else key(column)
        order = order[np.argsort(values[order] if ascending else -values[order], kind="stable")]
    return order


def sort_key(column: "pd.Series") -> np.ndarray:
    """Numbers that sort as the column does, NaN where a value is missing; float64."""
    import pandas as pd

    if column.dtype.kind in "biuf":
        return column.to_numpy(float)
    codes, _ = pd.factorize(column, sort=True)
    return np.where(codes < 0, np.nan, codes)


def is_listed(values: np.ndarray) -> bool:
    """Whether a column holds lists."""
    return bool(values.dtype == object and len(values) and isinstance(values[0], (list, tuple, np.ndarray)))


def matches(table: "pd.DataFrame", filters: Mapping[str, Any]) -> np.ndarray:
    """Which rows of the table pass all filters, bool `(n,)`.

    Raises:
        UnknownNameError: a column that does not exist.
        InvalidInputError: a filter that cannot be read.
    """
    passes = np.ones(len(table), bool)
    for name, wanted in filters.items():
        column = _column(table, name)
        try:
            passes &= _matches(column, wanted)
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"The filter {wanted!r} of {name} cannot be read ({error}).") from error
    return passes


def search_texts(table: "pd.DataFrame") -> list[str]:
    """Per feature everything that a text search looks in, case folded."""
    columns = [table[name] for name in SEARCHED]
    return ["\n".join(token for tokens in row for token in tokens).casefold() for row in zip(*columns, strict=True)]


def _column(table: "pd.DataFrame", name: str) -> "pd.Series":
    if name not in table:
        raise UnknownNameError("column", name, table.columns)
    return table[name]


def _matches(column: "pd.Series", wanted: Any) -> np.ndarray:
    if isinstance(wanted, Mapping):
        return _matches_model(column, wanted)
    if isinstance(wanted, tuple):
        low, high = wanted
        values = column.to_numpy(float)
        return (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))
    if is_listed(column.to_numpy()):
        return _holds_one(column, wanted if isinstance(wanted, (list, set, frozenset)) else [wanted])
    if isinstance(wanted, (list, set, frozenset)):
        return column.isin(list(wanted)).to_numpy()
    if wanted is None:
        return column.isna().to_numpy()
    return (column == wanted).to_numpy()


def _matches_model(column: "pd.Series", model: Mapping[str, Any]) -> np.ndarray:
    """An AG Grid filter model."""
    if "operator" in model:
        conditions = model.get("conditions") or [model["condition1"], model["condition2"]]
        parts = [_matches_model(column, {"filterType": model.get("filterType"), **part}) for part in conditions]
        return np.logical_and.reduce(parts) if model["operator"] == "AND" else np.logical_or.reduce(parts)
    kind = model.get("filterType") or _kind(column)
    if kind == "set":
        values = list(model["values"])
        return _holds_one(column, values) if is_listed(column.to_numpy()) else column.isin(values).to_numpy()
    type_ = str(model["type"])
    if type_ in ("blank", "notBlank"):
        listed = is_listed(column.to_numpy())
        blank = (column.map(len) == 0 if listed else column.isna() | (column == "")).to_numpy()
        return blank if type_ == "blank" else ~blank
    if kind == "boolean" or type_ in ("true", "false"):
        return column.to_numpy(bool) == (type_ == "true")
    operations = _NUMBER if kind == "number" else _TEXT
    if type_ not in operations:
        raise InvalidInputError(f"There is no {kind} filter {type_!r}. There are: {', '.join(operations)}.")
    if kind == "number":
        low, high = float(model["filter"]), float(model.get("filterTo") or 0)
        return operations[type_](column.to_numpy(float), low, high)
    texts = [(text if isinstance(text, str) else "\n".join(map(str, text))).casefold() for text in column]
    wanted = str(model["filter"]).casefold()
    return np.array([operations[type_](text, wanted) for text in texts], bool)


def _holds_one(column: "pd.Series", wanted: Iterable[Any]) -> np.ndarray:
    """Of a column of lists: which hold one of the values."""
    values = set(wanted)
    return np.array([not values.isdisjoint(own) for own in column], bool)


def _kind(column: "pd.Series") -> str:
    if column.dtype == bool:
        return "boolean"
    return "number" if column.dtype.kind in "iuf" else "text"


_NUMBER: dict[str, Callable[..., Any]] = {
    "equals": lambda values, low, high: values == low,
    "notEqual": lambda values, low, high: values != low,
    "lessThan": lambda values, low, high: values < low,
    "lessThanOrEqual": lambda values, low, high: values <= low,
    "greaterThan": lambda values, low, high: values > low,
    "greaterThanOrEqual": lambda values, low, high: values >= low,
    "inRange": lambda values, low, high: (values >= low) & (values <= high),
}
_TEXT: dict[str, Callable[..., Any]] = {
    "contains": lambda text, wanted: wanted in text,
    "notContains": lambda text, wanted: wanted not in text,
    "equals": lambda text, wanted: text == wanted,
    "notEqual": lambda text, wanted: text != wanted,
    "startsWith": lambda text, wanted: text.startswith(wanted),
    "endsWith": lambda text, wanted: text.endswith(wanted),
}
