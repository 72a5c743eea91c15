"""Grids of an index as CSV and parquet: the feature table with labels, a query's rows, firings, labels.

CSV is read by spreadsheets, which run a cell that begins with = + - @ or a control character as a formula. Such a text
gets an apostrophe in front (as OWASP's "CSV injection" advises: a spreadsheet hides it and shows the rest as text);
numbers stay numbers. Parquet has every text as it is.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["csv_parts", "feature_grid", "firings_grid", "parquet_bytes", "safe_cells", "write_grid"]

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
ROWS_A_PART = 5_000
LABEL_TEXTS = ("label", "label_source", "notes")


def feature_grid(index: "FeatureIndex", features: Sequence[int] | None = None) -> "pd.DataFrame":
    """The feature table with label, label_source, notes, starred and lists, of all or some features in their order."""
    table = index.table if features is None else index.table.iloc[[index.feature(f).id for f in features]]
    return with_labels(index, table)


def with_labels(index: "FeatureIndex", table: "pd.DataFrame") -> "pd.DataFrame":
    """A table with a column `feature`, joined with what is said of each."""
    said = index.labels.table().set_index("feature")
    joined = table.reset_index(drop=True).drop(columns=[name for name in said.columns if name in table])
    features = joined["feature"]
    for name in LABEL_TEXTS:
        joined[name] = features.map(said[name]).fillna("").astype("str")
    joined["starred"] = features.isin(said.index[said["starred"]])
    lists = said["lists"].to_dict()
    joined["lists"] = [lists.get(feature, []) for feature in features]
    return joined


def firings_grid(
    index: "FeatureIndex", features: Sequence[int], limit_per_feature: int | None = None
) -> "pd.DataFrame":
    """Firings of some features with token and provenance: `FeatureIndex.activations`."""
    return index.activations(features, limit_per_feature)


def safe_cells(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with each text that a spreadsheet would run made harmless, and lists as JSON."""
    changed = {
        str(name): [_cell(value) for value in column]
        for name, column in table.items()
        if len(column) and column.dtype.kind not in "biufcmM"
    }
    return table.assign(**changed).rename(columns=_cell)


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple, np.ndarray)):
        return json.dumps(np.asarray(value).tolist() if isinstance(value, np.ndarray) else value, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(FORMULA_SIGNS):
        return "'" + value
    return value


def csv_parts(table: "pd.DataFrame") -> Iterator[bytes]:
    """The table as CSV (UTF-8 with a byte order mark, so that spreadsheets read other scripts), part by part."""
    yield b"\xef\xbb\xbf"
    for start in range(0, max(len(table), 1), ROWS_A_PART):
        part = safe_cells(table.iloc[start : start + ROWS_A_PART])
        yield part.to_csv(index=False, header=start == 0, lineterminator="\r\n").encode()


def parquet_bytes(table: "pd.DataFrame") -> bytes:
    """The table as parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def write_grid(table: "pd.DataFrame", out: str | Path, format: str | None = None) -> int:
    """Write a table to a file. Returns the number of bytes.

    Args:
        format: "csv" or "parquet"; by default as the ending of `out` says.
    Raises:
        InvalidInputError: neither of them.
    """
    path = Path(out)
    format = format or path.suffix.removeprefix(".")
    if format not in ("csv", "parquet"):
        raise InvalidInputError(f"{path} would be of format {format!r}; expected csv or parquet.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for part in csv_parts(table) if format == "csv" else [parquet_bytes(table)]:
            file.write(part)
        return file.tell()
