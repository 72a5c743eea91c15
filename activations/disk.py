"""Files that are there whole after a crash, or not at all, written past the page cache where that pays.

1. A file is written under a temporary name, fsynced, renamed, and its folder is fsynced.
2. Memory that begins on a page (`aligned_buffer`) goes to the disk directly (`O_DIRECT`): nothing is copied into the
   page cache, which costs most of a core at the speed of one disk, and what other programs keep there stays. The last
   bytes, less than a page, and everything on file systems without direct access take the ordinary way.
"""

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import xxhash

__all__ = ["aligned_buffer", "sync_folder", "write_file"]

PAGE_BYTES = 4096
"""Direct access wants memory, offset and length in whole blocks; no file system's are larger."""
WRITE_BYTES = 2**23
DIRECT_FROM_BYTES = 2**20
"""Smaller files are not worth a call more."""


def aligned_buffer(n_bytes: int) -> np.ndarray:
    """Zeroed memory that begins on a page, uint8 `(n_bytes,)`."""
    return np.frombuffer(mmap.mmap(-1, max(1, n_bytes)), np.uint8, n_bytes)


def write_file(path: Path, content: bytes | memoryview) -> str:
    """Write a file so that after a crash it is there whole or not at all; return its xxh3-128 (hex)."""
    # Two threads that replace one file at once must not write into each other's.
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    view = memoryview(content)
    digest = xxhash.xxh3_128()
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            direct = len(view) >= DIRECT_FROM_BYTES and _is_aligned(view) and _set_direct(descriptor, True)
            whole_pages = len(view) // PAGE_BYTES * PAGE_BYTES if direct else 0
            for part in (range(0, whole_pages, WRITE_BYTES), range(whole_pages, len(view), WRITE_BYTES)):
                for start in part:
                    piece = view[start : min(part.stop, start + WRITE_BYTES)]
                    digest.update(piece)
                    _write(descriptor, piece, start)
                _set_direct(descriptor, False)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    sync_folder(path.parent)
    return digest.hexdigest()


def _is_aligned(view: memoryview) -> bool:
    return np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES == 0


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Turn direct access on or off, and say whether it is on; not every file system has it."""
    import fcntl

    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return direct


def _write(descriptor: int, piece: memoryview, offset: int) -> None:
    while piece:
        try:
            written = os.pwrite(descriptor, piece, offset)
        except OSError as error:
            # A file system with larger blocks, or what is left of a write that stopped between two of them.
            if error.errno != errno.EINVAL or not _is_direct(descriptor):
                raise
            _set_direct(descriptor, False)
            continue
        piece, offset = piece[written:], offset + written


def _is_direct(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
