"""Digests of weights and tokenizers, each computed once and remembered beside path, size and modification time.

Both are digests of content, not of files: the same weights in one shard or in ten have the same `weight_hash`, and
a tokenizer saved again by another version of transformers keeps its `tokenizer_hash`.
"""

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from activations.manifest import write_atomically
from scope.errors import IntegrityError

__all__ = ["cache_folder", "file_digest", "remembered", "tokenizer_digest", "weight_digest"]


WORTH_REMEMBERING = 4 * 2**20
"""Bytes from which on a digest is kept."""


def cache_folder() -> Path:
    """Where converted models and digests are kept: `$SCOPE_CACHE`, or `~/.cache/scope-workbench`."""
    chosen = os.environ.get("SCOPE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "scope-workbench"


def remembered(kind: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or its result of an earlier time when none of `files` has changed since in size or time.

    The cache is a convenience: where it cannot be written the digest is computed again, and for a few megabytes it
    is not worth its files.
    """
    files = sorted(files)
    if sum(path.stat().st_size for path in files) < WORTH_REMEMBERING:
        return compute()
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = xxhash.xxh3_128_hexdigest(json.dumps([kind, 1, state]).encode())
    path = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        digest = path.read_text().strip()
        if len(digest) == 32:
            return digest
    digest = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest.encode())
    return digest


def file_digest(path: Path) -> str:
    """xxh3-128 (hex) of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def weight_digest(files: Iterable[Path]) -> str:
    """xxh3-128 (hex) over name, dtype, shape and bytes of each tensor of some safetensors files, by sorted name.

    Raises:
        IntegrityError: a file is not in the safetensors format, or is shorter than its header says.
    """
    entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        header, start = _safetensors_header(path)
        entries.update({name: (path, start, entry) for name, entry in header.items() if name != "__metadata__"})
    digest = xxhash.xxh3_128()
    maps: dict[Path, mmap.mmap] = {}
    try:
        for name in sorted(entries):
            path, start, entry = entries[name]
            if path not in maps:
                with open(path, "rb") as file:
                    maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begin, end = (start + offset for offset in entry["data_offsets"])
            digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
            with memoryview(maps[path]) as view, view[begin:end] as content:
                digest.update(content)
    finally:
        for mapped in maps.values():
            mapped.close()
    return digest.hexdigest()


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
        except (struct.error, ValueError):
            header = None
    if not isinstance(header, dict):
        raise IntegrityError(f"{path} is not a readable safetensors file. Get it again.")
    start = 8 + length
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if start + max(ends, default=0) != size:
        raise IntegrityError(f"{path} has {size:,} bytes, its header says {start + max(ends, default=0):,}.")
    return header, start


def tokenizer_digest(serialised: str, special_ids: dict[str, int | None]) -> str:
    """xxh3-128 (hex) of what decides how a text becomes token ids.

    Args:
        serialised: the JSON of a `tokenizers.Tokenizer`.
        special_ids: the special tokens by role, such as {"bos": 2}.
    """
    content = json.loads(serialised)
    model = content["model"]
    vocabulary = model["vocab"]
    pairs = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    added = [[token["id"], token["content"], token["special"]] for token in content.get("added_tokens") or []]
    steps = [content.get("normalizer"), content.get("pre_tokenizer")]
    canonical = json.dumps(
        [model.get("type"), pairs, merges, sorted(added), steps, special_ids], sort_keys=True, ensure_ascii=True
    )
    return xxhash.xxh3_128_hexdigest(canonical.encode())
