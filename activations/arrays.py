"""Committed, checksummed arrays: Zarr v3 arrays with one shard per row group, written whole and read verified.

Each array is a sharded Zarr v3 array that any reader opens. Its shards are put together here and not by zarr's codec
pipeline, which copies several times:

1. A shard holds the rows `[g R, (g + 1) R)`. Its *inner chunks* are about 1 MiB and end in a crc32c each. Activations
   are stored raw; token columns go through zstd first. The shard ends in the index that the Zarr sharding
   specification asks for: `(offset, nbytes)` as uint64 per inner chunk, and a crc32c over it.
2. `ShardBuffer` has exactly that layout in memory, so that activations are scattered straight into the bytes that go
   to disk. Inner chunks wholly past the last row are left out (offset and size all ones), the rest is padded with the
   fill value, a NaN for anything floating: a lost shard cannot pass for zeros.
3. `write_object` puts it there whole or not at all (`activations.storage`). What it returns, size, xxh3-128 and the
   crc32c of the inner chunks, is what the ledger keeps.
4. Readers compare what they read with the ledger: raw shards chunk by chunk, packed ones as a whole. Hence a shard
   that was swapped for another sound one is found as well.

bfloat16, which Zarr lacks, is stored as its bits in uint16 with the attribute `{"dtype": "bfloat16"}`.
"""

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import xxhash

from activations.disk import aligned_buffer
from activations.errors import IntegrityError
from activations.storage import OtherSizeError, Storage, StoredObject

__all__ = [
    "GROUP_METADATA",
    "ArrayLayout",
    "ObjectRecord",
    "ShardBuffer",
    "damaged_rows",
    "open_zarr",
    "pack_shard",
    "read_object",
    "read_packed",
    "read_raw",
    "write_object",
]

CHUNK_BYTES = 2**20
ZSTD_LEVEL = 1
CRC = struct.Struct("<I")
MISSING = 2**64 - 1
BFLOAT16_NAN = 0x7FC0
SHORTEST_PIECE = 8
"""Rows that lie side by side, on average, for which copying piece by piece pays."""


class ObjectRecord(NamedTuple):
    """What the ledger knows of an object (a file below the artefact's folder)."""

    n_bytes: int
    xxh3_128: str
    """Digest of the whole object (hex)."""
    crc32c: tuple[int, ...] = ()
    """Per inner chunk of a raw shard; empty for other objects."""


@dataclass(frozen=True)
class ArrayLayout:
    """How an array of rows lies on disk."""

    feature_shape: tuple[int, ...]
    """Shape of one row."""
    dtype: str
    """"bfloat16" or a numpy dtype name."""
    rows_per_group: int
    """R: rows in a shard."""
    packed: bool = False
    """Whether inner chunks are compressed (zstd); raw shards can be read in part."""

    @property
    def storage_dtype(self) -> np.dtype:
        """numpy dtype of the stored bits."""
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def fill_value(self) -> Any:
        """What missing rows read as, in the storage dtype."""
        if self.dtype == "bfloat16":
            return BFLOAT16_NAN
        return math.nan if self.storage_dtype.kind == "f" else 0

    @property
    def row_bytes(self) -> int:
        return math.prod(self.feature_shape) * self.storage_dtype.itemsize

    @property
    def rows_per_chunk(self) -> int:
        """Rows in an inner chunk: the power of two that comes nearest to 1 MiB, at most R."""
        return min(self.rows_per_group, 2 ** max(0, round(math.log2(CHUNK_BYTES / self.row_bytes))))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk before compression, without its crc."""
        return self.rows_per_chunk * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        return self.rows_per_group // self.rows_per_chunk

    def n_chunks(self, n_rows: int) -> int:
        """Inner chunks that `n_rows` rows of a shard take."""
        return -(-n_rows // self.rows_per_chunk)

    def shard_name(self, group: int) -> str:
        """File name of a row group's shard inside the array's folder."""
        return ".".join(["c", str(group), *("0" for _ in self.feature_shape)])

    def metadata(self, n_rows: int) -> bytes:
        """The content of the array's `zarr.json` while it has `n_rows` rows."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        crc: dict[str, Any] = {"name": "crc32c"}
        zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
        sharding = {
            "chunk_shape": [self.rows_per_chunk, *self.feature_shape],
            "codecs": [little, zstd, crc] if self.packed else [little, crc],
            "index_codecs": [little, crc],
            "index_location": "end",
        }
        fill = self.fill_value
        return _json_bytes(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [n_rows, *self.feature_shape],
                "data_type": self.storage_dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [self.rows_per_group, *self.feature_shape]},
                },
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": "NaN" if isinstance(fill, float) else fill,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": {"dtype": self.dtype},
                "storage_transformers": [],
            }
        )


GROUP_METADATA = b'{\n "attributes": {},\n "node_type": "group",\n "zarr_format": 3\n}\n'
"""The content of a Zarr group's `zarr.json`."""


