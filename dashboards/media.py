"""Files of images and sounds: `/media/INDEX/DIGEST` of an index, `/uploads/DIGEST` handed over for a prompt.

An index is named by its id in the workspace's registry, a file by its digest in the index's own table; no path comes
from a request. What is sent is what a browser shows and no page: images in one of four formats, others as PNG, sounds
as WAV, whatever the file was called.
"""

import io
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, request

from dashboards.context import Context
from dashboards.uploads import uploads_of
from scope.errors import InvalidInputError, ScopeError

__all__ = ["media_link", "register"]

SHOWN = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


def media_link(index: str, digest: str) -> str:
    """The address of a file."""
    return f"/media/{index}/{digest}"


def register(server: Flask, context: Context) -> None:
    """Add the route to a Flask application."""

    @server.get("/media/<index>/<digest>")
    def medium(index: str, digest: str) -> Response:
        """One file."""
        return _answer(lambda: context.index(index).medium_file(digest))

    @server.get("/uploads/<digest>")
    def upload(digest: str) -> Response:
        """One file that was handed over."""
        return _answer(lambda: uploads_of(context).get(digest).content)


def _answer(read: Callable[[], bytes]) -> Response:
    try:
        content = read()
    except (InvalidInputError, IndexError) as problem:
        return Response(str(problem), 404, content_type="text/plain; charset=utf-8")
    except ScopeError as problem:
        return Response(str(problem), 500, content_type="text/plain; charset=utf-8")
    shown, kind = _shown(content)
    response = Response(shown, content_type=kind)
    response.headers["Cache-Control"] = "private, max-age=86400, immutable"  # its name is its digest
    response.make_conditional(request, accept_ranges=True, complete_length=len(shown))
    return response


def _shown(content: bytes) -> tuple[bytes, str]:
    """What a browser gets of a file, and its type."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return content, "audio/wav"
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if image.format in SHOWN:
            return content, SHOWN[image.format]
        stream: Any = io.BytesIO()
        image.convert("RGB").save(stream, "PNG")
    return stream.getvalue(), "image/png"
