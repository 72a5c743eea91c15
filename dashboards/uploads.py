"""Images and sounds that people hand over for a prompt: kept in memory by their digest, the oldest dropped first."""

import base64
import binascii
import threading
from collections import OrderedDict
from pathlib import PurePath

from activations.media import Medium, MediumContent, kind_of, read_medium
from dashboards.context import Context
from scope.errors import InvalidInputError

__all__ = ["MAX_FILE_BYTES", "Uploads", "uploads_of"]

MAX_FILE_BYTES = 16 * 2**20
MAX_BYTES = 128 * 2**20
"""Of all that are kept."""


class Uploads:
    """What was handed over, for as long as the dashboard is served and there is room. Safe across threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, MediumContent] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, encoded: str) -> MediumContent:
        """Take in a file.

        Args:
            name: what it is called.
            encoded: its content as a browser hands it over, `data:…;base64,…`.

        Raises:
            InvalidInputError: it is too large, or no image or sound that can be read.
        """
        name = PurePath(name.replace("\\", "/")).name or "file"
        kind = kind_of(name)
        if kind is None:
            raise InvalidInputError(f"{name} is no image and no WAV file, by its name.")
        try:
            content = base64.b64decode(encoded.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise InvalidInputError(f"{name} did not arrive whole. Choose it again.") from error
        if len(content) > MAX_FILE_BYTES:
            raise InvalidInputError(f"{name} has {len(content):,} bytes; up to {MAX_FILE_BYTES:,} are taken.")
        try:
            found = read_medium(Medium(kind, name, content=content))
        except InvalidInputError as error:
            raise InvalidInputError(f"{str(error)[:1].upper()}{str(error)[1:]}") from error
        with self._lock:
            self._held[found.digest] = found
            self._held.move_to_end(found.digest)
            while sum(len(one.content) for one in self._held.values()) > MAX_BYTES:
                self._held.popitem(last=False)
        return found

    def get(self, digest: str) -> MediumContent:
        """A file that was handed over; raises InvalidInputError where it is not kept any more."""
        with self._lock:
            found = self._held.get(digest)
        if found is None:
            raise InvalidInputError(
                "An image or a sound of this prompt is no longer here: what is handed over is kept in memory while the "
                "dashboard is served. Add it again."
            )
        return found

    def named(self, digests: tuple[str, ...]) -> list[tuple[str, str]]:
        """Digest and name of those that are still here."""
        with self._lock:
            return [(digest, self._held[digest].name) for digest in digests if digest in self._held]


def uploads_of(context: Context) -> Uploads:
    """The one `Uploads` of a dashboard."""
    return context.once("uploads", Uploads)