class ShardBuffer:
    """The bytes of one raw shard, filled in place and used again for the next row group."""

    def __init__(self, layout: ArrayLayout) -> None:
        self.layout = layout
        stride = layout.chunk_bytes + CRC.size
        self._bytes = aligned_buffer(layout.chunks_per_shard * (stride + 16) + CRC.size)
        chunks = self._bytes[: layout.chunks_per_shard * stride].reshape(layout.chunks_per_shard, stride)
        self._chunks = chunks[:, : layout.chunk_bytes]
        shape = (layout.chunks_per_shard, layout.rows_per_chunk, *layout.feature_shape)
        inner = np.empty(shape[1:], layout.storage_dtype).strides
        # A strided view, because the crc between chunks keeps numpy from viewing the bytes as items by itself.
        self._rows = np.ndarray(shape, layout.storage_dtype, self._bytes, 0, (stride, *inner))

    def put(self, rows: np.ndarray, values: np.ndarray, places: np.ndarray | None = None) -> None:
        """Scatter values to these rows of the group. Rows that lie side by side are copied as one piece, which takes
        half the time of one by one.

        Args:
            rows: rows of the group, `(n,)`.
            values: `(n, *feature_shape)`, or more with `places`.
            places: where in `values` each row's are, `(n,)`; None for all of them in order.
        """
        per_chunk = self.layout.rows_per_chunk
        places = np.arange(len(rows)) if places is None else places
        apart = (np.diff(rows) != 1) | (np.diff(places) != 1) | (rows[1:] % per_chunk == 0)
        starts = np.append(0, np.flatnonzero(apart) + 1)[: len(rows)]
        chunks, first = np.divmod(rows, per_chunk)
        if len(starts) * SHORTEST_PIECE > len(rows):
            self._rows[chunks, first] = values[places]
            return
        lengths = np.diff(starts, append=len(rows))
        pieces = np.stack([lengths, chunks[starts], first[starts], places[starts]], axis=1)
        for length, chunk, to, place in pieces.tolist():
            self._rows[chunk, to : to + length] = values[place : place + length]

    def finish(self, n_rows: int) -> tuple[memoryview, tuple[int, ...]]:
        """Pad after `n_rows` rows, add checksums and index, and hand over the shard's bytes and its chunks' crcs."""
        layout = self.layout
        used = layout.n_chunks(n_rows)
        rest = n_rows - (used - 1) * layout.rows_per_chunk
        self._rows[used - 1, rest:] = layout.fill_value
        crcs = tuple(google_crc32c.value(self._chunks[chunk]) for chunk in range(used))
        stride = layout.chunk_bytes + CRC.size
        for chunk, crc in enumerate(crcs):
            start = chunk * stride + layout.chunk_bytes
            self._bytes[start : start + CRC.size] = np.frombuffer(CRC.pack(crc), np.uint8)
        index = _index_bytes([(chunk * stride, stride) for chunk in range(used)], layout.chunks_per_shard)
        end = used * stride + len(index)
        self._bytes[used * stride : end] = np.frombuffer(index, np.uint8)
        return self._bytes.data[:end], crcs


def pack_shard(layout: ArrayLayout, values: np.ndarray) -> bytes:
    """The bytes of a compressed shard that holds these rows `(n, *feature_shape)`."""
    from numcodecs.zstd import compress  # type: ignore[import-untyped]

    values = np.ascontiguousarray(values, layout.storage_dtype)
    pieces: list[bytes] = []
    extents: list[tuple[int, int]] = []
    offset = 0
    for first in range(0, len(values), layout.rows_per_chunk):
        chunk = values[first : first + layout.rows_per_chunk]
        if len(chunk) < layout.rows_per_chunk:
            padding = np.full((layout.rows_per_chunk - len(chunk), *layout.feature_shape), layout.fill_value)
            chunk = np.concatenate([chunk, padding.astype(layout.storage_dtype)])
        content = compress(chunk.tobytes(), ZSTD_LEVEL)
        content += CRC.pack(google_crc32c.value(content))
        pieces.append(content)
        extents.append((offset, len(content)))
        offset += len(content)
    return b"".join([*pieces, _index_bytes(extents, layout.chunks_per_shard)])


def _index_bytes(extents: Sequence[tuple[int, int]], chunks_per_shard: int) -> bytes:
    index = np.full((chunks_per_shard, 2), MISSING, "<u8")
    index[: len(extents)] = extents
    content = index.tobytes()
    return content + CRC.pack(google_crc32c.value(content))


def write_object(place: Path | StoredObject, content: bytes | memoryview, crc32c: tuple[int, ...] = ()) -> ObjectRecord:
    """Write an object so that after a crash it is there whole, or not at all, and return what the ledger keeps."""
    stored = StoredObject.of(place)
    return ObjectRecord(len(content), stored.storage.write(stored.name, content), crc32c)


