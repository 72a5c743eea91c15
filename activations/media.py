"""Images and sounds of documents: where files name them, what a store keeps of them, and what their tokens are.

1. A document names its media by path: in the messages of a chat, as parts `{"type": "image", "path": …}` of a content;
   or, beside a text, in a column that lists paths (or such parts). Paths are relative to the file that names them.
2. In a text `<image>` and `<audio>` say where a medium stands, in the order of the list; without any the media come
   first.
3. A model's processor puts *soft tokens* in a medium's place, with a few tokens of markup around them. All of these
   belong to the medium, and stay in one window. A soft token shows a patch of its image, or a span of its sound.
4. The store keeps a copy of each medium: a path may be gone when a capture is resumed or when somebody wants to see
   what a feature fires on, and a picture is small beside the activations of its tokens.
"""

import io
import re
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from activations.errors import InvalidInputError

__all__ = [
    "BOX",
    "MEDIA_COLUMNS",
    "MEDIA_TABLE",
    "MODALITIES",
    "NO_MEDIUM",
    "SPAN",
    "MediaTokens",
    "Medium",
    "MediumContent",
    "PlacedMedium",
    "held",
    "kind_of",
    "media_from",
    "medium_from",
    "places_in",
    "read_medium",
    "window_breaks",
]

MODALITIES = ("text", "image", "audio")
"""What a token is, by its code in the `modality` column (uint8)."""
BOX = ("x0", "y0", "x1", "y1")
"""The patch that a soft token of an image shows, in fractions of the image's width and height."""
SPAN = ("start_s", "end_s")
"""The time that a soft token of a sound stands for, in seconds."""
MEDIA_COLUMNS = {"modality": "uint8", "medium": "int32", **dict.fromkeys((*BOX, *SPAN), "float32")}
"""The columns that tokens of a text with media have besides. `medium` counts from the document's first, -1 for none;
places are NaN where there is none."""
NO_MEDIUM = {"modality": 0, "medium": -1, **dict.fromkeys((*BOX, *SPAN), np.nan)}
"""What they hold for a token of no medium."""
MEDIA_TABLE = {
    **dict.fromkeys(("sequence", "position", "n_tokens", "document", "medium"), "int64"),
    **dict.fromkeys(("kind", "name", "digest"), "string"),
    **dict.fromkeys(("width", "height"), "int64"),
    "seconds": "double",
    "content": "binary",
}
"""The table of a store's media, one row each: the window that it lies in, the place of its first soft token there and
how many it has, its document and number in it, what it is called, xxh3-128 of its file, its size, its file."""
SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".wave"), "audio"),
}
MARK = re.compile(r"<(image|audio)>")


@dataclass(frozen=True)
class Medium:
    """An image or a sound that a document names."""

    kind: str
    """ "image" or "audio"."""
    name: str
    """Its path as the document gives it, or the name of a file that was handed over."""
    path: Path | None = None
    """Where it lies; None where its content is here."""
    content: bytes | None = None


class MediumContent(NamedTuple):
    """A medium's file."""

    kind: str
    name: str
    digest: str
    """xxh3-128 (hex) of the content."""
    width: int | None
    """Pixels, of an image."""
    height: int | None
    seconds: float | None
    """Duration, of a sound."""
    content: bytes


class PlacedMedium(NamedTuple):
    """A medium in a window."""

    kind: str
    name: str
    position: int
    """Place of its first soft token in the window, BOS included."""
    n_tokens: int
    """Soft tokens that it has, one after the other."""
    content: bytes


class MediaTokens(NamedTuple):
    """A document with media as a model reads it."""

    token_id: np.ndarray
    """int32 `(n,)`, without BOS."""
    columns: Mapping[str, np.ndarray]
    """By name as in `MEDIA_COLUMNS`, and of chats as in `activations.chats.CHAT_COLUMNS`, `(n,)` each."""
    media: tuple[MediumContent, ...]
    """The media, by number."""


def medium_from(value: Any, folder: Path | None, kind: str | None = None) -> Medium:
    """The medium that a path, or a part `{"type": "image", "path": …}`, stands for.

    Args:
        value: the path or the part.
        folder: of the file that names it, which paths are relative to; None where there is none.
        kind: what it is, if that is known; else the part or the path's ending says.

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(value, Mapping):
        kind = kind or value.get("type")
        found = [value[name] for name in ("path", "image", "audio", "url") if value.get(name) is not None]
        if kind not in MODALITIES[1:]:
            raise ValueError(f"expected a part of type text, image or audio, got {kind!r}")
        if len(found) != 1 or not isinstance(found[0], str):
            raise ValueError(f"expected a part of type {kind} with a path, got {str(value)[:80]}")
        value = found[0]
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected the path of an image or a sound, got {str(value)[:80]}")
    if "://" in value and not value.startswith("file://"):
        raise ValueError(f"{value} lies elsewhere; download it and give its path")
    kind = kind or kind_of(value)
    if kind is None:
        raise ValueError(f"{value} is no medium that is known by its ending: {', '.join(SUFFIXES)}")
    if folder is None:
        raise ValueError(f"{value} is relative to no file; media are read from files")
    return Medium(kind, value, folder / value.removeprefix("file://"))


def kind_of(name: str) -> str | None:
    """ "image" or "audio", by the ending of a file's name; None where it says neither."""
    return SUFFIXES.get(Path(name).suffix.lower())


