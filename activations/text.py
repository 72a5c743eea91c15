"""Documents from files: parquet, JSON lines, plain text, or a streamed Hugging Face data set.

1. Every path is opened and checked when its source is made ready (`TextSource.check`): missing files and columns,
   lines that are no JSON, bytes that are no UTF-8 are answered before anything is computed or written.
2. A source is a list of *blocks* (a parquet row group, 4,096 lines, 64 text files) that know how many documents they
   hold, so that a resumed run skips what it has without reading it.
3. In file order the blocks follow each other. With `shuffle_seed` the blocks are put in random order and taken eight
   at a time; the documents of such a pool are shuffled. That is a full shuffle for up to eight blocks, and memory is
   bounded by the pool for any number of them.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from activations.errors import InvalidInputError, UnknownNameError
from activations.spec import fingerprint_of

__all__ = ["Document", "TextSource", "is_held_out"]

HF_PREFIX = "hf://"
LINES_PER_BLOCK = 4096
FILES_PER_BLOCK = 64
BLOCKS_PER_POOL = 8
HF_SHUFFLE_BUFFER = 10_000
KNOWN_COLUMNS = ("title", "source", "language", "license")
MAX_EXTRA_LENGTH = 1000
PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass(frozen=True)
class Document:
    """A text and where it comes from."""

    text: str
    title: str = ""
    source: str = ""
    """The collection that it belongs to; where the data says nothing, the file's stem or a text file's folder."""
    language: str = ""
    license: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further columns with short values, as text."""


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for metrics: `crc32(title before '#') % 10 == 0`, about one in ten.

    The parts of a book (`henry_vi.txt#9`) and the translations of a page share a title, so they fall on one side.
    A document without a title goes by its first 200 characters.
    """
    key = document.title.split("#", 1)[0] or document.text[:200]
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % 10 == 0


class _Block(NamedTuple):
    """Some documents of a source that are loaded together."""

    n_documents: int
    load: Callable[[], list[Document]]


@dataclass(frozen=True)
class TextSource:
    """Documents in a fixed order.

    Args:
        paths: files, folders (all files in them whose kind is known, by name) or `hf://NAME[:CONFIG][@SPLIT]`.
            A single path may be given bare.
        text_column: the column (parquet, data set) or key (JSON lines) that holds the text.
        shuffle_seed: shuffle the documents with this seed; None keeps the order of the files.
        max_document_tokens: use only the first so many tokens of each document.
    """

    paths: Sequence[str | Path] | str | Path
    text_column: str = "text"
    shuffle_seed: int | None = None
    max_document_tokens: int | None = None

    def __post_init__(self) -> None:
        paths = (self.paths,) if isinstance(self.paths, str | Path) else tuple(self.paths)
        object.__setattr__(self, "paths", tuple(path if _is_hf(path) else Path(path) for path in paths))
        if not paths:
            raise InvalidInputError("No text was given: expected at least one parquet, jsonl or txt file.")
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise InvalidInputError(f"max_document_tokens is {self.max_document_tokens}; expected at least 1.")
        if len(paths) > 1 and any(_is_hf(path) for path in paths):
            raise InvalidInputError("A streamed data set cannot be mixed with other paths; capture them one by one.")

    def check(self) -> None:
        """Open every file and look for what is wrong with it.

        Raises:
            UnknownNameError: a file, or the text column of one, does not exist.
            InvalidInputError: a file of unknown kind, a column that is no text, a line that is no JSON object
                (file and line are named), bytes that are no UTF-8.
        """
        if self._hf_name is not None:
            next(iter(self._hf_documents(0)), None)
        else:
            _ = self._blocks

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the files' names and content and all settings.

        A streamed data set is known by its address only: a change of its content goes unnoticed.
        """
        return fingerprint_of({"files": self._content, **self.settings})

    @property
    def settings(self) -> dict[str, Any]:
        """What the fingerprint holds besides content (JSON-able)."""
        return {
            "text_column": self.text_column,
            "shuffle_seed": self.shuffle_seed,
            "max_document_tokens": self.max_document_tokens,
        }

    @property
    def names(self) -> list[str]:
        """The files' names (of a text file with its folder's name), or the data set's address."""
        return [self._hf_name] if self._hf_name is not None else [_name_of(file) for file in self._files]

    def documents(self, start: int = 0) -> Iterator[Document]:
        """All documents in order, empty ones too, from ordinal `start`."""
        if self._hf_name is not None:
            yield from self._hf_documents(start)
            return
        for number, pool in enumerate(self._pools()):
            size = sum(block.n_documents for block in pool)
            if start < size:
                order = np.arange(size)
                if self.shuffle_seed is not None:
                    order = np.random.default_rng([self.shuffle_seed, number]).permutation(size)
                documents = [document for block in pool for document in block.load()]
                yield from (documents[index] for index in order[start:])
            start = max(0, start - size)

    @property
    def _hf_name(self) -> str | None:
        path = self.paths[0]  # type: ignore[index]  # a tuple after __post_init__
        return str(path) if _is_hf(path) else None

    @cached_property
    def _files(self) -> list[Path]:
        files: list[Path] = []
        for path in map(Path, self.paths):  # type: ignore[arg-type]
            if path.is_dir():
                known = PARQUET_SUFFIXES + JSONL_SUFFIXES + TEXT_SUFFIXES
                inside = sorted(child for child in path.rglob("*") if child.suffix.lower() in known)
                if not inside:
                    raise InvalidInputError(f"The folder {path} holds no parquet, jsonl or txt file.")
                files += inside
            elif path.is_file():
                files.append(path)
            else:
                siblings = [str(child) for child in path.parent.iterdir()] if path.parent.is_dir() else []
                raise UnknownNameError("file", str(path), siblings)
        return files

    @cached_property
    def _content(self) -> list[list[str]]:
        if self._hf_name is not None:
            return [[self._hf_name, ""]]
        return [[_name_of(file), _digest(file)] for file in self._files]

    @cached_property
    def _blocks(self) -> list[_Block]:
        blocks: list[_Block] = []
        plain: list[Path] = []
        for file in self._files:
            suffix = file.suffix.lower()
            if suffix in TEXT_SUFFIXES:
                plain.append(file)
                continue
            blocks += _text_blocks(plain)
            plain = []
            if suffix in PARQUET_SUFFIXES:
                blocks += _parquet_blocks(file, self.text_column)
            elif suffix in JSONL_SUFFIXES:
                blocks += _jsonl_blocks(file, self.text_column)
            else:
                known = ", ".join(PARQUET_SUFFIXES + JSONL_SUFFIXES + TEXT_SUFFIXES)
                raise InvalidInputError(f"{file} is of an unknown kind; expected one of {known}.")
        return blocks + _text_blocks(plain)

    def _pools(self) -> Iterator[list[_Block]]:
        if self.shuffle_seed is None:
            yield from ([block] for block in self._blocks)
            return
        order = np.random.default_rng(self.shuffle_seed).permutation(len(self._blocks))
        for first in range(0, len(order), BLOCKS_PER_POOL):
            yield [self._blocks[index] for index in order[first : first + BLOCKS_PER_POOL]]

    def _hf_documents(self, start: int) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InvalidInputError(
                f"{self._hf_name} needs the package datasets, which is not installed. "
                "Install it with: pip install datasets"
            ) from error
        name, _, split = str(self._hf_name).removeprefix(HF_PREFIX).partition("@")
        name, _, config = name.partition(":")
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        if self.shuffle_seed is not None:
            stream = stream.shuffle(seed=self.shuffle_seed, buffer_size=HF_SHUFFLE_BUFFER)
        for row in islice(stream, start, None):
            if self.text_column not in row:
                raise UnknownNameError("text column", self.text_column, row)
            yield _document(row, self.text_column, name)


