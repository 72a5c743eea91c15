"""Documents, and the files that hold them: parquet, JSON lines and plain text, read block by block.

A document is a text, or a chat: a list of messages, and the tools that they may call (`activations.chats`). Both may
come with images and sounds (`activations.media`).

A *block* is some documents that are loaded together (a parquet row group, 4,096 lines, 64 text files); it knows how
many there are without loading them. Making the blocks of a file is also what checks it.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from activations.chats import Chat, Message, chat_from, cleaned, tools_from, without_nulls
from activations.errors import InvalidInputError, UnknownNameError
from activations.media import Medium, media_from, medium_from

__all__ = ["KNOWN_SUFFIXES", "Block", "Columns", "Document", "blocks_of", "document_from", "is_held_out", "name_of"]

LINES_PER_BLOCK = 4096
FILES_PER_BLOCK = 64
KNOWN_COLUMNS = ("title", "source", "language", "license")
TOOLS_COLUMN = "tools"
"""Where a chat's tools stand, beside its messages."""
MAX_EXTRA_LENGTH = 1000
PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")
KNOWN_SUFFIXES = PARQUET_SUFFIXES + JSONL_SUFFIXES + TEXT_SUFFIXES


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
    messages: tuple[Message, ...] = ()
    """The turns, where the document is a chat; its text is what they say, one after the other."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What these may call."""
    media: tuple[Medium, ...] = ()
    """Its images and sounds, in order."""

    @property
    def is_empty(self) -> bool:
        """Whether there is neither text nor a medium."""
        return not self.media and not self.text.strip()

    @property
    def chat(self) -> Chat:
        """The conversation."""
        return Chat(self.messages, self.tools)


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for metrics: `crc32(title before '#') % 10 == 0`, about one in ten.

    The parts of a book (`henry_vi.txt#9`) and the translations of a page share a title, so they fall on one side.
    A document without a title goes by its first 200 characters, and by the name of its first medium without any.
    """
    key = document.title.split("#", 1)[0] or document.text[:200]
    if not key and document.media:
        key = document.media[0].name
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % 10 == 0


class Columns(NamedTuple):
    """Which columns hold what."""

    text: str
    """The texts, or the chats."""
    chats: bool = False
    """Whether it holds lists of messages."""
    media: str | None = None
    """The column that lists media beside a text."""
    message_media: bool = False
    """Whether messages may hold media."""


class Block(NamedTuple):
    """Some documents of a source that are loaded together."""

    n_documents: int
    load: Callable[[], list[Document]]


def name_of(file: Path) -> str:
    """What of a file's address its documents carry, so that a moved file is the same text."""
    return f"{file.resolve().parent.name}/{file.name}" if file.suffix.lower() in TEXT_SUFFIXES else file.name


def blocks_of(files: Sequence[Path], columns: Columns) -> list[Block]:
    """The blocks of all files, in order.

    Raises:
        UnknownNameError: a file does not have the text column, or the one that lists media.
        InvalidInputError: a file of unknown kind, a column that is no text, a line that is no JSON object (file and
            line are named), bytes that are no UTF-8.
    """
    blocks: list[Block] = []
    plain: list[Path] = []
    for file in files:
        suffix = file.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            if columns.chats or columns.media:
                what = "chats" if columns.chats else "media"
                raise InvalidInputError(f"{file} is plain text; {what} are read from parquet and jsonl files.")
            plain.append(file)
            continue
        blocks += _text_blocks(plain)
        plain = []
        if suffix in PARQUET_SUFFIXES:
            blocks += _parquet_blocks(file, columns)
        elif suffix in JSONL_SUFFIXES:
            blocks += _jsonl_blocks(file, columns)
        else:
            raise InvalidInputError(f"{file} is of an unknown kind; expected one of {', '.join(KNOWN_SUFFIXES)}.")
    return blocks + _text_blocks(plain)


