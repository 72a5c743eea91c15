"""Small arrays packed into one file: what ships with a dictionary has to be small.

The bytes of an array are put in order of their place in an item (all first bytes, then all second ones, …), so that
the high bytes of small numbers become one long run, and are compressed with zstd. A table beside the file says where
each array lies; it holds a digest of the whole.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from scope.errors import IntegrityError

__all__ = ["PackedArrays", "pack_arrays", "rounded"]

LEVEL = 19
MANTISSA = 12


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 with 12 bits of mantissa, to the nearest: a relative error of 2⁻¹³ at most, and a byte saved."""
    dropped = 23 - MANTISSA
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = bits + np.uint32(1 << (dropped - 1))
    return (up & ~np.uint32((1 << dropped) - 1)).view(np.float32)


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, Any]]:
    """The content of the file, and its table: `bytes` and `xxh3_128` of the whole, and of each of `arrays` its dtype,
    shape, and where it starts and stops (bytes)."""
    from numcodecs.zstd import compress  # type: ignore[import-untyped]

    content, table = bytearray(), {}
    for name, array in arrays.items():
        stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        planes = stored.reshape(-1).view(np.uint8).reshape(stored.size, stored.itemsize).T
        start = len(content)
        content += compress(np.ascontiguousarray(planes).tobytes(), LEVEL) if stored.size else b""
        table[name] = {"dtype": stored.dtype.str, "shape": list(stored.shape), "start": start, "stop": len(content)}
    return bytes(content), {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content), "arrays": table}


class PackedArrays:
    """Reads what `pack_arrays` wrote. Safe across threads.

    Args:
        path: the file.
        table: its table.
    """

    def __init__(self, path: Path, table: Mapping[str, Any]) -> None:
        self.path = path
        self._table = table
        self._arrays: dict[str, np.ndarray] = {}

    @cached_property
    def _content(self) -> bytes:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{self.path} cannot be read ({error}). Restore it from a copy.") from error
        if xxhash.xxh3_128_hexdigest(content) != self._table["xxh3_128"]:
            raise IntegrityError(
                f"{self.path} is damaged: its {len(content):,} bytes are not the {self._table['bytes']:,} that were "
                "written. Restore it from a copy."
            )
        return content

    def check(self) -> None:
        """Compare the file with its digest; raises IntegrityError."""
        _ = self._content

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays."""
        return tuple(self._table["arrays"])

    def __getitem__(self, name: str) -> np.ndarray:
        """One array, read-only; raises IntegrityError where the file is not what was written."""
        array = self._arrays.get(name)
        if array is None:
            array = self._arrays[name] = self._read(**self._table["arrays"][name])
        return array

    def _read(self, dtype: str, shape: list[int], start: int, stop: int) -> np.ndarray:
        from numcodecs.zstd import decompress

        kind, size = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
        if not size:
            return np.empty(shape, kind)
        planes = np.frombuffer(decompress(self._content[start:stop]), np.uint8).reshape(kind.itemsize, size)
        array = np.ascontiguousarray(planes.T).view(kind).reshape(shape)
        array.flags.writeable = False
        return array
