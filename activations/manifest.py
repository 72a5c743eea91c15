"""`manifest.json`: what an artefact is, which version of its format it has, and what it was made from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from activations.disk import write_file
from activations.errors import IntegrityError, InvalidInputError, UnknownNameError
from activations.storage import Storage, storage_at

__all__ = [
    "DIGEST",
    "FORMATS",
    "ID_LENGTH",
    "has_its_digest",
    "read_manifest",
    "with_digest",
    "write_atomically",
    "write_manifest",
]

ID_LENGTH = 12
DIGEST = "xxh3_128"
"""The entry of a JSON object that holds its own digest."""
MANIFEST = "manifest.json"
FORMATS: dict[str, int] = {
    "activation-store": 1,
    "sae": 1,
    "feature-index": 1,
    "feature-excerpt": 1,
    "model-diff": 1,
}
"""The newest version of each format that this release reads and the one it writes."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old bytes or the new; fsync both file and folder."""
    write_file(path, content)


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the xxh3-128 of its canonical form as one more entry."""
    return {**content, DIGEST: _digest(content)}


def has_its_digest(content: Mapping[str, Any]) -> bool:
    """Whether an object made by `with_digest` is still as it was."""
    return content.get(DIGEST) == _digest({name: value for name, value in content.items() if name != DIGEST})


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


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
    manifest = with_digest(manifest)
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
    what = expected_format or "artefact"
    try:
        manifest = json.loads(storage.read(MANIFEST))
        format, version = manifest["format"], manifest["version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        if storage.names("ledger"):  # the manifest is written before it
            raise IntegrityError(
                f"{storage.where(MANIFEST)} is missing, though the ledger beside it is there. Restore it from a copy."
            ) from error
        raise UnknownNameError(what, str(where), storage.siblings()) from error
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