def document_from(row: Mapping[str, Any], columns: Columns, default_source: str, folder: Path | None) -> Document:
    """The document of a row; columns that have no place of their own go to `extra` if they are short.

    Args:
        row: values by column.
        columns: which of them hold what.
        default_source: where the row names none.
        folder: of the row's file, which paths of media are relative to.

    Raises:
        ValueError: the row's messages, tools or media are none.
    """
    known: dict[str, Any] = {name: cleaned(str(row[name])) for name in KNOWN_COLUMNS if row.get(name) is not None}
    known.setdefault("source", default_source)
    extra = {
        cleaned(str(name)): cleaned(str(value))
        for name, value in row.items()
        if name not in (columns.text, columns.media)
        and name not in KNOWN_COLUMNS
        and not (columns.chats and name == TOOLS_COLUMN)
        and isinstance(value, str | int | float | bool)
        and len(str(value)) <= MAX_EXTRA_LENGTH
    }
    if columns.chats:
        messages = chat_from(row[columns.text] or (), columns.message_media).messages
        text = "\n".join(message.text for message in messages)
        named = [part for message in messages for part in message.parts if part.kind != "text"]
        media = tuple(medium_from(part.value, folder, part.kind) for part in named)
        tools = tools_from(row.get(TOOLS_COLUMN))
        return Document(text=text, extra=extra, messages=messages, tools=tools, media=media, **known)
    media = () if columns.media is None else media_from(row.get(columns.media), folder)
    return Document(text=cleaned(row[columns.text] or ""), extra=extra, media=media, **known)


def _text_blocks(files: Sequence[Path]) -> list[Block]:
    for file in files:
        try:
            file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{file} is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    pieces = [files[first : first + FILES_PER_BLOCK] for first in range(0, len(files), FILES_PER_BLOCK)]
    return [Block(len(piece), partial(_load_text, piece)) for piece in pieces]


def _load_text(files: Sequence[Path]) -> list[Document]:
    return [Document(file.read_text("utf-8-sig"), file.stem, file.resolve().parent.name) for file in files]


def _jsonl_blocks(file: Path, columns: Columns) -> list[Block]:
    blocks = []
    offset = line_number = 0
    with open(file, "rb") as stream:
        while lines := list(islice(stream, LINES_PER_BLOCK)):
            load = partial(_load_jsonl, file, columns, offset, line_number, len(lines))
            _parse_lines(lines, file, columns, line_number)
            blocks.append(Block(len(lines), load))
            offset += sum(map(len, lines))
            line_number += len(lines)
    return blocks


def _load_jsonl(file: Path, columns: Columns, offset: int, first_line: int, n_lines: int) -> list[Document]:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return _parse_lines(islice(stream, n_lines), file, columns, first_line)


def _parse_lines(lines: Iterable[bytes], file: Path, columns: Columns, first_line: int) -> list[Document]:
    documents = []
    text_column, chats = columns.text, columns.chats
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
        if not isinstance(row[text_column], (list if chats else str) | None):
            expected = "a list of messages" if chats else "a string"
            raise InvalidInputError(
                f"{file}, line {number}: {text_column!r} holds {type(row[text_column]).__name__}; expected {expected}."
            )
        try:
            documents.append(document_from(row, columns, file.stem, file.parent))
        except ValueError as error:
            raise InvalidInputError(f"{file}, line {number}: {error}.") from error
    return documents


def _parquet_blocks(file: Path, wanted: Columns) -> list[Block]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata, schema = parquet.read_metadata(file), parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{file} cannot be read as parquet: {error}") from error
    for what, name in (("text column", wanted.text), ("media column", wanted.media)):
        if name is not None and name not in schema.names:
            raise UnknownNameError(what, name, schema.names, hint=f"({file})")
    kind = schema.field(wanted.text).type
    if not (_is_list(kind) if wanted.chats else _is_text(kind)):
        expected = "lists of messages" if wanted.chats else "text"
        raise InvalidInputError(f"{file}: the column {wanted.text!r} holds {kind}; expected {expected}.")
    scalars = [field.name for field in schema if _is_text(field.type) or pyarrow.types.is_primitive(field.type)]
    columns = scalars
    if wanted.chats:
        columns = list(dict.fromkeys([*scalars, wanted.text, *({TOOLS_COLUMN} & set(schema.names))]))
    elif wanted.media:
        columns = list(dict.fromkeys([*scalars, wanted.media]))
    return [
        Block(metadata.row_group(group).num_rows, partial(_load_parquet, file, wanted, columns, group))
        for group in range(metadata.num_row_groups)
    ]


def _is_text(kind: Any) -> bool:
    """Whether an arrow type is a string, dictionary-encoded or not."""
    import pyarrow

    kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _load_parquet(file: Path, wanted: Columns, columns: Sequence[str], group: int) -> list[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.ParquetFile(file).read_row_group(group, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{file}, row group {group} cannot be read: {error}") from error
    nested = wanted.chats or wanted.media is not None
    try:
        return [document_from(without_nulls(row) if nested else row, wanted, file.stem, file.parent) for row in rows]
    except ValueError as error:
        raise InvalidInputError(f"{file}, row group {group}: {error}.") from error
