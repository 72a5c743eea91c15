"""Images and sounds of an index: its own copies of their files, and a feature's strength over their patches or spans.

`media/<digest>` holds each file once, whatever the number of documents that show it; `tables/media.parquet` says where
in the text each stands. The rows of a medium's soft tokens have its patches or spans as columns (`activations.media`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from activations.disk import sync_folder
from activations.manifest import write_atomically
from activations.media import BOX, MODALITIES, SPAN
from scope.errors import IntegrityError, OutOfRangeError

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.reader import IndexReader

__all__ = ["MARKS", "MediumValues", "copy_media", "medium_file", "medium_values", "shown_tokens"]

MARKS: Mapping[str, str] = {"image": "▦", "audio": "♪"}
"""How a soft token is shown among the tokens of a text."""


class MediumValues(NamedTuple):
    """A feature's strength over one medium."""

    kind: str
    """ "image" or "audio"."""
    name: str
    digest: str
    document: int
    medium: int
    """Its number in the document."""
    width: int | None
    height: int | None
    seconds: float | None
    rows: np.ndarray
    """Row ids of its soft tokens, int64 `(n,)`."""
    values: np.ndarray
    """float32 `(n,)`: the strength on each, 0 where the feature does not fire."""
    places: np.ndarray
    """float32: of an image `(n, 4)`, the patch's x0, y0, x1, y1 in fractions of width and height; of a sound `(n, 2)`,
    its start and end in seconds."""


def copy_media(source: Any, folder: Path, sequences: "pd.DataFrame") -> "pd.DataFrame | None":
    """Copy the files of a store's media, and return the table of those in these windows; None without media."""
    if not getattr(source, "has_media", False):
        return None
    (folder / "media").mkdir(exist_ok=True)
    for digest, content in source.media_contents():
        path = folder / "media" / digest
        if not path.is_file():
            write_atomically(path, content)
    sync_folder(folder / "media")
    table = source.media()
    return table[table["sequence"].isin(sequences["sequence"])].reset_index(drop=True)


def medium_file(reader: "IndexReader", digest: str) -> bytes:
    """The file of a medium, verified.

    Raises:
        OutOfRangeError: the index has no such medium.
        IntegrityError: the file is not what was written.
    """
    import xxhash

    if digest not in reader.media_digests:
        raise OutOfRangeError(f"This index has no image or sound {digest!r}.")
    path = reader.path / "media" / digest
    content = path.read_bytes() if path.is_file() else b""
    if xxhash.xxh3_128_hexdigest(content) != digest:
        raise IntegrityError(f"{path} is missing or damaged. Build the index again; `scope verify` lists all faults.")
    return content


def medium_values(reader: "IndexReader", feature: int, document: int, medium: int) -> MediumValues:
    """A feature over the soft tokens of a document's medium.

    Raises:
        InvalidInputError: the index has no media.
        OutOfRangeError: the document has no such medium.
    """
    reader.require_spoken("modality")
    table = reader.media
    found = table[(table["document"] == document) & (table["medium"] == medium)]
    if not len(found):
        raise OutOfRangeError(f"Document {document} has no image or sound {medium} in this index.")
    about = found.iloc[0]
    rows = reader.document_rows(document)
    own = (reader.row_column("medium").take(rows) == medium) & (reader.row_column("modality").take(rows) > 0)
    rows = rows[own]
    names = BOX if about["kind"] == "image" else SPAN
    places = np.stack([reader.row_column(name).take(rows) for name in names], axis=1)
    size = {name: None if np.isnan(about[name]) else about[name] for name in ("width", "height", "seconds")}
    return MediumValues(
        kind=str(about["kind"]),
        name=str(about["name"]),
        digest=str(about["digest"]),
        document=int(document),
        medium=int(medium),
        width=None if size["width"] is None else int(size["width"]),
        height=None if size["height"] is None else int(size["height"]),
        seconds=None if size["seconds"] is None else float(size["seconds"]),
        rows=rows,
        values=reader.values_at(feature, rows) if len(rows) else np.empty(0, np.float32),
        places=places,
    )


def shown_tokens(reader: "IndexReader", rows: np.ndarray) -> list[str]:
    """Display strings of rows; soft tokens as `MARKS`."""
    tokens = reader.vocabulary.display(reader.row_column("token_id").take(rows))
    if "modality" not in reader.spoken:
        return list(tokens)
    kinds = reader.row_column("modality").take(rows).tolist()
    return [MARKS.get(MODALITIES[kind], token) for token, kind in zip(tokens, kinds, strict=True)]
