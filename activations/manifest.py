"""`manifest.json`: what an artefact is, which version of its format it has, and what it was made from."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activations.errors import IntegrityError, InvalidInputError, UnknownNameError
from activations.storage import Storage, storage_at

__all__ = ["FORMATS", "ID_LENGTH", "read_manifest", "write_atomically", "write_manifest"]

ID_LENGTH = 12
MANIFEST = "manifest.json"
FORMATS: dict[str, int] = {"activation-store": 1, "sae": 1, "feature-index": 1}
"""The newest version of each format that this release reads and the one it writes."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old bytes or the new; fsync both file and folder."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_manifest(
    folder: str | Path | Storage,
    format: str,
    fingerprint: str,
    parents: Sequence[str],
    created_by: str,
    **extra: Any,
) -> dict[str, Any]:
    """Write `manifest.json` and return its content.

    Args:
        folder: the artefact's folder, or where else it lies.
        format: one of `FORMATS`.
        fingerprint: SHA-256 (hex) of what identifies the artefact; its first 12 digits are the artefact's id.
        parents: fingerprints of what it was made from.
        created_by: program and version, such as "scope-workbench 0.1.0".
        extra: further JSON-able entries.
    """
    manifest = {
        "format": format,
        "version": FORMATS[format],
        "fingerprint": fingerprint,
        "parents": list(parents),
        "created_by": created_by,
        **extra,
    }
    storage_at(folder).replace(MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    return manifest


def read_manifest(folder: str | Path | Storage, expected_format: str | None = None) -> dict[str, Any]:
    """The content of an artefact's `manifest.json`.

    Raises:
        UnknownNameError: there is no such artefact.
        InvalidInputError: it is another format than expected, or written by a newer version.
        IntegrityError: the manifest cannot be read.
    """
    storage = storage_at(folder)
    where = storage.location
    try:
        manifest = json.loads(storage.read(MANIFEST))
        format, version = manifest["format"], manifest["version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnknownNameError(expected_format or "artefact", str(where), storage.siblings()) from error
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{storage.where(MANIFEST)} is not a readable manifest ({error}).") from error
    if expected_format is not None and format != expected_format:
        raise InvalidInputError(f"{where} is of format {format!r}; expected {expected_format!r}.")
    if version > FORMATS.get(format, 0):
        raise InvalidInputError(
            f"{where} has version {version} of the format {format!r}; this release reads up to "
            f"{FORMATS.get(format, 0)}. Upgrade scope-workbench to open it."
        )
    return manifest