def _is_hf(path: str | Path) -> bool:
    return isinstance(path, str) and path.startswith(HF_PREFIX)


def _name_of(file: Path) -> str:
    """What of a file's address its documents carry, so that a moved file is the same text."""
    return f"{file.resolve().parent.name}/{file.name}" if file.suffix.lower() in TEXT_SUFFIXES else file.name


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _document(row: Mapping[str, Any], text_column: str, default_source: str) -> Document:
    known = {name: str(row[name]) for name in KNOWN_COLUMNS if row.get(name) is not None}
    known.setdefault("source", default_source)
    extra = {
        str(name): str(value)
        for name, value in row.items()
        if name != text_column
        and name not in KNOWN_COLUMNS
        and isinstance(value, str | int | float | bool)
        and len(str(value)) <= MAX_EXTRA_LENGTH
    }
    return Document(text=row[text_column] or "", extra=extra, **known)


def _text_blocks(files: Sequence[Path]) -> list[_Block]:
    for file in files:
        try:
            file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{file} is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    pieces = [files[first : first + FILES_PER_BLOCK] for first in range(0, len(files), FILES_PER_BLOCK)]
    return [_Block(len(piece), partial(_load_text, piece)) for piece in pieces]


def _load_text(files: Sequence[Path]) -> list[Document]:
    return [Document(file.read_text("utf-8-sig"), file.stem, file.resolve().parent.name) for file in files]


