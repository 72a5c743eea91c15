"""The text of an index: its tables, and how many rows it has of each language, source and token."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scope.features.layout import SPOKEN
from scope.features.statistics import N_POSITION_BINS, position_bins

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["UNKNOWN", "RowCounts", "Texts", "count_rows", "read_texts"]

CHUNK_ROWS = 2**20
UNKNOWN = "unknown"
"""Language and source of a document that names none."""


class Texts(NamedTuple):
    """The text's tables and what rows have to do with them."""

    documents: "pd.DataFrame"
    sequences: "pd.DataFrame"
    languages: tuple[str, ...]
    sources: tuple[str, ...]
    language_of: np.ndarray
    """Language number by sequence."""
    source_of: np.ndarray
    document_of: np.ndarray
    """Document by sequence."""


class RowCounts(NamedTuple):
    """How many rows are of what; those on which no feature may fire are left out but where it is said."""

    by_language: np.ndarray
    by_source: np.ndarray
    by_token: np.ndarray
    """Of all rows."""
    by_token_indexed: np.ndarray
    by_position: np.ndarray
    """By `position_bins`."""
    by_spoken: Mapping[str, np.ndarray]
    """Of chats by "role" and "kind", of media by "modality": rows of each code."""


def read_texts(source: Any, n_rows: int) -> Texts:
    """The tables of a source, cut to its first `n_rows` rows; a document without language or source gets "unknown"."""
    sequences = source.sequences()
    sequences = sequences[sequences["start_row"] < n_rows].reset_index(drop=True)
    sequences["n_rows"] = sequences["n_rows"].clip(upper=n_rows - sequences["start_row"])
    documents = source.documents()
    documents = documents[documents["document"].isin(sequences["document"])].reset_index(drop=True)
    languages, language_of = _numbered(documents, sequences, "language")
    sources, source_of = _numbered(documents, sequences, "source")
    document_of = np.zeros(len(language_of), np.int64)
    document_of[sequences["sequence"]] = sequences["document"]
    return Texts(documents, sequences, languages, sources, language_of, source_of, document_of)


def _numbered(documents: "pd.DataFrame", sequences: "pd.DataFrame", column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The values of a column of the documents, and by sequence which of them it has."""
    import pandas as pd

    documents[column] = documents[column].fillna("").replace("", UNKNOWN).astype(str)
    codes, names = pd.factorize(documents[column], sort=True)
    of_document = np.zeros(int(documents["document"].max()) + 1, np.int64)
    of_document[documents["document"]] = codes
    of_sequence = np.zeros(int(sequences["sequence"].max()) + 1, np.int64)
    of_sequence[sequences["sequence"]] = of_document[sequences["document"]]
    return tuple(map(str, names)), of_sequence


def count_rows(columns: Mapping[str, np.ndarray], texts: Texts, excluded: int) -> RowCounts:
    """Count rows, given the columns of `rows/`; rows with one of the `excluded` flags are not indexed."""
    by_language = np.zeros(len(texts.languages), np.int64)
    by_source = np.zeros(len(texts.sources), np.int64)
    by_token = np.zeros(1 + int(columns["token_id"].max()), np.int64)
    by_token_indexed, by_position = np.zeros_like(by_token), np.zeros(N_POSITION_BINS, np.int64)
    by_spoken = {name: np.zeros(len(names), np.int64) for name, names in SPOKEN.items() if name in columns}
    for start in range(0, len(columns["flags"]), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        indexed = columns["flags"][chunk] & excluded == 0
        sequence = columns["sequence"][chunk][indexed]
        by_language += np.bincount(texts.language_of[sequence], minlength=len(by_language))
        by_source += np.bincount(texts.source_of[sequence], minlength=len(by_source))
        by_token += np.bincount(columns["token_id"][chunk], minlength=len(by_token))
        by_token_indexed += np.bincount(columns["token_id"][chunk][indexed], minlength=len(by_token))
        bins = position_bins(columns["position"][chunk][indexed])
        by_position += np.bincount(bins, minlength=N_POSITION_BINS)
        for name, counts in by_spoken.items():
            counts += np.bincount(columns[name][chunk][indexed], minlength=len(counts))
    return RowCounts(by_language, by_source, by_token, by_token_indexed, by_position, by_spoken)