def media_from(value: Any, folder: Path | None) -> tuple[Medium, ...]:
    """The media that a column beside a text lists: none, one path, or a list of paths or parts; raises ValueError."""
    listed = [] if value is None else [value] if isinstance(value, str | Mapping) else value
    if not isinstance(listed, list | tuple):
        raise ValueError(f"expected a list of paths, got {str(value)[:80]}")
    return tuple(medium_from(one, folder) for one in listed)


def places_in(text: str, media: Sequence[Medium]) -> list[tuple[int, int]]:
    """Where in a text its media stand: the characters of each one's mark, or none at its beginning (step 2).

    Raises:
        ValueError: marks and media differ in number or kind.
    """
    marks = list(MARK.finditer(text))
    if not marks:
        return [(0, 0)] * len(media)
    if [mark[1] for mark in marks] != [medium.kind for medium in media]:
        raise ValueError(
            f"its text has the marks {', '.join(mark[0] for mark in marks)}, its media are "
            f"{', '.join(f'{medium.name} ({medium.kind})' for medium in media) or 'none'}; expected one mark for each, "
            "in their order, or no marks"
        )
    return [mark.span() for mark in marks]


def held(medium: Medium) -> Medium:
    """The medium with its content, for where its path does not reach.

    Raises:
        InvalidInputError: it cannot be read.
    """
    return replace(medium, path=None, content=_bytes_of(medium))


def read_medium(medium: Medium) -> MediumContent:
    """A medium's file and its size, as far as the file's beginning tells.

    Raises:
        InvalidInputError: it is missing, or is no image or sound that can be read.
    """
    content = _bytes_of(medium)
    width = height = seconds = None
    if medium.kind == "image":
        width, height = _image_size(medium, content)
    else:
        seconds = _duration(medium, content)
    digest = xxhash.xxh3_128_hexdigest(content)
    return MediumContent(medium.kind, medium.name, digest, width, height, seconds, content)


def _bytes_of(medium: Medium) -> bytes:
    try:
        return medium.content if medium.content is not None else Path(str(medium.path)).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"the {medium.kind} {medium.name} cannot be read: {error}") from error


def _image_size(medium: Medium, content: bytes) -> tuple[int, int]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InvalidInputError("Images need the package pillow. Install it with: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            size: tuple[int, int] = ImageOps.exif_transpose(image).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"the image {medium.name} cannot be read: {error}") from error
    return size


def _duration(medium: Medium, content: bytes) -> float:
    try:
        with wave.open(io.BytesIO(content)) as file:
            seconds = file.getnframes() / file.getframerate()
    except (wave.Error, EOFError, ZeroDivisionError) as error:
        raise InvalidInputError(
            f"the sound {medium.name} cannot be read: {error or 'it ends too early'}. Sounds are PCM WAV files."
        ) from error
    if not seconds:
        raise InvalidInputError(f"the sound {medium.name} is empty")
    return seconds


def window_breaks(medium: np.ndarray, per_window: int, first: int = 0) -> list[int]:
    """Where a document's windows begin, so that none of its media is cut in two (step 3): a window ends early where a
    medium would not fit any more.

    Args:
        medium: the `medium` column.
        per_window: tokens that a window takes, BOS not counted.
        first: where the first one begins.

    Raises:
        ValueError: a medium is longer than a window; its number and tokens are the arguments.
    """
    starts, place = [], first
    edges = np.flatnonzero(np.diff(medium, prepend=-1, append=-1))
    begins = [int(edge) for edge in edges if edge < len(medium) and medium[edge] >= 0]
    ends = {begin: int(edges[np.searchsorted(edges, begin, "right")]) for begin in begins}
    while place < len(medium):
        starts.append(place)
        stop = place + per_window
        cut = next((begin for begin in begins if begin < stop < ends[begin]), None)
        if cut is not None and cut <= place:
            raise ValueError(int(medium[cut]), ends[cut] - cut)
        place = stop if cut is None else cut
    return starts
