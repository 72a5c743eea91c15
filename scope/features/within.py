"""Which rows are of a language, a source, a document, a role and a kind of content: what examples are taken from."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from scope.errors import UnknownNameError
from scope.features.layout import SPOKEN

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["rows_within"]


def rows_within(
    reader: "IndexReader", document: int | None = None, **names: str | None
) -> Callable[[np.ndarray], np.ndarray]:
    """What says of row ids whether they are of all that is given, bool `(n,)`.

    Args:
        reader: the index.
        document: number of a document.
        names: by "language", "source", "role" and "kind"; None where it does not matter.

    Raises:
        UnknownNameError, OutOfRangeError: the index does not have it.
        InvalidInputError: a role or a kind is given, and the text is no chats.
    """
    given = {group: name for group, name in names.items() if name is not None}
    for group, name in given.items():
        if group in SPOKEN:
            reader.require_spoken(group)
        known = [one for one, _ in reader.manifest[f"{group}s"]]
        if name not in known:
            raise UnknownNameError(group, name, known)
    windows = reader.windows_of(given.get("language"), given.get("source"))
    if document is not None:
        reader.document_info(document)
        windows &= reader.windows.document == document
    codes = {group: SPOKEN[group].index(name) for group, name in given.items() if group in SPOKEN}

    def within(rows: np.ndarray) -> np.ndarray:
        kept = windows[reader.windows.place[reader.row_column("sequence").take(rows)]]
        for column, code in codes.items():
            kept &= reader.row_column(column).take(rows) == code
        return kept

    return within
