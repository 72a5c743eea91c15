"""The text of an excerpt: what its examples read.

An excerpt says where in the text its examples are, and no more; so it can be shipped beside a text that is there
already. The text's tokens come either from the index that the excerpt is made from, or later from the text and the
model's tokenizer (`read_text`). Either way they are compared with the digest in the excerpt's manifest, so that
another text, or another tokenizer, is never taken for its own.

    text/tokens.int32          token ids of all documents, one after the other, without BOS
    text/documents.parquet     title, source, language
    text/vocabulary.parquet    token_id, text, special, n_rows (how often the token stands in the text)
    text/digests.json          of the two tables; written last: a text exists when this does
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from activations.manifest import has_its_digest, with_digest, write_atomically
from scope.errors import IntegrityError, MismatchError
from scope.features.reader import DocumentInfo
from scope.features.texts import UNKNOWN
from scope.features.vocabulary import Vocabulary, vocabulary_table

if TYPE_CHECKING:
    import pandas as pd

    from activations.text import TextSource

__all__ = ["ExcerptText", "digest_of_tokens", "read_text", "write_text"]

FOLDER = "text"
TOKENS, DIGESTS = "tokens.int32", "digests.json"
TABLES = ("documents", "vocabulary")
TOGETHER = 64
"""Documents that are tokenised at once."""

Progress = Callable[[int, int | None], None]


def digest_of_tokens(documents: Iterable[np.ndarray]) -> str:
    """xxh3-128 (hex) of the token ids of some documents, one after the other, as int32."""
    digest = xxhash.xxh3_128()
    for tokens in documents:
        digest.update(np.ascontiguousarray(tokens, "<i4").data)
    return digest.hexdigest()


def write_text(folder: Path, tokens: np.ndarray, documents: "pd.DataFrame", vocabulary: "pd.DataFrame") -> None:
    """Write the text of the excerpt in a folder.

    Args:
        folder: the excerpt.
        tokens: int32 `(n_tokens,)`.
        documents: columns title, source, language, in the order of the tokens.
        vocabulary: of `vocabulary_table`, with every token of the text.
    """
    inside = folder / FOLDER
    inside.mkdir(exist_ok=True)
    (inside / DIGESTS).unlink(missing_ok=True)
    write_atomically(inside / TOKENS, np.ascontiguousarray(tokens, "<i4").tobytes())
    digests = {}
    for name, table in zip(TABLES, (documents, vocabulary), strict=True):
        part = inside / f"{name}.part"
        table.to_parquet(part, index=False, compression="zstd")
        digests[name] = xxhash.xxh3_128_hexdigest(part.read_bytes())
        os.replace(part, _table_path(inside, name))
    write_atomically(inside / DIGESTS, json.dumps(with_digest(digests)).encode())


def read_text(
    folder: Path,
    described: Mapping[str, Any],
    lengths: Sequence[int],
    text: "TextSource",
    model: Any,
    progress: Progress | None = None,
) -> None:
    """Tokenise a text and write it into the excerpt in a folder.

    Args:
        folder: the excerpt.
        described: the entry `text` of its manifest.
        lengths: tokens of each of its documents.
        text: the documents, in the order that the index had them in.
        model: whose tokenizer the index had.
        progress: called with (documents read, documents in all).
    Raises:
        MismatchError: the model has another tokenizer, or this is not the excerpt's text.
    """
    import pandas as pd

    own = model.identity.tokenizer_hash
    if own != described["tokenizer_hash"]:
        raise MismatchError(
            f"{model.name} has the tokenizer {own}; {folder} is of a text in tokens of {described['tokenizer_hash']}. "
            f"Give the model {described['model']}."
        )
    written = (document for document in text.documents() if document.text.strip())
    tokens: list[np.ndarray] = []
    about: list[tuple[str, ...]] = []
    while len(tokens) < len(lengths) and (some := list(islice(written, TOGETHER))):
        encoded = model.encode_documents([document.text for document in some])
        # An index counts the documents that have tokens, and as many of these as were captured.
        for document, ids in zip(some, encoded, strict=True):
            if len(ids) and len(tokens) < len(lengths):
                tokens.append(ids[: lengths[len(tokens)]])
                about.append((document.title, document.source or UNKNOWN, document.language or UNKNOWN))
        if progress is not None:
            progress(len(tokens), len(lengths))
    if digest_of_tokens(tokens) != described["xxh3_128"]:
        raise MismatchError(
            f"{', '.join(text.names)} is not the text of {folder}, or not in its order: the excerpt is of "
            f"{len(lengths):,} documents with {described['n_tokens']:,} tokens. Give that text, with the same shuffle "
            "seed."
        )
    together = np.concatenate(tokens).astype(np.int32)
    ids, counts = np.unique(together, return_counts=True)
    documents = pd.DataFrame(about, columns=list(DocumentInfo._fields))
    write_text(folder, together, documents, vocabulary_table(ids, counts, model))


class ExcerptText:
    """The text in an excerpt's folder. Safe across threads.

    Args:
        folder: the excerpt.
        described: the entry `text` of its manifest.
    Raises:
        IntegrityError: it cannot be read, or is not the text of the excerpt (raised on first use).
    """

    def __init__(self, folder: Path, described: Mapping[str, Any]) -> None:
        self._folder = folder / FOLDER
        self._described = described

    @property
    def is_there(self) -> bool:
        """Whether the excerpt has its text by now."""
        return (self._folder / DIGESTS).is_file()

    parts = tuple(f"{FOLDER}/{name}" for name in (TOKENS, *map("{}.parquet".format, TABLES)))
    """Its files, by their path in the excerpt."""

    def check(self, part: str) -> None:
        """Compare one of `parts` with its digest; raises IntegrityError."""
        name = part.removeprefix(f"{FOLDER}/").removesuffix(".parquet")
        if name == TOKENS:
            self._read_tokens()
        else:
            self._table(name)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 `(n_tokens,)`, memory-mapped."""
        return self._read_tokens()

    def _read_tokens(self) -> np.ndarray:
        path = self._folder / TOKENS
        try:
            tokens = np.asarray(np.memmap(path, "<i4", "r"))
        except (OSError, ValueError) as error:
            raise IntegrityError(self._fault(path)) from error
        if digest_of_tokens([tokens]) != self._described["xxh3_128"]:
            raise IntegrityError(self._fault(path))
        return tokens

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The strings of its tokens."""
        return Vocabulary(self._table("vocabulary"))

    @cached_property
    def documents(self) -> list[DocumentInfo]:
        """Where each document is from."""
        table = self._table("documents")
        columns = (table[name].fillna("").astype(str) for name in DocumentInfo._fields)
        return [DocumentInfo(*row) for row in zip(*columns, strict=True)]

    def display(self, start: int, stop: int) -> list[str]:
        """Display strings of tokens `start` to `stop`, of one document, in the light of each other."""
        return self.vocabulary.display(self.tokens[start:stop])

    def _table(self, name: str) -> "pd.DataFrame":
        import pyarrow
        from pyarrow import parquet

        path = _table_path(self._folder, name)
        try:
            digests = json.loads((self._folder / DIGESTS).read_text())
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            raise IntegrityError(self._fault(path)) from error
        if not has_its_digest(digests) or digests.get(name) != xxhash.xxh3_128_hexdigest(content):
            raise IntegrityError(self._fault(path))
        opened = parquet.ParquetFile(pyarrow.BufferReader(content), pre_buffer=False)
        return opened.read(use_threads=False).to_pandas()

    def _fault(self, path: Path) -> str:
        return f"{path} is missing or damaged. Delete {self._folder} and let the text be read again."


def _table_path(inside: Path, name: str) -> Path:
    return inside / f"{name}.parquet"