def _jsonl_blocks(file: Path, text_column: str) -> list[_Block]:
    blocks = []
    offset = line_number = 0
    with open(file, "rb") as stream:
        while lines := list(islice(stream, LINES_PER_BLOCK)):
            load = partial(_load_jsonl, file, text_column, offset, line_number, len(lines))
            _parse_lines(lines, file, text_column, line_number)
            blocks.append(_Block(len(lines), load))
            offset += sum(map(len, lines))
            line_number += len(lines)
    return blocks


def _load_jsonl(file: Path, text_column: str, offset: int, first_line: int, n_lines: int) -> list[Document]:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return _parse_lines(islice(stream, n_lines), file, text_column, first_line)


def _parse_lines(lines: Iterable[bytes], file: Path, text_column: str, first_line: int) -> list[Document]:
    documents = []
    for number, line in enumerate(lines, start=first_line + 1):
        if not line.strip():
            documents.append(Document(""))
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInputError(f"{file}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InvalidInputError(f"{file}, line {number} holds {type(row).__name__}; expected a JSON object.")
        if text_column not in row:
            raise UnknownNameError("text column", text_column, row, hint=f"({file}, line {number})")
        if not isinstance(row[text_column], str | None):
            raise InvalidInputError(
                f"{file}, line {number}: {text_column!r} holds {type(row[text_column]).__name__}; expected a string."
            )
        documents.append(_document(row, text_column, file.stem))
    return documents


def _parquet_blocks(file: Path, text_column: str) -> list[_Block]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata, schema = parquet.read_metadata(file), parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{file} cannot be read as parquet: {error}") from error
    if text_column not in schema.names:
        raise UnknownNameError("text column", text_column, schema.names, hint=f"({file})")
    kind = schema.field(text_column).type
    if not _is_text(kind):
        raise InvalidInputError(f"{file}: the column {text_column!r} holds {kind}; expected text.")
    scalars = [field.name for field in schema if _is_text(field.type) or pyarrow.types.is_primitive(field.type)]
    return [
        _Block(metadata.row_group(group).num_rows, partial(_load_parquet, file, text_column, scalars, group))
        for group in range(metadata.num_row_groups)
    ]


def _is_text(kind: Any) -> bool:
    """Whether an arrow type is a string, dictionary-encoded or not."""
    import pyarrow

    kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _load_parquet(file: Path, text_column: str, columns: Sequence[str], group: int) -> list[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.ParquetFile(file).read_row_group(group, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{file}, row group {group} cannot be read: {error}") from error
    return [_document(row, text_column, file.stem) for row in rows]