def read_raw(
    place: Path | StoredObject,
    layout: ArrayLayout,
    record: ObjectRecord,
    start: int,
    out: np.ndarray,
    what: str = "rows",
) -> None:
    """Read rows of a raw shard into `out`, each inner chunk that they touch compared with the ledger's crc.

    Args:
        place: the shard, a file or an object of a storage.
        layout: of its array.
        record: what the ledger knows of the shard.
        start: first row within the row group.
        out: `(n, *feature_shape)` in the storage dtype, contiguous; takes the rows `[start, start + n)`.
        what: whose rows these are, for the message.

    Raises:
        IntegrityError: the shard is missing, has another size, or its content changed.
    """
    stop = start + len(out)
    flat = out.reshape(-1).view(np.uint8)
    per_chunk, stride = layout.rows_per_chunk, layout.chunk_bytes + CRC.size
    chunks = range(start // per_chunk, layout.n_chunks(stop))
    targets, wholes = [], []
    for chunk in chunks:
        first, last = max(start, chunk * per_chunk), min(stop, (chunk + 1) * per_chunk)
        target = flat[(first - start) * layout.row_bytes : (last - start) * layout.row_bytes]
        targets.append(target)
        wholes.append(target if last - first == per_chunk else np.empty(layout.chunk_bytes, np.uint8))
    stored = StoredObject.of(place)
    with _rot_named(stored, record, what):
        ranges = [(chunk * stride, whole) for chunk, whole in zip(chunks, wholes, strict=True)]
        reading = stored.storage.read_ranges(stored.name, record.n_bytes, ranges)
        for chunk, target, whole, _ in zip(chunks, targets, wholes, reading, strict=True):
            if google_crc32c.value(whole) != record.crc32c[chunk]:
                raise IntegrityError(_rotten(stored, what, f"inner chunk {chunk} does not have the recorded checksum"))
            if whole is not target:
                offset = max(0, start - chunk * per_chunk) * layout.row_bytes
                target[:] = whole[offset : offset + len(target)]


def read_packed(
    place: Path | StoredObject, layout: ArrayLayout, record: ObjectRecord, n_rows: int, what: str = "rows"
) -> np.ndarray:
    """All `n_rows` rows of a compressed shard, which is compared with the ledger's digest. Raises as `read_raw`."""
    from numcodecs.zstd import decompress

    content = read_object(place, record, what)
    index_bytes = layout.chunks_per_shard * 16
    index = np.frombuffer(content, "<u8", layout.chunks_per_shard * 2, len(content) - index_bytes - CRC.size)
    pieces = []
    for offset, size in index.reshape(-1, 2)[: layout.n_chunks(n_rows)].tolist():
        chunk = decompress(content[offset : offset + size - CRC.size])
        pieces.append(np.frombuffer(chunk, layout.storage_dtype).reshape(-1, *layout.feature_shape))
    return np.concatenate(pieces)[:n_rows]


def read_object(place: Path | StoredObject, record: ObjectRecord, what: str = "rows") -> bytes:
    """The whole content of an object, compared with the ledger's digest. Raises as `read_raw`."""
    stored = StoredObject.of(place)
    with _rot_named(stored, record, what):
        content = stored.storage.read(stored.name)
        if len(content) != record.n_bytes:
            raise OtherSizeError(len(content))
    if xxhash.xxh3_128_hexdigest(content) != record.xxh3_128:
        raise IntegrityError(_rotten(stored, what, "its content is not what was written"))
    return content


@contextlib.contextmanager
def _rot_named(stored: StoredObject, record: ObjectRecord, what: str) -> Iterator[None]:
    """Name the object and its rows if it is missing or has another size."""
    try:
        yield
    except FileNotFoundError as error:
        raise IntegrityError(_rotten(stored, what, "it is missing")) from error
    except OtherSizeError as error:
        problem = f"it has {error.size:,} bytes instead of {record.n_bytes:,}"
        raise IntegrityError(_rotten(stored, what, problem)) from error


def _rotten(stored: StoredObject, what: str, problem: str) -> str:
    return (
        f"{stored} ({what}) is damaged: {problem}. Nothing was read from it. Restore the file from a copy, or run "
        "`scope verify` to see all damage."
    )


def damaged_rows(
    place: Path | StoredObject, layout: ArrayLayout, record: ObjectRecord, n_rows: int
) -> list[tuple[int, int]]:
    """The row ranges whose inner chunks changed in a raw shard of the recorded size; all rows if only its index did."""
    per_chunk = layout.rows_per_chunk
    content = np.empty(layout.chunk_bytes, np.uint8)
    ranges = [(chunk * (layout.chunk_bytes + CRC.size), content) for chunk in range(len(record.crc32c))]
    stored = StoredObject.of(place)
    reading = stored.storage.read_ranges(stored.name, record.n_bytes, ranges)
    damaged = [
        (chunk * per_chunk, min(n_rows, (chunk + 1) * per_chunk))
        for chunk, (crc, _) in enumerate(zip(record.crc32c, reading, strict=True))
        if google_crc32c.value(content) != crc
    ]
    return damaged or [(0, n_rows)]


def open_zarr(storage: Storage) -> Any:
    """The artefact as a read-only `zarr.Group`; it knows nothing of the ledger."""
    import zarr
    from zarr.storage import ObjectStore

    place = storage.for_zarr()
    return zarr.open_group(place if isinstance(place, Path) else ObjectStore(place, read_only=True), mode="r")


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
