"""Documents, and the files that hold them: parquet, JSON lines and plain text, read block by block.

A document is a text, or a chat: a list of messages, and the tools that they may call (`activations.chats`).

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

__all__ = ["KNOWN_SUFFIXES", "Block", "Document", "blocks_of", "document_from", "is_held_out", "name_of"]

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

    @property
    def chat(self) -> Chat:
        """The conversation."""
        return Chat(self.messages, self.tools)


def is_held_out(document: Document) -> bool:
    """Whether a document is kept for metrics: `crc32(title before '#') % 10 == 0`, about one in ten.

    The parts of a book (`henry_vi.txt#9`) and the translations of a page share a title, so they fall on one side.
    A document without a title goes by its first 200 characters.
    """
    key = document.title.split("#", 1)[0] or document.text[:200]
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % 10 == 0


class Block(NamedTuple):
    """Some documents of a source that are loaded together."""

    n_documents: int
    load: Callable[[], list[Document]]


def name_of(file: Path) -> str:
    """What of a file's address its documents carry, so that a moved file is the same text."""
    return f"{file.resolve().parent.name}/{file.name}" if file.suffix.lower() in TEXT_SUFFIXES else file.name


def blocks_of(files: Sequence[Path], text_column: str, chats: bool = False) -> list[Block]:
    """The blocks of all files, in order.

    Args:
        files: the files.
        text_column: the column that holds the texts, or chats.
        chats: whether it holds lists of messages.

    Raises:
        UnknownNameError: a file does not have the text column.
        InvalidInputError: a file of unknown kind, a column that is no text, a line that is no JSON object (file and
            line are named), bytes that are no UTF-8.
    """
    blocks: list[Block] = []
    plain: list[Path] = []
    for file in files:
        suffix = file.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            if chats:
                raise InvalidInputError(f"{file} is plain text; chats are read from parquet and jsonl files.")
            plain.append(file)
            continue
        blocks += _text_blocks(plain)
        plain = []
        if suffix in PARQUET_SUFFIXES:
            blocks += _parquet_blocks(file, text_column, chats)
        elif suffix in JSONL_SUFFIXES:
            blocks += _jsonl_blocks(file, text_column, chats)
        else:
            raise InvalidInputError(f"{file} is of an unknown kind; expected one of {', '.join(KNOWN_SUFFIXES)}.")
    return blocks + _text_blocks(plain)


def document_from(row: Mapping[str, Any], text_column: str, default_source: str, chats: bool = False) -> Document:
    """The document of a row; columns that have no place of their own go to `extra` if they are short.

    Raises:
        ValueError: the row's messages or tools are none.
    """
    known: dict[str, Any] = {name: cleaned(str(row[name])) for name in KNOWN_COLUMNS if row.get(name) is not None}
    known.setdefault("source", default_source)
    extra = {
        cleaned(str(name)): cleaned(str(value))
        for name, value in row.items()
        if name != text_column
        and name not in KNOWN_COLUMNS
        and not (chats and name == TOOLS_COLUMN)
        and isinstance(value, str | int | float | bool)
        and len(str(value)) <= MAX_EXTRA_LENGTH
    }
    if chats:
        messages = chat_from(row[text_column] or ()).messages
        text = "\n".join(message.text for message in messages)
        return Document(text=text, extra=extra, messages=messages, tools=tools_from(row.get(TOOLS_COLUMN)), **known)
    return Document(text=cleaned(row[text_column] or ""), extra=extra, **known)


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


def _jsonl_blocks(file: Path, text_column: str, chats: bool) -> list[Block]:
    blocks = []
    offset = line_number = 0
    with open(file, "rb") as stream:
        while lines := list(islice(stream, LINES_PER_BLOCK)):
            load = partial(_load_jsonl, file, text_column, chats, offset, line_number, len(lines))
            _parse_lines(lines, file, text_column, chats, line_number)
            blocks.append(Block(len(lines), load))
            offset += sum(map(len, lines))
            line_number += len(lines)
    return blocks


def _load_jsonl(
    file: Path, text_column: str, chats: bool, offset: int, first_line: int, n_lines: int
) -> list[Document]:
    with open(file, "rb") as stream:
        stream.seek(offset)
        return _parse_lines(islice(stream, n_lines), file, text_column, chats, first_line)


def _parse_lines(lines: Iterable[bytes], file: Path, text_column: str, chats: bool, first_line: int) -> list[Document]:
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
        if not isinstance(row[text_column], (list if chats else str) | None):
            expected = "a list of messages" if chats else "a string"
            raise InvalidInputError(
                f"{file}, line {number}: {text_column!r} holds {type(row[text_column]).__name__}; expected {expected}."
            )
        try:
            documents.append(document_from(row, text_column, file.stem, chats))
        except ValueError as error:
            raise InvalidInputError(f"{file}, line {number}: {error}.") from error
    return documents


def _parquet_blocks(file: Path, text_column: str, chats: bool) -> list[Block]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata, schema = parquet.read_metadata(file), parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{file} cannot be read as parquet: {error}") from error
    if text_column not in schema.names:
        raise UnknownNameError("text column", text_column, schema.names, hint=f"({file})")
    kind = schema.field(text_column).type
    if not (_is_list(kind) if chats else _is_text(kind)):
        expected = "lists of messages" if chats else "text"
        raise InvalidInputError(f"{file}: the column {text_column!r} holds {kind}; expected {expected}.")
    scalars = [field.name for field in schema if _is_text(field.type) or pyarrow.types.is_primitive(field.type)]
    columns = scalars
    if chats:
        columns = list(dict.fromkeys([*scalars, text_column, *({TOOLS_COLUMN} & set(schema.names))]))
    return [
        Block(metadata.row_group(group).num_rows, partial(_load_parquet, file, text_column, chats, columns, group))
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


def _load_parquet(file: Path, text_column: str, chats: bool, columns: Sequence[str], group: int) -> list[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.ParquetFile(file).read_row_group(group, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInputError(f"{file}, row group {group} cannot be read: {error}") from error
    try:
        return [document_from(without_nulls(row) if chats else row, text_column, file.stem, chats) for row in rows]
    except ValueError as error:
        raise InvalidInputError(f"{file}, row group {group}: {error}.") from error
