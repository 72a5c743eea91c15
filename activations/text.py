"""`TextSource`: documents in a fixed order, from files or a streamed Hugging Face data set.

1. Every file is opened and checked when its source is (`TextSource.check`): missing files and columns, lines that are
   no JSON, bytes that are no UTF-8 are answered before anything is computed or written.
2. A source is a list of blocks (`activations.documents`) that know how many documents they hold, so that a resumed run
   skips what it has without reading it.
3. In file order the blocks follow each other. With `shuffle_seed` the blocks are put in random order and taken eight
   at a time; the documents of such a pool are shuffled. That is a full shuffle for up to eight blocks, and memory is
   bounded by the pool for any number of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from activations.documents import (
    KNOWN_SUFFIXES,
    Block,
    Columns,
    Document,
    blocks_of,
    document_from,
    is_held_out,
    name_of,
)
from activations.errors import InvalidInputError, UnknownNameError
from activations.media import MODALITIES, places_in, read_medium
from activations.spec import fingerprint_of

__all__ = ["Document", "TextSource", "is_held_out"]

HF_PREFIX = "hf://"
HF_ADDRESS = "hf:/"
"""What is left of the prefix in a `Path`, which drops doubled slashes."""
HF_SHUFFLE_BUFFER = 10_000
BLOCKS_PER_POOL = 8


class MediaSummary(NamedTuple):
    """The media of a text."""

    digest: str
    """xxh3-128 (hex) over all of them."""
    images: int
    sounds: int
    longest_seconds: float
    """Of the longest sound."""


@dataclass(frozen=True)
class TextSource:
    """Documents in a fixed order.

    Args:
        paths: files, folders (all files in them whose kind is known, by name) or `hf://NAME[:CONFIG][@SPLIT]`.
            A single path may be given bare.
        text_column: the column (parquet, data set) or key (JSON lines) that holds the text.
        shuffle_seed: shuffle the documents with this seed; None keeps the order of the files.
        max_document_tokens: use only the first so many tokens of each document.
        messages_column: in place of `text_column`, the column that holds chats, a list of messages each; the tools
            that they may call stand in a column `tools`. `activations.chats` says which shapes are read.
        media_column: beside `text_column`, the column that lists each text's images and sounds; `activations.media`
            says how.
        message_media: whether the messages of chats may hold images and sounds.
    """

    paths: Sequence[str | Path] | str | Path
    text_column: str = "text"
    shuffle_seed: int | None = None
    max_document_tokens: int | None = None
    messages_column: str | None = None
    media_column: str | None = None
    message_media: bool = False

    def __post_init__(self) -> None:
        paths = (self.paths,) if isinstance(self.paths, str | Path) else tuple(self.paths)
        object.__setattr__(self, "paths", tuple(_address(path) if _is_hf(path) else Path(path) for path in paths))
        if not paths:
            raise InvalidInputError("No text was given: expected at least one parquet, jsonl or txt file.")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise InvalidInputError(f"shuffle_seed is {self.shuffle_seed}; expected 0 or more.")
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise InvalidInputError(f"max_document_tokens is {self.max_document_tokens}; expected at least 1.")
        if self.media_column is not None and self.is_chats:
            raise InvalidInputError("Chats hold their media in their messages: give message_media, no media_column.")
        if self.message_media and not self.is_chats:
            raise InvalidInputError("message_media is for chats: name the column of their messages.")
        if self.has_media and any(_is_hf(path) for path in paths):
            raise InvalidInputError("Media are read from files beside the text, not from a streamed data set.")
        if len(paths) > 1 and any(_is_hf(path) for path in paths):
            raise InvalidInputError("A streamed data set cannot be mixed with other paths; capture them one by one.")

    def check(self) -> None:
        """Open every file and look for what is wrong with it.

        Raises:
            UnknownNameError: a file, or the text column of one, does not exist.
            InvalidInputError: a file of unknown kind, a column that is no text, a line that is no JSON object
                (file and line are named), bytes that are no UTF-8; an image or a sound that is missing or unreadable
                (document and path are named).
        """
        if self._hf_name is not None:
            next(iter(self._hf_documents(0)), None)
        else:
            _ = self._blocks
        if self.has_media:
            _ = self.media

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the files' names and content and all settings.

        A streamed data set is known by its address only: a change of its content goes unnoticed.
        """
        media = {"media": self.media.digest} if self.has_media else {}
        return fingerprint_of({"files": self._content, **media, **self.settings})

    @property
    def settings(self) -> dict[str, Any]:
        """What the fingerprint holds besides content (JSON-able)."""
        return {
            "text_column": self.text_column,
            "shuffle_seed": self.shuffle_seed,
            "max_document_tokens": self.max_document_tokens,
            **({"messages_column": self.messages_column} if self.is_chats else {}),
            **({"media_column": self.media_column} if self.media_column is not None else {}),
            **({"message_media": True} if self.message_media else {}),
        }

    @property
    def described(self) -> dict[str, Any]:
        """What a store's manifest keeps of the text (JSON-able)."""
        return {"fingerprint": self.fingerprint, "files": self.names, **self.settings}

    def require_text(self) -> None:
        """Raise `InvalidInputError` if every document is empty."""
        if all(document.is_empty for document in self.documents()):
            raise InvalidInputError(f"There is no text in {', '.join(self.names)}: every document is empty.")

    @property
    def is_chats(self) -> bool:
        """Whether documents are chats."""
        return self.messages_column is not None

    @property
    def has_media(self) -> bool:
        """Whether documents may have images and sounds."""
        return self.media_column is not None or self.message_media

    @cached_property
    def media(self) -> MediaSummary:
        """What media there are; all of them are read for it.

        Raises:
            InvalidInputError: one is missing or unreadable; document and path are named.
        """
        digest, counts, longest = xxhash.xxh3_128(), dict.fromkeys(MODALITIES[1:], 0), 0.0
        for number, document in enumerate(document for block in self._blocks for document in block.load()):
            try:
                if not self.is_chats:
                    places_in(document.text, document.media)
                for medium in document.media:
                    found = read_medium(medium)
                    digest.update(f"{number} {found.kind} {found.digest}\n".encode())
                    counts[found.kind] += 1
                    longest = max(longest, found.seconds or 0.0)
            except ValueError as error:
                name = f"{document.title!r} (number {number})" if document.title else f"number {number}"
                raise InvalidInputError(f"The document {name}: {error}.") from error
        return MediaSummary(digest.hexdigest(), counts["image"], counts["audio"], longest)

    @property
    def _column(self) -> str:
        return self.text_column if self.messages_column is None else self.messages_column

    @property
    def _columns(self) -> Columns:
        return Columns(self._column, self.is_chats, self.media_column, self.message_media)

    @property
    def names(self) -> list[str]:
        """The files' names (of a text file with its folder's name), or the data set's address."""
        return [self._hf_name] if self._hf_name is not None else [name_of(file) for file in self._files]

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
                documents = self._loaded(number, pool)
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
                inside = sorted(child for child in path.rglob("*") if child.suffix.lower() in KNOWN_SUFFIXES)
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
        return [[name_of(file), _digest(file)] for file in self._files]

    @cached_property
    def _blocks(self) -> list[Block]:
        return blocks_of(self._files, self._columns)

    @cached_property
    def _last_pool(self) -> dict[int, list[Document]]:
        return {}

    def _loaded(self, number: int, pool: list[Block]) -> list[Document]:
        """The documents of a pool; the last one is kept, because checking a source and reading it begin alike."""
        documents = self._last_pool.get(number)
        if documents is None:
            self._last_pool.clear()
            documents = [document for block in pool for document in block.load()]
            self._last_pool[number] = documents
        return documents

    def _pools(self) -> Iterator[list[Block]]:
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
            if self._column not in row:
                raise UnknownNameError("text column", self._column, row)
            try:
                yield document_from(row, self._columns, name, None)
            except ValueError as error:
                raise InvalidInputError(f"{self._hf_name}: {error}.") from error


def _is_hf(path: str | Path) -> bool:
    return str(path).startswith(HF_ADDRESS)


def _address(path: str | Path) -> str:
    return HF_PREFIX + str(path).removeprefix(HF_ADDRESS).removeprefix("/")


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
