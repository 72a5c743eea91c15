"""Token strings, kept in the index so that it shows text without the store and the model.

Each token is stored as it reads by itself. A token that is only part of a character (byte fallback, byte-level BPE) is
stored as its bytes, `<0xE3>`; in a text it shows the whole character and the share of it that the token is.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.errors import InvalidInputError, UnknownNameError
from scope.models.token_text import BYTE_TOKEN, texts_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

__all__ = ["Vocabulary", "vocabulary_table"]


def vocabulary_table(token_ids: np.ndarray, rows: np.ndarray, model: Any) -> "pd.DataFrame":
    """The table of an index's tokens.

    Args:
        token_ids: ids, ascending, each once.
        rows: how many indexed rows hold each of them.
        model: gives the strings; None leaves ids in angle brackets.
    Returns:
        Columns token_id, text, special, n_rows.
    """
    import pandas as pd

    if model is None:
        texts: Sequence[str] = [f"<{token}>" for token in token_ids]
        special = np.zeros(len(token_ids), bool)
    else:
        texts = model.vocabulary_strings(token_ids.tolist())
        special = np.isin(token_ids, sorted(model.special_token_ids))
    return pd.DataFrame({"token_id": token_ids.astype(np.int32), "text": texts, "special": special, "n_rows": rows})


class Vocabulary:
    """Looks up token strings by id. Safe across threads."""

    def __init__(self, table: "pd.DataFrame") -> None:
        self.table = table
        self.token_ids = table["token_id"].to_numpy(np.int64)
        self.n_rows = table["n_rows"].to_numpy(np.int64)
        self._texts = table["text"].to_numpy(object)
        self._special = table["special"].to_numpy(bool)
        split = table["text"].str.contains(BYTE_TOKEN.pattern.replace("(", "(?:"), regex=True).to_numpy(bool)
        self._split = split & ~self._special

    def strings(self, token_ids: np.ndarray) -> list[str]:
        """Each token by itself."""
        return list(self._texts[self._places(token_ids)])

    def display(self, token_ids: np.ndarray) -> list[str]:
        """Each token of a text in the light of its neighbours; the share of a character follows it: "é ¹⁄₂"."""
        places = self._places(token_ids)
        texts = self._texts[places]
        split = np.flatnonzero(self._split[places])
        if len(split):
            # Characters take at most four tokens, so each run of split tokens can be read on its own.
            for run in np.split(split, np.flatnonzero(np.diff(split) > 1) + 1):
                texts[run] = [text.display for text in self._read(places[run])]
        return list(texts)

    def text(self, token_ids: np.ndarray) -> str:
        """What the tokens read together, without special tokens."""
        places = self._places(token_ids)
        return "".join(text.new_text for text in self._read(places[~self._special[places]]))

    @cached_property
    def _arrow(self) -> "pyarrow.Array":
        import pyarrow

        return pyarrow.array(self._texts, pyarrow.large_string())

    @cached_property
    def _folded(self) -> "pyarrow.Array":
        import pyarrow

        return pyarrow.array([text.casefold() for text in self._texts], pyarrow.large_string())

    def matching(self, text: str) -> np.ndarray:
        """Ids of the tokens that contain a text, case ignored, ascending."""
        from pyarrow import compute

        found = compute.match_substring(self._folded, text.casefold())
        ids: np.ndarray = self.token_ids[found.to_numpy(zero_copy_only=False)]
        return ids

    def fitting(self, expression: str) -> np.ndarray:
        """Ids of the tokens in whose text a regular expression has a match, ascending.

        Expressions are RE2's, whose time grows with the text alone, so that nobody can ask for one that never ends:
        neither look-around nor back references, \\d and \\w are ASCII, \\p{L} is any letter, (?i) ignores case.

        Raises:
            InvalidInputError: the expression cannot be read.
        """
        from pyarrow import ArrowInvalid, compute

        try:
            found = compute.match_substring_regex(self._arrow, expression)
        except ArrowInvalid as error:
            raise InvalidInputError(
                f"The regular expression {expression!r} cannot be read ({error}). It follows RE2's syntax: there is no "
                "look-around and no back reference."
            ) from error
        ids: np.ndarray = self.token_ids[found.to_numpy(zero_copy_only=False)]
        return ids

    def ids_of(self, text: str) -> np.ndarray:
        """Ids of the tokens that read exactly so, ascending; mostly one.

        Raises:
            UnknownNameError: there is none; tokens that differ in case or spaces are suggested.
        """
        found = np.flatnonzero(self._texts == text)
        if not len(found):
            bare = text.strip().casefold()
            near = [own for own in self._texts if own.strip().casefold() == bare] if bare else []
            hint = "Spaces count: a word inside a sentence begins with one." if not near else ""
            raise UnknownNameError("token", text, map(repr, near), hint=hint)
        ids: np.ndarray = self.token_ids[found]
        return ids

    def rows_of(self, token_ids: np.ndarray) -> np.ndarray:
        """How many indexed rows hold each token."""
        return self.n_rows[self._places(token_ids)]

    def _places(self, token_ids: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.token_ids, token_ids)
        assert np.array_equal(self.token_ids[places], token_ids), "a token id that the index has no string for"
        return places

    def _read(self, places: np.ndarray) -> list[Any]:
        pieces = [_bytes_of(str(self._texts[p])) if self._split[p] else str(self._texts[p]).encode() for p in places]
        return texts_of(self.token_ids[places].tolist(), pieces, frozenset())


def _bytes_of(text: str) -> bytes:
    """The bytes of a token that is stored with some of them spelled out."""
    parts = BYTE_TOKEN.split(text)  # text, two hex digits, text, …
    return b"".join(bytes([int(part, 16)]) if place % 2 else part.encode() for place, part in enumerate(parts))
