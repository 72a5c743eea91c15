"""A whole document with one feature's strength on each token, read a part at a time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scope.errors import OutOfRangeError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["DOCUMENT_PART", "DocumentPart", "DocumentRun", "document_part"]

DOCUMENT_PART = 768
"""Tokens that are read at a time."""


@dataclass(frozen=True)
class DocumentRun:
    """Tokens of a document that follow each other in the index: at most one window of the text."""

    start_row: int
    position: int
    """Place of the first token in the document, in tokens, without BOS."""
    tokens: list[str]
    values: list[float]
    """The feature's strength on each; 0 where it does not fire."""


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document with one feature's strength on each token."""

    document: int
    origin: str
    """Title, source and language."""
    n_tokens: int
    """Of the whole document."""
    start: int
    stop: int
    """Which of them are here."""
    runs: list[DocumentRun]


def document_part(
    index: "FeatureIndex",
    feature: int,
    document: int,
    *,
    start: int | None = None,
    before: int | None = None,
    around: int | None = None,
) -> DocumentPart:
    """`DOCUMENT_PART` tokens of a document: from its token `start` on, those `before` one, or with the row `around` in
    their middle; its beginning where none of them is given.

    Raises:
        OutOfRangeError: there is no such document, or it does not have this token or row.
    """
    rows = index.document_rows(document)
    first, stop = _span(rows, document, start, before, around)
    part = rows[first:stop]
    breaks = np.flatnonzero(np.diff(part) != 1) + 1
    runs = [_run(index, feature, document, int(own[0]), int(own[-1]) + 1) for own in np.split(part, breaks)]
    about = index.documents[index.documents["document"] == document].iloc[0]
    origin = " · ".join(str(about[name]) for name in ("title", "source", "language") if about[name])
    return DocumentPart(document, origin, len(rows), first, stop, runs)


def _span(
    rows: np.ndarray, document: int, start: int | None, before: int | None, around: int | None
) -> tuple[int, int]:
    if around is not None:
        place = int(np.searchsorted(rows, around))
        if place == len(rows) or rows[place] != around:
            raise OutOfRangeError(f"Row {around} is not in document {document}.")
        start = max(0, place - DOCUMENT_PART // 2)
    if before is not None:
        first, stop = max(0, before - DOCUMENT_PART), before
    else:
        first = start or 0
        stop = min(first + DOCUMENT_PART, len(rows))
    if not 0 <= first < stop <= len(rows):
        last = len(rows) - 1
        raise OutOfRangeError(f"Document {document} has tokens 0 to {last:,}; there are none from {first} to {stop}.")
    return first, stop


def _run(index: "FeatureIndex", feature: int, document: int, start: int, stop: int) -> DocumentRun:
    tokens = index.tokens(start, stop)
    offsets = index.sequences[index.sequences["document"] == document].set_index("sequence")["document_offset"]
    offset = int(offsets[int(tokens["sequence"].iloc[0])])
    has_bos = index.model_info.get("bos_token_id") is not None
    values = index.values_on(feature, start, stop)
    return DocumentRun(
        start,
        offset + int(tokens["position"].iloc[0]) - int(has_bos),
        tokens["token"].astype(str).tolist(),
        [float(f"{value:.5g}") for value in values.tolist()],
    )
